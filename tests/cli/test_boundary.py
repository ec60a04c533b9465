"""Whatever a user, his files, his disk and the network can cause is one line; a fault of ours keeps its traceback."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

from devil_hf.checkpoints import locate
from devil_hf.cli.main import LONGEST_LINE, bounded, main
from devil_hf.cli.verb import VERBS, Verb
from devil_hf.extras import MissingExtraError
from devil_hf.settings import JsonSettings
from devil_hf.training.divergence import Diverged


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_bytes(b"\x93NUMPY and so on")
    (tmp_path / "bad.yaml").write_text("train_data: [1,\n b: {", encoding="utf-8")
    (tmp_path / "typo.yaml").write_text("max_step: 3\n", encoding="utf-8")
    (tmp_path / "coco.json").write_text(
        json.dumps({"images": [], "annotations": [{"image_id": 9, "caption": "x"}]}), encoding="utf-8"
    )
    (tmp_path / "latin.yaml").write_bytes("backbone: r\u00e9seau".encode("latin-1"))
    return tmp_path


COCO = json.dumps([{"kind": "coco", "annotations": "coco.json", "images": "."}])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("describe a.png --num-beams 0", "num_beams=0 must be at least 1"),
        ("describe a.png --max-new-tokens -1", "max_new_tokens=-1 must be at least 1"),
        ("describe a.png --window 3", "--window 3 is the side of a square around places: name them"),
        ("describe a.png --locations all --window 2", "--window 2 must be odd"),
        ("describe a.png --locations 1,x", "not ROW,COLUMN"),
        ("describe a.png --output a.xyz", "no picture has the ending '.xyz'"),
        ("describe a.png --output no/such.png", "there is no folder no"),
        ("describe a.png --device cudda", "device='cudda' is not there"),
        ("describe http://127.0.0.1:9/a\u00a0b.png", "cannot read 'http://127.0.0.1:9/a"),
        ("describe none.png", "no such file"),
        ("describe dogs", "no such file, and not a URL or an image as base64 text: 'dogs'"),
        ("evaluate captions shapes shapes:2 --output-dir a.png", "a.png (a file is there): name another one"),
        ("evaluate captions shapes shapes:2 --output-dir a.png/b", "(a file is there): name another one"),
        ("evaluate regions shapes shapes:2 --images nowhere", "images='nowhere' is nothing that shapes:2"),
        ("evaluate maps shapes shapes:2 --names x", "names='x' is nothing that shapes:2"),
        ("evaluate maps shapes coco.json --names x", "names='x' is nothing that coco.json"),
        ("evaluate maps shapes shapes:2 --class-names x", "--class-names x are of the classifier that --gradcam asks"),
        ("evaluate emergence --split val", "--images, --names and --split are of labelled images, and shapes draws its own"),
        ("evaluate difference --attributes colour shape colour", "--attributes colour shape colour name one twice"),
        ("evaluate units shapes none.json shapes:30 --permutations 50", "permutations=50 must be at least 100"),
        ("evaluate units shapes none.json shapes:30 --alpha 1e-9", "alpha=1e-09 is a share of false discoveries"),
        ("neurons shapes:120 --permutations 50", "permutations=50 must be at least 100"),
        ("neurons shapes:120 --alpha 5", "alpha=5.0 is a share of false discoveries"),
        ("describe coco.json", "cannot read 'coco.json' as an image"),
        ("describe .", "cannot read '.' as an image"),
        ("attribute a.png red --refine 0.1", "refine=0.1 must be the share of places"),
        ("attribute a.png red --window 4", "--window 4 must be odd"),
        ("attribute a.png red --windows layer4=2", "LAYER=SIDE with an odd side"),
        ("attribute a.png red --windows layer9=3", "layer 'layer9' is not asked"),
        ("attribute a.png red --window 3 --windows layer4=3", "give one of them"),
        ("train --config bad.yaml", "bad.yaml:2 is no YAML"),
        ("train --config typo.yaml", "did you mean 'max_steps'"),
        ("train --config latin.yaml", "latin.yaml:1 is not UTF-8"),
        ("train --config none.yaml", "there is no file none.yaml"),
        ("evaluate captions shapes bad.yaml", "bad.yaml:2 is no YAML"),
        ("evaluate captions shapes .", "metadata"),
        ("neurons shapes:120 --quantile 1", "quantile=1.0 must lie between 0 and 1"),
        ("neurons shapes:0", "shapes:COUNT"),
        ("neurons shapes:120 --layers layer4 --directions empty.npy", "empty.npy"),
        ("neurons shapes:120 --layers layer4 --directions text.npy", "text.npy"),
        ("demo --port 0", "port=0 must be at least 1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(folder, capsys, words, named):
    assert main([word.replace("\u00a0", " ") for word in words.split(" ")]) == 1
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith(f"devil {words.split()[0]}")]
    assert len(lines) == 1 and named in lines[0].replace("\u00a0", " "), told
    assert "Traceback" not in told


def test_sources_that_lead_nowhere_are_one_line(folder, capsys):
    words = ["train", "--checkpoint", "shapes", "--report-to", "none", "--output-dir", "run", "--train-data", COCO]
    assert main(words) == 1
    assert "coco" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--often nan", "--often 1e400", "--often 9223372036854775808", "--often 1.5"])
def test_numbers_that_are_none_end_with_2(folder, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        main(["describe", "a.png", *words.replace("often", "num-beams").split()])
    assert "argument --num-beams: " in capsys.readouterr().err


def test_damaged_weights_are_one_line(folder, capsys):
    shutil.copytree(locate("shapes"), "damaged")
    weights = folder / "damaged" / "model.safetensors"
    content = weights.read_bytes()
    for damage in (content[: len(content) // 2], content[:5], b"", b"\xff" * 100):
        weights.write_bytes(damage)
        assert main(["describe", "a.png", "--checkpoint", "damaged"]) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("devil describe: ") and len(told) < 2 * LONGEST_LINE


def raising(error, verb="fail"):
    def fail(settings):
        raise error

    return Verb(verb, "fail", "devil fail", lambda: Failing, fail)


@dataclass(kw_only=True)
class Failing(JsonSettings):
    """Nothing to set."""


@pytest.fixture
def failing(monkeypatch):
    list(VERBS)
    monkeypatch.setattr(VERBS, "_entries", dict(VERBS._entries))
    return lambda error: VERBS._entries.update(fail=raising(error))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("first\n  second"), "devil fail: first second"),
        (OSError(28, "No space left on device", "runs/a.json"), "No space left on device: 'runs/a.json'"),
        (MemoryError(), "there is not enough memory"),
        (ValueError("x" * 10_000), "xxx ... (--debug shows the rest)"),
        (ValueError(), "devil fail: ValueError"),
        (TypeError("an image must be a picture"), "an image must be a picture"),
        (MissingExtraError("scipy is not installed, which this needs: pip install"), "scipy is not installed"),
        (Exception("a tokenizer cannot be read"), "a tokenizer cannot be read"),
    ],
)
def test_errors_of_the_world_are_a_line(failing, capsys, error, told):
    failing(error)
    assert main(["fail"]) == 1
    shown = capsys.readouterr().err
    assert told in shown and shown.count("\n") == 1 and len(shown) < LONGEST_LINE + 100
    with pytest.raises(type(error)):
        main(["fail", "--debug"])


@pytest.mark.parametrize(
    "error", [KeyError("a"), IndexError(), AttributeError("b"), ZeroDivisionError(), AssertionError(), RecursionError()]
)
def test_a_fault_of_ours_keeps_its_traceback_and_says_where_to_report_it(failing, error):
    failing(error)
    with pytest.raises(type(error)) as found:
        main(["fail"])
    assert "fault of devil-hf" in found.value.__notes__[0]


def unpack(settings):
    _first, _second = (1,)


WRONG = [
    lambda settings: 1 + None,
    lambda settings: int(""),
    lambda settings: [].index(1),
    lambda settings: list(zip([1], [], strict=True)),
    lambda settings: torch.cat([]),
    lambda settings: torch.ones(2) + torch.ones(3),
    lambda settings: torch.nn.functional.linear(torch.ones(2), torch.ones(3, 3)),
    lambda settings: torch.nn.Linear(3, 3)(torch.ones(2)),
    unpack,
]


@pytest.mark.parametrize("go_wrong", WRONG)
def test_a_call_that_goes_wrong_is_a_fault_of_ours(go_wrong, monkeypatch, failing):
    failing(None)
    monkeypatch.setattr("devil_hf.cli.main.PACKAGE", Path(__file__).parent)  # where the calls are
    VERBS._entries["fail"] = Verb("fail", "fail", "devil fail", lambda: Failing, go_wrong)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as found:
        main(["fail"])
    assert "fault of devil-hf" in found.value.__notes__[0]


@pytest.mark.parametrize(
    "go_wrong",
    [
        lambda settings: torch.load("empty.npy"),
        lambda settings: np.load("text.npy"),
        lambda settings: json.loads("{"),
        lambda settings: "\udc80".encode(),
        lambda settings: torch.nn.Linear(1 << 22, 1 << 30),
        lambda settings: torch.nn.Linear(2, 2).load_state_dict({"weight": torch.ones(3)}),
    ],
)
def test_what_files_and_the_machine_cause_is_not(go_wrong, monkeypatch, folder, failing, capsys):
    failing(None)
    monkeypatch.setattr("devil_hf.cli.main.PACKAGE", Path(__file__).parent)
    VERBS._entries["fail"] = Verb("fail", "fail", "devil fail", lambda: Failing, go_wrong)
    assert main(["fail"]) == 1
    assert capsys.readouterr().err.startswith("devil fail: ")


def test_interrupts_and_closed_pipes_have_the_codes_of_shells(failing, capsys):
    failing(KeyboardInterrupt())
    assert main(["fail"]) == 130
    assert "interrupted" in capsys.readouterr().err
    failing(BrokenPipeError(32, "Broken pipe"))
    assert main(["fail"]) == 141


def test_an_output_that_is_full_is_an_error():
    command = f"{sys.executable} -m devil_hf evaluate --help > /dev/full"
    run = subprocess.run(
        ["sh", "-c", command.replace("evaluate --help", "space user/name --dry-run --json")], capture_output=True
    )
    assert run.returncode == 1 and b"No space left" in run.stderr and b"Traceback" not in run.stderr


def test_a_progress_bar_does_not_have_the_last_word(capsys):
    bars = []

    def work():
        bars.append(tqdm(total=10))
        bars[0].update(3)
        raise ValueError("image 7 is absent")

    assert bounded("work.py", work) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "work.py: image 7 is absent" and bars[0].disable  # it is closed
    assert any("3/10" in line for line in told[:-1])


@pytest.mark.parametrize("name", ["prepare_language_model", "prepare_backbone", "build_embedded", "build_photos"])
def test_errors_of_scripts_end_as_those_of_verbs(name):
    code = (Path(__file__).parents[2] / "scripts" / f"{name}.py").read_text(encoding="utf-8")
    assert code.endswith(f'sys.exit(bounded("{name}.py", main))\n')


def test_a_training_that_diverged_is_one_line_of_a_script(capsys):
    def work():
        raise Diverged("the training has diverged: the loss is nan at step 3. Lower the learning rate.")

    assert bounded("prepare_language_model.py", work) == 1
    assert capsys.readouterr().err == (
        "prepare_language_model.py: the training has diverged: the loss is nan at step 3. Lower the learning rate.\n"
    )
