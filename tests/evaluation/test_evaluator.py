"""The contract of evaluations: one class is an evaluation with records, streams, weights and the one layout of results."""

import copy
import json
import os
import socket
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from devil_hf.checkpoints.identity import fingerprint
from devil_hf.cli.main import main
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator, evaluate
from devil_hf.evaluation.results import Evaluation, read_evaluations
from devil_hf.evaluation.tables import SIGNED, table, with_interval
from devil_hf.folders import CLAIM, FolderInUse
from devil_hf.report.neurons import NeuronsSettings, neurons
from devil_hf.settings import option


@dataclass(kw_only=True)
class LengthSettings(EvaluationSettings):
    words: list[str] = option("texts to measure", ["a", "bb", "ccc", "dddd", "ee"])


class Length(Evaluator):
    """Counts letters; nothing of it needs a model."""

    name, summary, example, Settings = "length", "count letters", "devil evaluate length", LengthSettings
    asked: list[str] = []

    def open(self):
        return [f"{at} {word}" for at, word in enumerate(self.settings.words)][: self.settings.limit]

    def decides(self):
        return {"words": self.settings.words, "layers": self.model.layer_names}

    def rows(self, keys):
        self.asked.extend(keys)
        return [len(key.split()[1]) for key in keys]

    def score(self, rows):
        return Evaluation("Letters", {"all": {"letters": sum(rows.values()) / len(rows)}})


class Stream(Length):
    """The same where nobody knows how many texts there are."""

    def open(self):
        return map(str, count())

    def rows(self, keys):
        self.asked.extend(keys)
        return [len(self.settings.words[int(key)]) for key in keys if int(key) < len(self.settings.words)]


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setattr(Length, "asked", [])
    return Length.asked


@pytest.mark.parametrize("kind", [Length, Stream])
def test_rows_are_made_once_and_results_have_the_one_layout(kind, model, processor, tmp_path, monkeypatch):
    settings = LengthSettings(output_dir=tmp_path, batch_size=2)
    result = evaluate(kind, settings, model, processor)
    assert result.scores == {"all": {"letters": 12 / 5}} and result.weights == fingerprint(model)
    assert read_evaluations(tmp_path / "scores.json") == [result]
    assert json.loads((tmp_path / "scores.json").read_text()) == result.as_record() and "letters" in result.text
    assert len(kind.asked) == 5 + (kind is Stream)  # the end is found out by asking
    kind.asked.clear()
    assert evaluate(kind, settings, model, processor) == result and not kind.asked
    with pytest.raises(ValueError, match=r"words.*another output folder"):
        evaluate(kind, LengthSettings(output_dir=tmp_path, words=["a"]), model, processor)


def test_a_stopped_run_and_a_larger_limit_go_on(model, processor, tmp_path, asked):
    few = evaluate(Length, LengthSettings(output_dir=tmp_path, limit=2), model, processor)
    assert few.scores["all"]["letters"] == 1.5
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"key": "2 ccc", "ro')  # killed while writing
    asked.clear()
    assert evaluate(Length, LengthSettings(output_dir=tmp_path), model, processor).scores["all"]["letters"] == 12 / 5
    assert asked == ["2 ccc", "3 dddd", "4 ee"]


def test_rows_of_another_preprocessing_are_refused(model, processor, tmp_path, asked):
    evaluate(Length, LengthSettings(output_dir=tmp_path, limit=2), model, processor)
    changed = copy.deepcopy(processor)
    changed.image_processor.image_std = [0.2, 0.3, 0.25]
    with pytest.raises(ValueError, match=r"made with .'reading': .'images': .'image_std': .*, not .*another output folder"):
        evaluate(Length, LengthSettings(output_dir=tmp_path), model, changed)
    file, old = tmp_path / "records.jsonl", (tmp_path / "records.jsonl").read_text().splitlines()
    begin = json.loads(old[0])
    del begin["settings"]["reading"]  # as older versions wrote it
    file.write_text("\n".join([json.dumps(begin), *old[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"made with .'reading': None., not"):
        evaluate(Length, LengthSettings(output_dir=tmp_path), model, processor)
    assert len(asked) == 2


def test_scores_of_another_evaluator_are_not_written_over(model, processor, tmp_path, asked):
    class Other(Length):
        name, records_file = "other", "other.jsonl"

    evaluate(Length, LengthSettings(output_dir=tmp_path), model, processor)
    before = (tmp_path / "scores.json").read_bytes()
    asked.clear()
    with pytest.raises(ValueError, match=r"scores\.json has the scores of the evaluation 'length': give another output folder"):
        evaluate(Other, LengthSettings(output_dir=tmp_path), model, processor)
    assert (tmp_path / "scores.json").read_bytes() == before and not asked
    (tmp_path / "records.jsonl").unlink()
    evaluate(Length, LengthSettings(output_dir=tmp_path), model, processor)  # its own are made again


def test_the_weights_are_hashed_once(model, processor, tmp_path, monkeypatch):
    hashed = []

    def counted(model, processor):
        hashed.append(model)
        return {"weights": "0" * 64}

    monkeypatch.setattr("devil_hf.evaluation.evaluator.known_by", counted)
    evaluate(Length, LengthSettings(output_dir=tmp_path), model, processor)
    assert len(hashed) == 1


def test_what_was_changed_is_put_back_when_rows_fail(model, processor, tmp_path):
    class Failing(Length):
        closed = 0

        def rows(self, keys):
            raise RuntimeError("no rows")

        def close(self):
            type(self).closed += 1

    with pytest.raises(RuntimeError, match="no rows"):
        evaluate(Failing, LengthSettings(output_dir=tmp_path), model, processor)
    assert Failing.closed == 1


def test_an_evaluator_that_registers_itself_is_a_subject_of_the_command(model, processor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EVALUATORS, "_entries", dict(EVALUATORS))
    EVALUATORS.register("length", Length)
    monkeypatch.setattr("devil_hf.checkpoints.loading.open_checkpoint", lambda *arguments, **options: (model, processor))
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "count letters" in capsys.readouterr().out
    assert main(["evaluate", "length", "--words", "a", "bbb", "--output-dir", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"] == {"all": {"letters": 2.0}}
    assert main(["evaluate", "length", "--limit", "0"]) == 1 and "--limit 0" in capsys.readouterr().err


class Files(Length):
    """Counts the letters of files, which may change; of a stream of them where none is named."""

    def open(self):
        return list(self.settings.words)

    def identity(self, key):
        return Path(key).read_text()

    def rows(self, keys):
        self.asked.extend(Path(key).name for key in keys)
        return [len(Path(key).read_text()) for key in keys]


def test_rows_of_files_that_changed_are_made_anew(model, processor, tmp_path, asked):
    for name in "abc":
        (tmp_path / name).write_text(name)
    settings = LengthSettings(output_dir=tmp_path / "out", words=[str(tmp_path / name) for name in "abc"])
    evaluate(Files, settings, model, processor)
    (tmp_path / "b").write_text("longer")
    asked.clear()
    assert evaluate(Files, settings, model, processor).scores["all"]["letters"] == 8 / 3
    assert asked == ["b"]


def test_two_evaluations_in_one_folder_are_not_mixed(model, processor, tmp_path, monkeypatch):
    settings = LengthSettings(output_dir=tmp_path)
    claim = {"pid": os.getppid(), "host": socket.gethostname(), "work": "devil evaluate maps", "since": "now"}
    (tmp_path / CLAIM).write_text(json.dumps(claim))
    with pytest.raises(FolderInUse, match="devil evaluate maps since now"):
        evaluate(Length, settings, model, processor)
    (tmp_path / CLAIM).unlink()
    evaluate(Length, settings, model, processor)
    assert not (tmp_path / CLAIM).exists()


def test_an_interval_without_width_is_not_shown():
    rows, spans = {"all": {"auroc": 1.0, "cider": 0.5}}, {"all": {"auroc": (1.0, 1.0), "cider": (0.4, 0.6)}}
    assert table(rows, ["auroc", "cider"], intervals=spans).splitlines()[1].split() == [
        "all",
        "1.000",
        "0.500",
        "[0.400,",
        "0.600]",
    ]
    assert with_interval(0.25, (0.25, 0.25), SIGNED) == "+0.250" and with_interval(0.25, None) == "0.250"


def test_processes_that_share_rounded_weights_are_on_cpus(monkeypatch, tmp_path):
    def ask(cpu):
        raise FileExistsError(f"cpu={cpu}")

    monkeypatch.setattr("accelerate.PartialState", ask)
    monkeypatch.setattr("devil_hf.report.neurons.PartialState", ask)
    for quantize, cpu in (("int8", True), (None, False)):
        with pytest.raises(FileExistsError, match=f"cpu={cpu}"):
            evaluate(Length, LengthSettings(output_dir=tmp_path, quantize=quantize))
        with pytest.raises(FileExistsError, match=f"cpu={cpu}"):
            neurons(NeuronsSettings(output_dir=tmp_path, quantize=quantize))
