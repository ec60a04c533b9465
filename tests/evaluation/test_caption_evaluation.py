"""`devil evaluate captions`: every image by every layer, controls without any image, nothing lost when it is stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from devil_hf.cli.main import main
from devil_hf.evaluation.captions import CaptionsSettings, score_descriptions
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.results import read_evaluations

REFERENCES = [
    ["a red dog on grass"],
    ["two cats sit on a wall"],
    ["a blue circle left of a square"],
    ["the sea at night"],
]
OPTIONS = {"batch_size": 2, "max_new_tokens": 4, "metrics": ["bleu", "rouge_l", "cider"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("captions")
    rows = []
    for number in range(7):
        images[number % 3].rotate(40 * number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": REFERENCES[number % 4] + ["a dog"], "split": "val"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, processor):
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def captions(model, processor, source, output, **changes):
    """What the evaluation writes down."""
    settings = CaptionsSettings(checkpoint="none", source=str(source), output_dir=output, **(OPTIONS | changes))
    return evaluate("captions", settings, model, processor).as_record()


@pytest.fixture(scope="module")
def whole(model, processor, folder, tmp_path_factory):
    """A pass that was not stopped."""
    output = tmp_path_factory.mktemp("whole")
    return output, captions(model, processor, folder, output)


def _predictions(output):
    return {row["key"]: row["row"] for row in map(json.loads, (output / "predictions.jsonl").read_text().splitlines()[1:])}


def test_every_image_is_described_by_every_layer_in_order(model, processor, images, whole):
    output, content = whole
    rows = _predictions(output)
    assert rows.pop("end") == 7 and list(rows) == [str(number) for number in range(7)]
    assert rows["2"]["references"] == [*REFERENCES[2], "a dog"] and rows["2"]["image"] == "2.png"
    inputs = processor(images=images[0], return_tensors="pt")
    expected = processor.batch_decode(model.generate(**inputs, layers=-1, max_new_tokens=4), skip_special_tokens=True)
    assert rows["0"]["descriptions"][model.layer_names[-1]] == expected[0].strip()
    assert list(content["scores"]) == ["all", *model.layer_names] and set(content["controls"]) == {
        "shuffled",
        "constant",
    }


def test_results_are_read_for_model_cards(model, whole):
    output, content = whole
    (evaluation,) = read_evaluations(output / "scores.json")
    assert evaluation.scores == content["scores"] and set(evaluation.controls) == {"shuffled", "constant"}
    assert evaluation.dataset["size"] == 7 and evaluation.settings["max_new_tokens"] == 4
    metrics = content["model-index"][0]["results"][0]["metrics"]
    assert {"bleu_4", "cider", "rouge_l"} <= {
        metric["type"] for result in content["model-index"][0]["results"] for metric in result["metrics"]
    } and metrics[0]["value"] == content["scores"]["all"]["bleu_1"]


def gone(*args, **kwargs):
    raise FileNotFoundError("the folder was removed")


def test_a_later_metric_needs_no_inference_and_no_data(model, processor, folder, whole, monkeypatch):
    output, content = whole
    monkeypatch.setattr(type(model), "describe", None)
    monkeypatch.setattr("devil_hf.evaluation.captions.open_pairs", gone)
    again = captions(model, processor, folder, output, metrics=["rouge_l"])
    assert again["scores"]["all"] == {"rouge_l": content["scores"]["all"]["rouge_l"]}
    fewer = captions(model, processor, folder, output, limit=3)
    assert fewer["dataset"]["size"] == 3


def test_another_question_does_not_mix_with_recorded_answers(model, processor, folder, whole):
    with pytest.raises(ValueError, match=r"max_new_tokens.*another output folder"):
        captions(model, processor, folder, whole[0], max_new_tokens=5)


SCRIPT = """
import os
import signal
import sys

from accelerate import PartialState

from devil_hf import DevilModel
from devil_hf.checkpoints.loading import load
from devil_hf.evaluation.captions import CaptionsSettings
from devil_hf.evaluation.evaluator import evaluate

checkpoint, folder, output, kill_at, processes = sys.argv[1:]
assert PartialState(cpu=True).num_processes == int(processes)
model, processor = load(checkpoint, "cpu")
describe, calls = DevilModel.describe, []


def describe_or_die(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return describe(self, *args, **kwargs)


type(model).describe = describe_or_die
metrics = ["bleu", "rouge_l", "cider"]
settings = CaptionsSettings(
    checkpoint=checkpoint, source=folder, output_dir=output, batch_size=2, max_new_tokens=4, metrics=metrics
)
evaluate("captions", settings, model, processor)
"""


def test_a_killed_pass_goes_on_and_two_processes_say_what_one_says(checkpoint, folder, whole, tmp_path):
    root = Path(__file__).parents[2]
    script, output = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), environment.get("PYTHONPATH", "")])
    arguments = [str(script), str(checkpoint), str(folder), str(output)]
    killed = subprocess.run([sys.executable, *arguments, "2", "1"], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list(_predictions(output)) == ["0", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    subprocess.run([*launch, *arguments, "0", "2"], check=True, env=environment)
    assert _predictions(output) == _predictions(whole[0])
    found = json.loads((output / "scores.json").read_text())
    assert found["scores"] == whole[1]["scores"] and found["controls"] == whole[1]["controls"]


def test_a_pair_that_cannot_be_used_is_left_out_and_counted(model, processor, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1.png").write_bytes(b"no picture")
    content = captions(model, processor, tmp_path, tmp_path / "out", limit=3)
    assert content["dataset"]["size"] == 2 and content["settings"]["left_out"] == 1


def test_right_descriptions_beat_their_own_shuffle_and_any_constant():
    content = score_descriptions({"all": [texts[0] for texts in REFERENCES]}, REFERENCES)
    scores, controls = content["scores"], content["controls"]
    assert scores["all"]["bleu_4"] == pytest.approx(1.0)
    assert controls["shuffled"]["cider"] < 0.5 * scores["all"]["cider"]
    assert controls["constant"]["cider"] < 0.5 * scores["all"]["cider"]
    assert content["texts"]["constant"] in REFERENCES_FLAT


REFERENCES_FLAT = {texts[0] for texts in REFERENCES}


def test_the_command_prints_a_table_and_refuses_what_is_wrong_before_work(checkpoint, tmp_path, capsys):
    sources = tmp_path / "sources.yaml"
    sources.write_text(yaml.safe_dump([{"kind": "shapes", "size": 3, "seed": 1}]))
    command = ["evaluate", "captions", str(checkpoint), str(sources), "--output-dir", str(tmp_path / "out")]
    options = ["--metrics", "bleu", "cider", "--max-new-tokens", "4", "--device", "cpu"]
    assert main([*command, *options]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr"]
    assert table[1].split()[0] == "all" and table[-1].startswith("one constant description")
    for wrong, message in (
        ([*command, "--metrics", "blue"], "unknown metrics"),
        (["evaluate", "captions", "nowhere", "no/where/at-all"], "neither a caption folder"),
        (["evaluate", "captions", "nowhere", "shapes:many"], "shapes:COUNT"),
        ([*command, "--split", "val"], "split"),
        ([*command, *options, "--limit", "0"], "--limit 0"),
        ([*command, *options, "--batch-size", "0"], "batch_size=0"),
    ):
        assert main(wrong) == 1
        assert message in capsys.readouterr().err
