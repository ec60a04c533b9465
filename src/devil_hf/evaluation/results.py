"""Results of evaluations on disk: one JSON layout that a model card can show in full.

```json
{
  "title": "Captions of features",
  "dataset": {"name": "Flickr8k", "id": "jxie/flickr8k", "split": "test", "size": 132},
  "settings": {"num_beams": 1, "tokenizer": "simple"},
  "scores": {"all": {"bleu_4": 0.125, "cider": 0.273}, "layer4": {"bleu_4": 0.131, "cider": 0.290}},
  "controls": {"shuffled": {"bleu_4": 0.063, "cider": 0.094}},
  "verdict": {"passed": true, "reason": "..."},
  "missing": {"spice": "there is no Java on the path: ..."},
  "weights": "9f2c..."
}
```

Rows of `scores` are what was asked ("all" layers together, one layer, a combination of their maps), rows of `controls` the same
measure without the features; more is better in every metric. Only `title` and `scores` must be there, and `dataset` may be a
name. `verdict` is for evaluations that judge their controls themselves; `weights` says of which weights all this is true (see
`devil_hf.checkpoints.identity`), and no other model is published with it. A number that could not be had, or is not defined
(CIDEr of one image, descriptions dealt to other images where there is one), is in no table: `missing` has the reason, by the
name of the metric, of the row, or of both ("all: cider"). Elsewhere (`intervals`) it is null; no NaN is written. Other keys
(`intervals`, the `model-index` of captions) are not read. A file may also hold a list of such objects. The first layout of
`devil quickstart`, which the shipped checkpoint of the shapes world has, is read as well.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from devil_hf.checkpoints.identity import fingerprint
from devil_hf.data.worlds import HELD_OUT_WORLD, world_label
from devil_hf.evaluation.maps.combining import map_combinations
from devil_hf.evaluation.text.metrics import CAPTION_METRICS
from devil_hf.folders import finite, write_json
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.text_files import read_results

TASK = "image-to-text"
# Rows that need no image, or not the right one, by what they take away.
CONTROLS = {
    "backbone_randomised": "backbone weights randomised",
    "shuffled": "features shuffled between images",
    "null": "no features (null prefix)",
    "constant": "one constant description",
    "untrained": "untrained translator",
}
CHANCE = "chance"
LARGEST = 1e100  # a score of a stranger's file; JSON holds whole numbers that no float has
UNDEFINED = "not defined for what was measured: there is nothing to divide by, or nothing that varies"
Table = dict[str, dict[str, float]]


@dataclass
class Evaluation:
    """One evaluation that was run.

    Args:
        title: what was measured.
        scores: row (layer, "all", a combination) -> metric -> value.
        controls: name of the control (see `CONTROLS`, or "chance") -> metric -> value.
        dataset: `name`, and where known `id` on the Hub, `split` and `size` (images).
        settings: whatever else decides the numbers.
        verdict: `{"passed": bool, "reason": str}` where the evaluation judged its controls itself.
        missing: why a metric, a row, or a metric of a row ("row: metric") is in no table; what is not a finite number is taken
            out of `scores` and `controls` and gets its reason here.
        weights: `fingerprint` of the model that was measured, where it was recorded.
        details: what else belongs into the file, by name; it is not read again.
        text, exit_code: for the command line, not part of the file.
    """

    title: str
    scores: Table
    controls: Table = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=lambda: {"name": "not recorded"})
    settings: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    weights: str | None = None
    details: dict[str, Any] = field(default_factory=dict, compare=False)
    text: str = field(default="", compare=False, repr=False)
    exit_code: int = field(default=0, compare=False, repr=False)

    def __post_init__(self):
        """Leave out what is no number, with a reason."""
        for table in (self.scores, self.controls):
            for row, values in table.items():
                kept = {metric: value for metric, value in values.items() if value is not None and math.isfinite(value)}
                for metric in values.keys() - kept.keys():
                    self.missing.setdefault(f"{row}: {metric}", UNDEFINED)
                table[row] = kept

    def as_record(self) -> dict[str, Any]:
        """The one layout of results, see above, as JSON reads it again; what is not defined among the details is null."""
        record = {name: getattr(self, name) for name in ("title", "dataset", "settings", "scores", "controls", "missing")}
        record |= {"verdict": self.verdict} if self.verdict is not None else {}
        return finite(json.loads(json.dumps(record | self.details | {"weights": self.weights})))

    def write(self, file: str | PathLike) -> None:
        """Write the result as JSON."""
        write_json(file, self.as_record())

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order in which they first occur; some may only be there for controls."""
        rows = (*self.scores.values(), *self.controls.values())
        return list(dict.fromkeys(metric for row in rows for metric in row))

    @property
    def reasons(self) -> list[str]:
        """A sentence for each number that is missing."""
        names = {what: ", ".join(CONTROLS.get(part) or metric_name(part) for part in what.split(": ")) for what in self.missing}
        return [f"{names[what]} is missing: {why}" for what, why in self.missing.items()]

    @property
    def headline(self) -> str:
        """The row that stands for the whole model: all layers together, else a combination of their maps, else the deepest."""
        return next((name for name in ("all", *map_combinations()) if name in self.scores), list(self.scores)[-1])

    def model_index(self) -> list[EvalResult]:
        """Every score as an entry of a model card's `model-index`; controls are not results of the model."""
        return [
            EvalResult(
                task_type=TASK,
                task_name=self.title,
                dataset_type=self.dataset.get("id") or self.dataset["name"],
                dataset_name=self.dataset["name"],
                dataset_config=self.title,
                dataset_split=self.dataset.get("split"),
                metric_type=metric,
                metric_name=f"{metric_name(metric)} ({row})",
                metric_value=value,
                metric_args={"layers": row},
            )
            for row, values in self.scores.items()
            for metric, value in values.items()
        ]


@dataclass
class ControlVerdict:
    """What the controls of all evaluations say together.

    Args:
        status: "none" when no control was run, else "passed" or "failed".
        findings: a sentence per comparison or stated reason.
        run, missing: names of the controls that were run, and of those that were not.
    """

    status: str
    findings: list[str]
    run: list[str]
    missing: list[str]


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    names = {score: name for one in CAPTION_METRICS.values() for score, name in one.scores.items()}
    return names.get(metric, metric.replace("_", " "))


def judge_controls(evaluations: Sequence[Evaluation]) -> ControlVerdict:
    """Passed when every headline score is above every control that was run for the same metric."""
    findings, passed, run = [], [], set()
    for evaluation in evaluations:
        controls = {name: row for name, row in evaluation.controls.items() if name != CHANCE}
        run |= set(controls)
        if evaluation.verdict is not None:
            passed.append(bool(evaluation.verdict["passed"]))
            findings.append(f"{evaluation.title}: {evaluation.verdict.get('reason', 'no reason was recorded')}")
            continue
        for metric, value in evaluation.scores[evaluation.headline].items():
            rivals = {name: row[metric] for name, row in controls.items() if metric in row}
            if rivals:
                best = max(rivals, key=lambda name: rivals[name])
                passed.append(value > rivals[best])
                findings.append(
                    f"{evaluation.title}, {metric_name(metric)}: {value:.3f} with the features ({evaluation.headline}), "
                    f"{rivals[best]:.3f} for the best control ({CONTROLS.get(best, best)})"
                )
    status = "none" if not passed else "passed" if all(passed) else "failed"
    missing = [name for name in CONTROLS if name not in run]
    return ControlVerdict(status, findings, sorted(run), missing)


def check_measured(evaluations: Iterable[Evaluation], model: DevilModel) -> None:
    """Raise a ValueError when an evaluation says that it was made with other weights than the model's; not all say it."""
    own = fingerprint(model)
    for evaluation in evaluations:
        if evaluation.weights not in (None, own):
            raise ValueError(
                f"{evaluation.title!r} was measured on other weights ({evaluation.weights:.8}) than these ({own:.8}): measure "
                "again, or leave it out"
            )


def read_evaluations(path: str | PathLike) -> list[Evaluation]:
    """The evaluations of a JSON file in one of the layouts named above.

    Raises:
        ValueError: for a file that `read_results` refuses, that has another layout, or holds a score that is neither a finite
            number nor null.
    """
    path = Path(path)
    content = read_results(path)
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} holds half a character ({error.reason}), which no card can show: mend its texts") from error
    parts = content if isinstance(content, list) else [content]
    return [evaluation for part in parts for evaluation in _evaluations_of(part, path)]


def _evaluations_of(content: Any, path: Path) -> list[Evaluation]:
    if isinstance(content, Mapping) and "description_f1" in content:
        return _quickstart_evaluations(content, path)
    if not isinstance(content, Mapping) or not isinstance(content.get("scores"), Mapping) or not content["scores"]:
        raise ValueError(
            f'{path} holds no results: expected an object with "title" and "scores", as devil_hf.evaluation.results has it'
        )
    dataset = content.get("dataset", "not recorded")
    dataset = {"name": dataset} if isinstance(dataset, str) else _named(content, "dataset", path)
    _check(isinstance(dataset.get("name"), str), path, "dataset", "a name, or an object with one")
    for name in ("id", "split"):
        _check(isinstance(dataset.get(name, ""), str | None), path, f"{name} of dataset", "text")
    verdict = None if content.get("verdict") is None else _named(content, "verdict", path)
    if verdict is not None:
        _check(isinstance(verdict.get("passed"), bool), path, '"passed" of verdict', "true or false")
        _check(isinstance(verdict.get("reason", ""), str), path, '"reason" of verdict', "text")
    missing = _named(content, "missing", path)
    _check(all(isinstance(why, str) for why in missing.values()), path, "missing", "a reason in words for each name")
    for name in ("title", "weights"):
        _check(isinstance(content.get(name, ""), str | None), path, name, "text")
    return [
        Evaluation(
            title=content.get("title") or path.stem,
            scores=_table(content, "scores", path),
            controls=_table(content, "controls", path),
            dataset=dataset,
            settings=_named(content, "settings", path),
            verdict=verdict,
            missing=missing,
            weights=content.get("weights"),
        )
    ]


def _check(holds: bool, path: Path, what: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{path}: {what} is not {expected}; mend the file, or measure again")


def _named(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """An object among the results, {} where it is not there."""
    value = content.get(name, {})
    _check(isinstance(value, Mapping), path, name, "an object")
    return dict(value)


def _table(content: Mapping[str, Any], name: str, path: Path) -> Table:
    """Rows of metrics: numbers, or null where one is not defined."""
    rows = _named(content, name, path)
    for row, values in rows.items():
        _check(isinstance(values, Mapping), path, f"{row!r:.80} of {name}", "an object of metrics")
        for metric, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None) or not abs(value or 0) < LARGEST:
                raise ValueError(
                    f"{path}: {metric:.80} of {row!r:.80} is {value!r:.80}, not a finite number; leave it out, or measure again"
                )
    return {row: dict(values) for row, values in rows.items()}


def _quickstart_evaluations(content: Mapping[str, Any], path: Path) -> list[Evaluation]:
    dataset = {"name": world_label(HELD_OUT_WORLD)}  # which this layout always measured
    _check(isinstance(content.get("weights", ""), str | None), path, "weights", "text")
    _check(bool(content["description_f1"]), path, "description_f1", "an object with a row for each layer")
    words = _prefixed("f1_", _table(content, "description_f1", path))
    weights = content.get("weights")
    found = [Evaluation("F1 of the words in descriptions", words, {}, dataset, {"decoding": "greedy"}, weights=weights)]
    if content.get("pointing"):
        pointing = _prefixed("pointing_", _table(content, "pointing", path))
        chance = dict.fromkeys(next(iter(pointing.values())), content.get("chance_pointing"))
        chance = _table({CHANCE: {CHANCE: chance}}, CHANCE, path)[CHANCE]
        settings = {"tolerance": "half a cell", "carrier": "the", "phrases": content.get("pointing_phrases")}
        title = "Pointing game, words that one object of several has"
        found.append(Evaluation(title, pointing, {CHANCE: chance}, dataset, settings, weights=weights))
    return found


def _prefixed(prefix: str, table: Table) -> Table:
    return {row: {f"{prefix}{metric}": value for metric, value in values.items()} for row, values in table.items()}


__all__ = [
    "CHANCE",
    "CONTROLS",
    "ControlVerdict",
    "Evaluation",
    "check_measured",
    "judge_controls",
    "metric_name",
    "read_evaluations",
]
