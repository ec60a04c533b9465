"""Caption metrics of descriptions, in the units and with the tokens of the COCO caption toolkit.

Texts are tokenised once, by our own tokeniser without Java, however many metrics read them. What cannot be had is named in the
result with its remedy, and the rest is computed. `standard.py` has the metrics of the field; to add one, register it there, in
a new file of this folder, or in a module that another package names under the entry point group `devil_hf.plugins`:

```python
@caption_metric("words", {"words": "words"})
def count_words(references):
    return lambda predictions: [fmean(len(tokens) for tokens in predictions.tokens)]
```
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from devil_hf.evaluation.text.bertscore import MILAN, BertScoreSettings
from devil_hf.evaluation.text.tokens import ptb_tokens
from devil_hf.registry import Registry


@dataclass
class References:
    """What people wrote, at least one text per image, and which BERTScore was asked for."""

    texts: Sequence[Sequence[str]]
    bert: BertScoreSettings = MILAN

    @cached_property
    def tokens(self) -> list[list[list[str]]]:
        """The tokens of every text, by the toolkit's rules."""
        return [[ptb_tokens(text) for text in texts] for texts in self.texts]


@dataclass
class Predictions:
    """One description per image."""

    texts: Sequence[str]

    @cached_property
    def tokens(self) -> list[list[str]]:
        """The tokens of every text, by the toolkit's rules."""
        return [ptb_tokens(text) for text in self.texts]


class MetricError(RuntimeError):
    """A metric cannot be had, or is not defined; the message says why, and what to do."""


Scorer = Callable[[Predictions], Sequence[float]]


@dataclass(frozen=True)
class CaptionMetric:
    """A metric of captions.

    Args:
        scores: its scores over all images, each with its name as people write it.
        prepare: of fixed references, what gives the scores of predictions; a `MetricError` where it cannot be had.
        usual: whether it needs nothing but this package, and so is computed where nothing else is asked.
    """

    scores: Mapping[str, str]
    prepare: Callable[[References], Scorer]
    usual: bool = True


CAPTION_METRICS: Registry[CaptionMetric] = Registry("caption metric", "devil_hf.evaluation.text")


def caption_metric(name: str, scores: Mapping[str, str], usual: bool = True) -> Callable:
    """Decorator that registers the `prepare` of a `CaptionMetric`."""

    def register(prepare: Callable[[References], Scorer]) -> Callable[[References], Scorer]:
        CAPTION_METRICS.register(name, CaptionMetric(scores, prepare, usual))
        return prepare

    return register


def usual_metrics() -> tuple[str, ...]:
    """Metrics that need nothing but this package."""
    return tuple(name for name, metric in CAPTION_METRICS.items() if metric.usual)


class CaptionScorer:
    """Scores of many sets of predictions against the same references, which are tokenised and weighed once.

    Args:
        references: captions of each image, at least one; `References` keep their tokens for several scorers.
        metrics: names of `CAPTION_METRICS`, or single scores of them such as `bleu_4`; None for the usual ones.
        bert: which BERTScore, by default MILAN's settings.

    Attributes:
        missing: metric -> why it cannot be had, and the remedy.

    Raises:
        ValueError: if a metric is unknown, or an image has no reference.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]] | References,
        metrics: Sequence[str] | None = None,
        bert: BertScoreSettings = MILAN,
    ):
        self.references = references if isinstance(references, References) else References(references, bert)
        _check_references(self.references.texts)
        wanted = check_metrics(metrics)
        self.missing: dict[str, str] = {}
        self._names = list(wanted)
        self._scorers: dict[str, Scorer] = {}
        for metric in dict.fromkeys(wanted.values()):
            try:
                self._scorers[metric] = CAPTION_METRICS[metric].prepare(self.references)
            except MetricError as error:
                self.missing[metric] = str(error)

    def __call__(self, predictions: Sequence[str]) -> dict[str, Any]:
        """Scores of one description per image, as `caption_scores` returns them."""
        if len(predictions) != len(self.references.texts):
            raise ValueError(
                f"{len(predictions)} predictions for {len(self.references.texts)} lists of references; give one for each"
            )
        said, missing, found = Predictions(predictions), dict(self.missing), dict[str, float]()
        for metric, scorer in self._scorers.items():
            try:
                found |= dict(zip(CAPTION_METRICS[metric].scores, scorer(said), strict=True))
            except MetricError as error:
                missing[metric] = str(error)
        scores: dict[str, Any] = {name: found[name] for name in self._names if name in found}
        return scores | ({"missing": missing} if missing else {})


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] | None = None,
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


def check_metrics(metrics: Sequence[str] | None) -> dict[str, str]:
    """Every score that is asked for, and the metric that has it; None for the usual metrics.

    Raises:
        ValueError: for a metric that is not there, with those that are.
    """
    asked = usual_metrics() if metrics is None else metrics
    single = {score: name for name, metric in CAPTION_METRICS.items() for score in metric.scores}
    unknown = [name for name in asked if name not in CAPTION_METRICS and name not in single]
    if unknown or not asked:
        raise ValueError(f"unknown metrics {unknown}; choose from {tuple(dict.fromkeys((*CAPTION_METRICS, *single)))}")
    return {
        score: single[score] for name in asked for score in (CAPTION_METRICS[name].scores if name in CAPTION_METRICS else (name,))
    }


def best_constant(groups: Iterable[Iterable[str]], score: Callable[[str], float], count: int = 20) -> str:
    """The one text that scores best when given to every image, of the `count` most frequent of each group; "" without any."""
    candidates = set[str]()
    for texts in groups:
        counts = Counter(text for text in texts if text)
        candidates |= set(sorted(counts, key=lambda text: (-counts[text], text))[:count])
    return max(sorted(candidates), key=score, default="")


def _check_references(references: Sequence[Sequence[str]]) -> None:
    if not len(references):
        raise ValueError("there are no references; give at least one list of captions")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"references[{index}] is {texts!r}; give a list of at least one caption")


__all__ = [
    "CAPTION_METRICS",
    "CaptionMetric",
    "CaptionScorer",
    "MetricError",
    "Predictions",
    "References",
    "best_constant",
    "caption_metric",
    "caption_scores",
    "check_metrics",
    "usual_metrics",
]
