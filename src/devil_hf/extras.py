"""Extras: packages that only some rooms need, and what to say when one is missing.

The core (loading a checkpoint and asking it) installs without them. A room whose every file needs an extra asks for it in its
`__init__`; a function that needs one package asks just before it imports it:

```python
needs("pycocotools", "evaluate")
from pycocotools import mask
```

Where neither happened, `explain` says the same of the error that Python raises; the command line uses it.

`model/` travels without this package and does not use this file.
"""

import re
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

EXTRAS = ("train", "evaluate", "demo")
DISTRIBUTIONS = {"sklearn": "scikit-learn", "pytorch_grad_cam": "grad-cam", "bert_score": "bert-score"}  # by imported name


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


def explain(error: ImportError) -> str:
    """What to say of a failed import: for a package of an extra, the command that installs it, too."""
    if isinstance(error, MissingExtraError) or not isinstance(error, ModuleNotFoundError) or error.name is None:
        return str(error)
    extra = extra_of(error.name.partition(".")[0])
    return str(error) if extra is None else f"{error.name} is not installed, which this needs: {remedy(extra)}"


def extra_of(module: str) -> str | None:
    """The extra that brings a module, by the name that it is imported by; of several the first by name."""
    try:
        requirements = requires("devil-hf") or []
    except PackageNotFoundError:  # run from a checkout that nobody installed
        return None
    name = re.escape(DISTRIBUTIONS.get(module, module))
    found = [re.search(r"extra == ['\"](\w+)", line) for line in requirements if re.match(rf"{name}(?![\w-])", line)]
    return next((match[1] for match in found if match and match[1] in EXTRAS), None)


__all__ = ["MissingExtraError", "explain", "extra_of", "is_installed", "needs", "remedy"]
