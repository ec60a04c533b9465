"""Caption metrics of descriptions, in the units and with the tokens of the COCO caption toolkit.

BLEU, ROUGE-L and CIDEr-D are computed here, on tokens of our own tokeniser, without Java. METEOR and SPICE are the toolkit's
own Java programs, through pycocoevalcap; BERTScore is bert-score's. What cannot be had is named in the result with its remedy,
and the rest is computed.
"""

import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from subprocess import CalledProcessError
from typing import Any

from transformers.utils import logging

from devil_hf.evaluation.text.bertscore import MILAN, BertScore, BertScoreSettings, bert_remedy
from devil_hf.evaluation.text.ngrams import CiderD, bleu, rouge_l
from devil_hf.evaluation.text.tokens import ptb_tokens

logger = logging.get_logger(f"transformers.{__name__}")

METRICS = ("bleu", "rouge_l", "cider")  # need nothing but this package
ALL_METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice", "bertscore")
BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class CaptionScorer:
    """Scores of many sets of predictions against the same references, which are tokenised and weighed once.

    Args:
        references: captions of each image, at least one.
        metrics: names of `ALL_METRICS`; `bleu_1` to `bleu_4` are accepted one by one.
        bert: which BERTScore, by default MILAN's settings.

    Attributes:
        missing: metric -> why it cannot be had, and the remedy.

    Raises:
        ValueError: if a metric is unknown, or an image has no reference.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        metrics: Sequence[str] = METRICS,
        bert: BertScoreSettings = MILAN,
    ):
        _check_references(references)
        check_metrics(metrics)
        self.references = references
        self.missing: dict[str, str] = {}
        self._names = [name for metric in metrics for name in (BLEU if metric == "bleu" else (metric,))]
        wanted = dict.fromkeys("bleu" if metric in BLEU else metric for metric in metrics)
        self._tokens = (
            [[ptb_tokens(text) for text in texts] for texts in references] if set(wanted) - {"bertscore"} else []
        )
        self._metrics: dict[str, Callable[[Sequence[str], list[list[str]]], dict[str, float]]] = {}
        for metric in wanted:
            self._add(metric, bert)

    def _add(self, metric: str, bert: BertScoreSettings) -> None:
        if metric == "bleu":
            self._metrics[metric] = lambda _, tokens: dict(zip(BLEU, bleu(tokens, self._tokens), strict=True))
        elif metric == "rouge_l":
            self._metrics[metric] = lambda _, tokens: {"rouge_l": fmean(rouge_l(tokens, self._tokens))}
        elif metric == "cider":
            cider = CiderD(self._tokens)
            self._metrics[metric] = lambda _, tokens: {"cider": fmean(cider(tokens))}
        elif metric == "bertscore":
            try:
                scorer = BertScore(self.references, bert)
                self._metrics[metric] = lambda texts, _: {"bertscore": float(scorer(texts).mean())}
            except (OSError, ImportError, KeyError) as error:  # KeyError: a name that bert-score has no layer for
                self.missing[metric] = bert_remedy(bert, error)
        else:
            reason = _missing_java(metric)
            if reason:
                self.missing[metric] = reason
            else:
                program = JavaMetric(metric, self._tokens)
                self._metrics[metric] = lambda _, tokens: {metric: program(tokens)}

    def __call__(self, predictions: Sequence[str]) -> dict[str, Any]:
        """Scores of one description per image, as `caption_scores` returns them."""
        if len(predictions) != len(self.references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(self.references)} lists of references; give one for each"
            )
        tokens = [ptb_tokens(text) for text in predictions] if self._tokens else []
        missing, found = dict(self.missing), dict[str, float]()
        for metric, compute in self._metrics.items():
            try:
                found |= compute(predictions, tokens)
            except JavaError as error:
                missing[metric] = str(error)
        scores: dict[str, Any] = {name: found[name] for name in self._names if name in found}
        return scores | ({"missing": missing} if missing else {})


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = METRICS,
    bert: BertScoreSettings = MILAN,
) -> dict[str, Any]:
    """Score one description per image against the captions of people.

    Args:
        predictions (`Sequence[str]`): One description per image.
        references (`Sequence[Sequence[str]]`): The reference captions of each image, at least one.
            CIDEr takes its document frequencies from them.
        metrics (`Sequence[str]`): Which of `"bleu"` (or `"bleu_1"` to `"bleu_4"`), `"meteor"`, `"rouge_l"`, `"cider"`,
            `"spice"`, `"bertscore"`; by default those that need nothing else.
        bert (`BertScoreSettings`): Which BERTScore, by default MILAN's settings.

    Returns:
        `dict`: `bleu_1` to `bleu_4`, `meteor`, `rouge_l`, `spice` in [0, 1], `cider` in [0, 10], the toolkit's units (papers
        print them times 100), `bertscore` (mean F1). Where a metric cannot be had, `missing` says why and what to do.

    Raises:
        ValueError: if a metric is unknown, the lengths differ, or an image has no reference.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} lists of references; "
            "give at least one prediction and one list for each"
        )
    return CaptionScorer(references, metrics, bert)(predictions)


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise a clear error for a metric that is none of `ALL_METRICS`."""
    unknown = [metric for metric in metrics if metric not in (*ALL_METRICS, *BLEU)]
    if unknown or not metrics:
        raise ValueError(f"unknown metrics {unknown}; choose from {(*ALL_METRICS, *BLEU)}")


def _check_references(references: Sequence[Sequence[str]]) -> None:
    if not len(references):
        raise ValueError("there are no references; give at least one list of captions")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"references[{index}] is {texts!r}; give a list of at least one caption")


class JavaError(RuntimeError):
    """A Java program of the toolkit failed."""


def _missing_java(metric: str) -> str | None:
    """Why METEOR or SPICE cannot be run, and what to do."""
    if find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed: pip install 'devil-hf[metrics]'"
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
