"""Extras: packages that only some rooms need, and what to say when one is missing.

The core (loading a checkpoint and asking it) installs without them. A room whose every file needs an extra asks for it in its
`__init__`; a function that needs one package asks just before it imports it:

```python
needs("pycocotools", "evaluate")
from pycocotools import mask
```

`model/` travels without this package and does not use this file.
"""

from importlib.util import find_spec


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message names it and the command that installs it."""


def is_installed(module: str) -> bool:
    """Whether a module, by the name that it is imported by, can be imported; it is not imported."""
    return find_spec(module.partition(".")[0]) is not None


def remedy(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'devil-hf[{extra}]'"


def needs(module: str, extra: str) -> None:
    """Refuse to go on without a module.

    Args:
        module: the name that it is imported by, such as `sklearn`.
        extra: `train`, `evaluate` or `demo`, whichever brings it.

    Raises:
        MissingExtraError: when it is not installed.
    """
    if not is_installed(module):
        raise MissingExtraError(f"{module} is not installed, which this needs: {remedy(extra)}", name=module)


__all__ = ["MissingExtraError", "is_installed", "needs", "remedy"]
