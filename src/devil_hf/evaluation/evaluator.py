"""The contract of every evaluation, and the one driver that runs them: rows -> score -> `Evaluation`.

An evaluator says which rows there are (`open`), what decides them (`decides`), how a batch of them is made with the model
(`rows`) and what they add up to (`score`). The driver (`evaluate`) loads the model, records rows as they come so that a stopped
run goes on, shares them among processes, shows progress, hashes the weights once, and writes `scores.json` in the one layout of
`devil_hf.evaluation.results`. To add an evaluator, write a file in this folder, or a module that an installed package names
under the entry point group `devil_hf.plugins`; `devil evaluate length CHECKPOINT photos` is then there by itself:

```python
@dataclass(kw_only=True)
class LengthSettings(EvaluationSettings):
    images: Path = option("folder of images", positional=True)

@EVALUATORS.register("length")
class Length(Evaluator):
    name, summary = "length", "count the words that the model says"
    example, Settings = "devil evaluate length CHECKPOINT photos", LengthSettings

    def open(self):  # before any model is loaded
        return sorted(str(file) for file in self.settings.images.iterdir())[: self.settings.limit]

    def rows(self, keys):
        pixels = self.processor(images=keys, return_tensors="pt").to(self.model.device)
        ids = self.model.generate(**pixels)
        return [len(text.split()) for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def score(self, rows):
        return Evaluation("Words", {"all": {"words": fmean(rows.values())}}, dataset={"name": str(self.settings.images)})
```
"""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from tqdm.auto import tqdm

from devil_hf.checkpoints import SHAPES
from devil_hf.checkpoints.identity import known_by
from devil_hf.evaluation.records import Records
from devil_hf.evaluation.results import CONTROLS, Evaluation
from devil_hf.evaluation.tables import table
from devil_hf.extras import needs
from devil_hf.folders import claimed
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.registry import Registry
from devil_hf.settings import JsonSettings, checked, option
from devil_hf.text_files import read_json

EVALUATORS: Registry[type["Evaluator"]] = Registry("evaluator", "devil_hf.evaluation")
# Pictures of results, by the name of the evaluator, are drawn by a room above this one.
FIGURES: Registry[Callable[["Evaluator", Evaluation], None]] = Registry("figure of results", "devil_hf.report")
SCORES_FILE = "scores.json"
END = "end"  # key of the record that says how many rows a stream had


@dataclass(kw_only=True)
class EvaluationSettings(JsonSettings):
    """What every evaluator can be told."""

    checkpoint: str | None = option("directory, Hub id, or name of a shipped one", SHAPES, positional=True)
    limit: int | None = option("only this many images from the beginning", None)
    batch_size: int = option("images at once, per process", 32)
    seed: int = option("of whatever is drawn", 0)
    output_dir: Path = option("rows, where a stopped run goes on, and scores.json", Path("devil-evaluation"))
    device: str | None = option("default: cuda where there is one", None)
    quantize: Literal["int8"] | None = option("answers that are faster on a CPU, and not exact", None)

    def validate(self) -> None:
        """Raise a ValueError for what can be seen to be wrong before anything is opened."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} must be at least 1, or not given")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


class Evaluator(ABC):
    """One evaluation, see the module's docstring.

    Attributes:
        name, summary, example: as `devil evaluate --help` shows them.
        verb: whose subject it is.
        Settings: its options.
        records_file: where in the output folder its rows are kept.
        parallel: whether several processes may share its rows.
        unit: what a row is about, for the progress bar.
        model, processor: there from `prepare` on.
        known: what the model and its processor are known by (`known_by`); on the main process only.
        records: rows by key that are known so far; on the main process only.
        total: how many rows there will be, where `open` returns an iterator and it is known.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    example: ClassVar[str]
    verb: ClassVar[str] = "evaluate"
    Settings: ClassVar[type[EvaluationSettings]] = EvaluationSettings
    records_file: ClassVar[str] = "records.jsonl"
    parallel: ClassVar[bool] = True
    unit: ClassVar[str] = "image"

    model: DevilModel
    processor: DevilProcessor

    def __init__(self, settings: Any):
        self.settings = settings
        self.known: dict[str, Any] = {}
        self.records: Mapping[str, Any] = {}
        self.total: int | None = None

    @abstractmethod
    def open(self) -> Iterable[str]:
        """Open the data, before any model is loaded; the keys of all rows, in their order.

        An iterator is read as rows are made, so it may depend on the model and on `records`; of a stream whose length nobody
        knows it may be endless.
        """

    def prepare(self) -> None:  # noqa: B027
        """What needs the model and comes before the first row; weights may still change here."""

    def decides(self) -> dict[str, Any]:
        """What decides the rows besides model and processor, as JSON: a folder with rows of another decision is refused."""
        return {}

    def identity(self, key: str) -> str | None:
        """Hash of what a row is of, such as its image: a recorded row of another one is made anew. None where its key says it.

        Also asked of `END`: what decides how many rows a stream has. Where the data are not there any more (an OSError), rows
        that are recorded are taken as they are.
        """
        return None

    def group(self, key: str) -> str:
        """Rows of different groups are never made in one batch."""
        return ""

    @abstractmethod
    def rows(self, keys: Sequence[str]) -> list[Any]:
        """The rows of a batch, as JSON, in the order of their keys; fewer where the data end before."""

    @abstractmethod
    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """What the rows by key add up to; the driver fills in the weights."""

    def close(self) -> None:  # noqa: B027
        """Undo what `rows` did to the model; called whatever happens."""

    def text(self, evaluation: Evaluation) -> str:
        """The result for people."""
        return table(evaluation.scores | evaluation.controls, evaluation.metrics, names=CONTROLS)

    def exit_code(self, evaluation: Evaluation) -> int:
        """0 unless the result itself is a verdict."""
        return 0


def evaluate(
    evaluator: type[Evaluator] | str,
    settings: Any = None,
    model: DevilModel | None = None,
    processor: DevilProcessor | None = None,
) -> Evaluation | None:
    """Run an evaluation.

    Args:
        evaluator: the class, or its name in `EVALUATORS`.
        settings: of its class `Settings`; by default all defaults.
        model, processor: instead of loading `settings.checkpoint`.

    Returns:
        The result, as `settings.output_dir` has it in `scores.json`; `text` and `exit_code` are for the command line. On
        processes other than the main one, None.

    Raises:
        ValueError: for settings, data or layers that are not there, and when the folder holds rows of another decision, or
            scores of another evaluator.
        FolderInUse: when another run works in the output folder.
    """
    needs("accelerate", "evaluate")
    from accelerate import PartialState

    kind = EVALUATORS[evaluator] if isinstance(evaluator, str) else evaluator
    run = kind(checked(kind.Settings() if settings is None else settings))
    state = PartialState(cpu=run.settings.device == "cpu" or run.settings.quantize is not None)
    if state.num_processes > 1 and not kind.parallel:
        raise ValueError(f"the evaluation {kind.name!r} cannot be shared: run it on one process")
    keys = run.open()  # before anything is written
    with claimed(run.settings.output_dir, f"devil {kind.verb} {kind.name}", state.is_main_process):
        _check_scores(run)
        return _evaluate(run, keys, model, processor, state)


def _evaluate(
    run: Evaluator, keys: Iterable[str], model: DevilModel | None, processor: DevilProcessor | None, state: Any
) -> Evaluation | None:
    run.model, run.processor = _load(run.settings, state) if model is None else (model, cast(DevilProcessor, processor))
    if state.num_processes > 1:
        run.model.to(state.device)
    run.prepare()
    folder, records = Path(run.settings.output_dir), None
    if state.is_main_process:
        run.known = known_by(run.model, run.processor)
        records = Records(folder / run.records_file, run.known | run.decides())
        run.records = records.rows
    try:
        found = _collect(run, keys, records, state)
    finally:
        run.close()
    if records is None:
        return None
    evaluation = run.score({key: records[key] for key in found})
    evaluation.weights = run.known["weights"]
    evaluation.details["evaluator"] = run.name
    evaluation.write(folder / SCORES_FILE)
    if run.name in FIGURES:
        FIGURES[run.name](run, evaluation)
    evaluation.text = "\n".join([run.text(evaluation), *evaluation.reasons])
    evaluation.exit_code = run.exit_code(evaluation)
    return evaluation


def _check_scores(run: Evaluator) -> None:
    """Raise a ValueError for scores of another evaluator, which these would take the place of."""
    file = Path(run.settings.output_dir) / SCORES_FILE
    if file.is_file():
        found = read_json(file)
        other = found.get("evaluator", run.name) if isinstance(found, dict) else run.name
        if other != run.name:
            raise ValueError(f"{file} has the scores of the evaluation {other!r}: give another output folder, or remove it")


def run_and_print(name: str, settings: Any) -> int:
    """Run an evaluator as `devil evaluate NAME` does: the result on standard output; the exit code."""
    evaluation = evaluate(name, settings)
    if evaluation is None:
        return 0
    print(json.dumps(evaluation.as_record()) if settings.json else evaluation.text)
    print(f"scores: {settings.output_dir}", file=sys.stderr)
    return evaluation.exit_code


def _load(settings: EvaluationSettings, state: Any) -> tuple[DevilModel, DevilProcessor]:
    from devil_hf.checkpoints import loading

    read = loading.open_checkpoint if state.is_main_process else loading.load  # one of them says what it knows
    return read(settings.checkpoint, settings.device, quantize=settings.quantize)


def _collect(run: Evaluator, keys: Iterable[str], records: Records | None, state: Any) -> list[str]:
    """Make and record the rows that are missing, each process its part of every batch; the keys of all rows."""
    from accelerate.utils import broadcast_object_list, gather_object

    shared: list[Any] = [{}, None]
    if records is not None:
        ended = END in records and records.identities[END] == _identity(run, END, records.identities)
        shared = [records.identities, records[END] if ended else None]
    if state.num_processes > 1:
        broadcast_object_list(shared)
    identities, end = shared
    total = len(keys) if isinstance(keys, Sequence) else run.total
    total = total if end is None else min(end, total or end)
    found: list[str] = []
    with tqdm(total=total, desc=run.name, unit=run.unit, disable=not state.is_main_process) as bar:
        for batch in _batches(islice(keys, end), run.settings.batch_size * state.num_processes, run):
            now = {key: _identity(run, key, identities) for key in batch}
            todo = [key for key in batch if key not in identities or identities[key] != now[key]]
            mine = todo[state.process_index :: state.num_processes]
            pairs = list(zip(mine, run.rows(mine) if mine else [], strict=False))
            made = dict(gather_object(pairs) if state.num_processes > 1 and todo else pairs)
            if records is not None:
                for key in todo:
                    if key in made:
                        records.add(key, made[key], now[key])
            found += [key for key in batch if key not in todo or key in made]
            bar.update(len(batch))
            if len(made) < len(todo):  # a stream has ended
                if records is not None:
                    records.add(END, len(found), run.identity(END))
                break
    return found


def _identity(run: Evaluator, key: str, recorded: Mapping[str, str | None]) -> str | None:
    try:
        return run.identity(key)
    except OSError:
        return recorded.get(key)


def _batches(keys: Iterable[str], size: int, run: Evaluator) -> Iterator[list[str]]:
    for _, group in groupby(keys, run.group):
        while batch := list(islice(group, size)):
            yield batch


__all__ = ["EVALUATORS", "FIGURES", "EvaluationSettings", "Evaluator", "evaluate", "run_and_print"]
