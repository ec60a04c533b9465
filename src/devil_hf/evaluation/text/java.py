"""METEOR and SPICE: the COCO caption toolkit's own Java programs, through pycocoevalcap."""

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from devil_hf.extras import is_installed, remedy

SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class JavaError(RuntimeError):
    """A Java program of the toolkit failed."""


def missing_java(metric: str) -> str | None:
    """Why METEOR or SPICE cannot be run, and what to do."""
    if not is_installed("pycocoevalcap"):
        return f"pycocoevalcap is not installed: {remedy('evaluate')}"
    if shutil.which("java") is None:
        return "there is no Java on the path: install a Java runtime of version 8 or later"
    if metric == "spice":
        (folder,) = find_spec("pycocoevalcap").submodule_search_locations or [""]  # type: ignore[union-attr]
        lib = Path(folder, "spice", "lib")
        absent = [name for name in SPICE_FILES if not (lib / name).is_file()]
        if absent:
            return (
                f"{' and '.join(absent)} of Stanford CoreNLP 3.6.0 must be in {lib}: where there is a network, run "
                "python -m pycocoevalcap.spice.get_stanford_models once (about 400 MB)"
            )
    return None


class JavaMetric:
    """METEOR or SPICE of the toolkit against fixed references; METEOR's program, which starts slowly, is kept running."""

    def __init__(self, metric: str, references: Sequence[Sequence[Sequence[str]]]):
        self.metric = metric
        self.references = {index: [" ".join(tokens) for tokens in texts] for index, texts in enumerate(references)}
        self._program: Any = None

    def __call__(self, predictions: Sequence[Sequence[str]]) -> float:
        """The mean over the images, in [0, 1].

        Raises:
            JavaError: if the program fails.
        """
        results = {index: [" ".join(tokens)] for index, tokens in enumerate(predictions)}
        try:
            if self._program is None:
                self._program = self._start()
            value, _ = self._program.compute_score(self.references, results)
        except (OSError, ValueError, CalledProcessError) as error:
            self._program = None  # a dead program answers nothing any more
            raise JavaError(
                f"the toolkit's {self.metric.upper()} failed ({error}); see that Java runs and has memory enough"
            ) from error
        return float(value)

    def _start(self) -> Any:
        if self.metric == "meteor":
            from pycocoevalcap.meteor.meteor import Meteor

            return Meteor()
        from pycocoevalcap.spice.spice import Spice

        return Spice()
