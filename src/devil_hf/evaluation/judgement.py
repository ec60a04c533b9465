"""Whether controls say that an explainer may be trusted: intervals, comparisons, and the verdict by `controls.py`'s rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from devil_hf.data.captioned import CaptionedImages
from devil_hf.data.shapes import ATTRIBUTE_WORDS
from devil_hf.evaluation.results import CONTROLS, Evaluation
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.text.ngrams import CiderD, bleu, rouge_l
from devil_hf.evaluation.text.standard import NO_CIDER
from devil_hf.evaluation.text.tokens import ptb_tokens
from devil_hf.evaluation.text.words import words_of
from devil_hf.statistics import Ratio, bootstrap_draws

INTACT = "all"  # as results name all layers together
MARGINS = {"cider": 0.01, "word_f1": 0.05, "evidence": 0.02}
MAP_CORRELATION_LIMIT = 0.5
WORDS = {word for words in ATTRIBUTE_WORDS.values() for word in words}
COLUMNS = ("word_f1", "cider", "rouge_l", "evidence", "map_correlation")


@dataclass
class Measured:
    """What one condition gave: a text, an evidence in nats per token and a mean map correlation per image, NaN if there is none.

    `by_layer` has the mean map correlation of each layer.
    """

    texts: list[str]
    evidence: np.ndarray
    correlation: np.ndarray
    by_layer: dict[str, float] = field(default_factory=dict)


class CaptionTable:
    """BLEU of the corpus, CIDEr-D (where it is defined) and ROUGE-L of each image, against fixed captions."""

    def __init__(self, captions: Sequence[Sequence[str]]):
        self.references = [[ptb_tokens(text) for text in texts] for texts in captions]
        self.cider = CiderD(self.references)

    def of_images(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Metric -> (N,); CIDEr takes its document frequencies from the captions of all images."""
        tokens = [ptb_tokens(text) for text in texts]
        found = {"cider": np.array(self.cider(tokens))} if self.cider.defined else {}
        return found | {"rouge_l": np.array(rouge_l(tokens, self.references))}

    def of_corpus(self, texts: Sequence[str]) -> dict[str, float]:
        return {f"bleu_{n}": value for n, value in enumerate(bleu([ptb_tokens(text) for text in texts], self.references), 1)}


def _word_f1(texts: Sequence[str], data: CaptionedImages) -> Ratio:
    hits, total = [], []
    for text, scene in zip(texts, data.scenes, strict=True):
        said, true = words_of(text) & WORDS, {word for words in scene.words.values() for word in words}
        hits.append(2.0 * len(said & true))
        total.append(float(len(said) + len(true)))
    return Ratio(np.array(hits), np.array(total))


def judge(measured: Mapping[str, Measured], data: CaptionedImages, seed: int = 0) -> dict[str, Any]:
    """Scores, intervals and the verdict of what was measured; the intact model is `measured["all"]`."""
    draws = bootstrap_draws(len(data), seed=seed)
    scores = CaptionTable(data.captions)
    statistics = {name: _statistics(one, data, scores) for name, one in measured.items()}
    statistics[INTACT].pop("map_correlation", None)  # with itself
    rows = {name: {m: ratio.value for m, ratio in row.items() if np.isfinite(ratio.value)} for name, row in statistics.items()}
    for name, one in measured.items():
        rows[name] |= scores.of_corpus(one.texts)
    return {
        "missing": {} if scores.cider.defined else {"cider": NO_CIDER},
        "scores": {INTACT: rows[INTACT]},
        "controls": {name: row for name, row in rows.items() if name != INTACT},
        "intervals": {name: {m: ratio.interval(draws) for m, ratio in row.items()} for name, row in statistics.items()},
        "map_correlation_by_layer": {name: one.by_layer for name, one in measured.items() if one.by_layer and name != INTACT},
        "texts": {name: measured[name].texts[0] for name in ("null", "constant")},
        "verdict": _verdict(rows, statistics, draws, bool(np.isfinite(measured[INTACT].correlation).any())),
    }


def _statistics(one: Measured, data: CaptionedImages, scores: CaptionTable) -> dict[str, Ratio]:
    found = {metric: Ratio.mean(values) for metric, values in scores.of_images(one.texts).items()}
    if data.scenes:
        found["word_f1"] = _word_f1(one.texts, data)
    found["evidence"] = Ratio.mean(one.evidence)
    if np.isfinite(one.correlation).any():
        found["map_correlation"] = Ratio.mean(one.correlation)
    return found


def _verdict(
    rows: Mapping[str, Mapping[str, float]], statistics: Mapping[str, Mapping[str, Ratio]], draws: np.ndarray, mapped: bool
) -> dict[str, Any]:
    comparisons = [
        _compared(rows, statistics, draws, control, metric)
        for control in CONTROLS
        for metric in (*MARGINS, "map_correlation")
        if metric in rows[control] and (metric in rows[INTACT] or metric not in MARGINS)
    ]
    failed = [comparison for comparison in comparisons if not comparison["passed"]]
    passed = mapped and not failed
    return {"passed": passed, "reason": _reason(rows, comparisons, failed, mapped), "comparisons": comparisons}


def _compared(rows, statistics, draws: np.ndarray, control: str, metric: str) -> dict[str, Any]:
    """One rule: a difference with its whole interval above the margin, or a correlation of maps below the limit."""
    if metric in MARGINS:
        span = statistics[INTACT][metric].interval(draws, less=statistics[control][metric])
        rule, passed = f"intact - control > {MARGINS[metric]}", span is not None and span[0] > MARGINS[metric]
        value = rows[INTACT][metric] - rows[control][metric]
    else:
        span = statistics[control][metric].interval(draws)
        rule = f"correlation with the intact maps < {MAP_CORRELATION_LIMIT}"
        value, passed = rows[control][metric], span is not None and span[1] < MAP_CORRELATION_LIMIT
    return {"control": control, "metric": metric, "rule": rule, "value": value, "interval": span, "passed": passed}


def _reason(rows, comparisons, failed, mapped: bool) -> str:
    if not mapped:
        return "the maps of the intact model are flat: no phrase is likelier at one place than at another"
    if failed:
        said = [
            f"{CONTROLS[one['control']]}: {one['metric']} {one['value']:.3f} {_span(one['interval'])} violates '{one['rule']}'"
            for one in failed
        ]
        return f"{len(failed)} of {len(comparisons)} comparisons fail: " + "; ".join(said)
    parts = []
    for metric in MARGINS:
        if metric in rows[INTACT]:
            best = max((name for name in CONTROLS if metric in rows[name]), key=lambda name: rows[name][metric])
            parts.append(f"{metric} {rows[INTACT][metric]:.3f}, at most {rows[best][metric]:.3f} ({CONTROLS[best]})")
    most = max((one for one in comparisons if one["metric"] == "map_correlation"), key=lambda one: one["value"])
    parts.append(f"maps correlate with the intact ones by at most {most['value']:.2f} ({CONTROLS[most['control']]})")
    return f"all {len(comparisons)} comparisons hold: " + "; ".join(parts)


def _span(interval: Sequence[float] | None) -> str:
    return "[no interval: fewer than 2 images have it]" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def control_text(evaluation: Evaluation) -> str:
    """The result as text: a row per condition with intervals, the rules, and the verdict."""
    rows = evaluation.scores | evaluation.controls
    names = CONTROLS | {INTACT: "intact, all layers"}
    verdict = evaluation.verdict or {}
    margins = ", ".join(f"{metric} {margin}" for metric, margin in MARGINS.items() if metric in evaluation.metrics)
    return "\n".join(
        [
            table(rows, COLUMNS, intervals=evaluation.details["intervals"], names=names),
            "",
            "intervals: 95 %, bootstrap over images; evidence in nats per token over the null prefix",
            f"rules: the paired difference intact - control lies above a margin ({margins}) with its whole interval,",
            f"       the maps' rank correlation with the intact ones below {MAP_CORRELATION_LIMIT}",
            f"verdict: {'TRUSTED' if verdict['passed'] else 'NOT TRUSTED'}: {verdict['reason']}",
        ]
    )
