"""The checkpoints that ship with the package, each in a folder of its name.

`shapes` is a whole DeViL for the shapes world, in half precision. It is what every verb asks where no checkpoint is named, and
the source of the frozen parts of `devil quickstart`; `scripts/build_embedded.py` makes it from nothing. A name, a directory or a
Hub id: `locate` is the one place that tells them apart.
"""

from os import PathLike
from pathlib import Path

FOLDER = Path(__file__).parent
SHAPES, PHOTOS = "shapes", "photos"
DEFAULT = SHAPES
CHECKPOINT = FOLDER / DEFAULT
# What the shipped checkpoints say of themselves (`config.scope`).
SCOPES = {
    SHAPES: "This checkpoint has only ever seen rendered scenes of coloured, textured shapes. "
    "What it says about photographs or any other picture means nothing.",
    PHOTOS: "This checkpoint learned its words from 6,600 photographs of everyday scenes, mostly of people and dogs outdoors. "
    "What it says about drawings, rendered scenes, documents or medical images means nothing.",
}


def shipped_checkpoints() -> list[str]:
    """Names of the checkpoints that are in the package."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.json"))


def locate(checkpoint: str | PathLike | None = None) -> str | PathLike:
    """Where `from_pretrained` finds a checkpoint.

    Args:
        checkpoint: name of a shipped one; a directory (one that has such a name is `./NAME`); or a Hub id. None is `DEFAULT`.
    """
    if checkpoint is None:
        return CHECKPOINT
    return FOLDER / checkpoint if str(checkpoint) in shipped_checkpoints() else checkpoint
