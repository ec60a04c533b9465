"""The checkpoint that ships with the package: a whole DeViL for the shapes world, in half precision.

It is the default of `devil describe` and `devil attribute`, and the source of the frozen parts of `devil quickstart`.
`scripts/build_embedded.py` makes it from nothing.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "shapes"
SCOPE = (
    "This checkpoint has only ever seen rendered scenes of coloured, textured shapes. "
    "What it says about photographs or any other picture means nothing."
)
