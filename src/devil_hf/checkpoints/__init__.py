"""The checkpoints that ship with the package, each in a folder of its name.

`photos` is a whole DeViL for photographs, in half precision: what every verb asks about pictures where no checkpoint is named;
`scripts/build_photos.py` makes it. `shapes` is one for the rendered shapes world, where the truth is known: what `devil evaluate`
measures by default, and the source of the frozen parts of `devil quickstart`; `scripts/build_embedded.py` makes it from nothing.
A name, a directory or a Hub id: `locate` is the one place that tells them apart.
"""

from os import PathLike
from pathlib import Path

FOLDER = Path(__file__).parent
SHAPES, PHOTOS = "shapes", "photos"
DEFAULT = PHOTOS
# What the shipped checkpoints say of themselves (`config.scope`).
SCOPES = {
    SHAPES: "This checkpoint has only ever seen rendered scenes of coloured, textured shapes. "
    "What it says about photographs or any other picture means nothing.",
    PHOTOS: "This checkpoint learned its words from 6,600 photographs of everyday scenes, mostly of people and dogs outdoors. "
    "What it says about drawings, rendered scenes, documents or medical images means nothing.",
}
# Of their weights, as the Hub names licenses; "other": for research, as the data of the photographs are.
LICENSES = {SHAPES: "apache-2.0", PHOTOS: "other"}


def shipped_checkpoints() -> list[str]:
    """Names of the checkpoints that are in the package, in alphabetic order."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.json"))


def license_of(scope: str | None) -> str | None:
    """The license of the checkpoint of ours that says this of itself, None for any other."""
    return next((LICENSES[name] for name, text in SCOPES.items() if text == scope), None)


def locate(checkpoint: str | PathLike | None = None) -> str | PathLike:
    """Where `from_pretrained` finds a checkpoint.

    Args:
        checkpoint: name of a shipped one; a directory (one that has such a name is `./NAME`); or a Hub id. None is `DEFAULT`.
    """
    name = DEFAULT if checkpoint is None else str(checkpoint)
    return FOLDER / name if checkpoint is None or name in shipped_checkpoints() else checkpoint
