"""What is refused before anything is sent, and the command that publishes."""

import copy
import json
import re
import shutil
import sys
import traceback

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

import devil_hf.hub.publish
from devil_hf import DevilModel
from devil_hf.checkpoints.identity import fingerprint
from devil_hf.cli.main import main
from devil_hf.hub.checks import check_code, check_weights
from devil_hf.hub.contents import copy_checkpoint, is_outdated
from devil_hf.hub.publish import prepare, push
from devil_hf.questions.choices import ALL, Calibration, Scale, part_hashes
from tests.hub.conftest import SCORES, without_check_of_code


def broken_copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "broken")


def test_weights_must_be_there_complete_and_finite(checkpoint, tmp_path):
    folder = broken_copy(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["translator.queries"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"translator\.queries holds 1 NaN"):
        prepare(folder, "tester/broken", tmp_path / "out")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="incomplete"):
        check_weights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        prepare(folder, "tester/broken", tmp_path / "out")


def test_code_that_needs_the_package_is_refused(checkpoint, tmp_path):
    folder = broken_copy(checkpoint, tmp_path)
    file = folder / "outputs_devil.py"
    file.write_text("import devil_hf.checkpoints.loading\n" + file.read_text())
    with pytest.raises(ValueError, match=r"^outputs_devil\.py .* alone.*devil_hf"):
        prepare(folder, "tester/broken", tmp_path / "out")
    for path in folder.glob("*.py"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no code"):
        check_code(folder)


def test_a_slim_checkpoint_of_local_parts_is_refused(checkpoint, sources, tmp_path):
    with pytest.raises(ValueError, match=r"backbone comes from .*self-contained"):
        prepare(checkpoint, "tester/slim", tmp_path, slim=True)


def test_a_calibration_goes_along_and_one_of_other_weights_is_refused(checkpoint, model, tmp_path):
    folder = broken_copy(checkpoint, tmp_path)
    Calibration({ALL: Scale(0.5)}, 4, "tests", 9, **part_hashes(model)).write(folder / "calibration.json")
    with without_check_of_code():
        tree = prepare(folder, "tester/asked", tmp_path / "out").tree()
        assert "calibration.json" in tree and Calibration.beside(tmp_path / "out").questions == 9
        assert is_outdated("calibration.json"), "that of an earlier push goes with its weights"
        Calibration({ALL: Scale(0.5)}, 4, "tests", 9, **part_hashes(model) | {"translator": "0"}).write(
            folder / "calibration.json"
        )
        with pytest.raises(ValueError, match="the calibration is of another translator"):
            prepare(folder, "tester/asked", tmp_path / "again")


def test_a_link_out_of_the_checkpoint_is_refused_and_one_into_its_cache_is_followed(checkpoint, tmp_path):
    (tmp_path / "secret.txt").write_text("private")
    folder = broken_copy(checkpoint, tmp_path)
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"notes\.txt is a link to .*secret\.txt.*outside"):
        copy_checkpoint(folder, tmp_path / "out")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    copy_checkpoint(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_no_token_is_in_an_error(hub):
    token = f"hf_{'sec' + 'ret'}\nword"  # lines of this file are in the traceback
    with pytest.raises(OSError, match="hf auth login") as caught:
        push("nowhere", "tester/devil", token=token)
    said = "".join(traceback.format_exception(caught.value))
    assert "secret" not in said and "***" in said


def test_a_folder_with_other_files_is_refused(checkpoint, tmp_path):
    (tmp_path / "diary.txt").write_text("private")
    with pytest.raises(ValueError, match="not empty"):
        prepare(checkpoint, "tester/devil", tmp_path)


def test_a_model_without_a_processor_is_refused(model, tmp_path):
    nameless = copy.copy(model)
    nameless.name_or_path = ""
    with pytest.raises(ValueError, match="processor="):
        prepare(nameless, "tester/devil", tmp_path)


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """A cache of remote code of this test alone: what other tests imported is not found in its stead."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != dynamic_module_utils.HF_MODULES_CACHE])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_a_model_of_its_repositorys_own_code_can_be_published(checkpoint, unchecked, tmp_path, modules_cache):
    own = dynamic_module_utils.get_class_from_dynamic_module("companions_devil.DevilModel", str(checkpoint))
    assert not issubclass(own, DevilModel)
    draft = prepare(own.from_pretrained(checkpoint), "tester/own", tmp_path / "out")
    assert {"model.safetensors", "modeling_devil.py", "processor_config.json", "README.md"} <= draft.tree().keys()


def test_code_of_the_other_kind_does_not_come_along(slim_model, processor, unchecked, tmp_path):
    slim_model.save_pretrained(tmp_path / "slim", slim=True)
    processor.save_pretrained(tmp_path / "slim")
    assert (tmp_path / "slim" / "slim_devil.py").exists()
    files = prepare(tmp_path / "slim", "tester/full", tmp_path / "full", slim=False).tree()
    assert {"modeling_devil.py", "processing_devil.py", "image_processing_devil.py"} <= files.keys()
    assert "timm_devil.py" in files and "slim_devil.py" not in files


def test_scores_of_other_weights_are_not_published(model, processor, checkpoint, unchecked, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(SCORES | {"weights": fingerprint(model)}))
    (tmp_path / "other.json").write_text(json.dumps([SCORES, SCORES | {"weights": "0" * 64}]))
    half = copy.deepcopy(model).half()
    assert fingerprint(half.float()) != fingerprint(model)  # rounding is a change
    prepare(checkpoint, "tester/devil", tmp_path / "own", scores=[tmp_path / "own.json"])
    full = tmp_path / "half"
    half.half().save_pretrained(full)
    processor.save_pretrained(full)
    (tmp_path / "half.json").write_text(json.dumps(SCORES | {"weights": fingerprint(half)}))
    prepare(full, "tester/devil", tmp_path / "published", scores=[tmp_path / "half.json"])
    with pytest.raises(ValueError, match=f"other weights .00000000. than these .{fingerprint(model):.8}"):
        prepare(checkpoint, "tester/devil", tmp_path / "refused", scores=[tmp_path / "other.json"])
    # A verdict says nothing of the same translator before another language model.
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.language_model.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match="other weights"):
        prepare(other, "tester/devil", tmp_path / "tuned", processor=processor, scores=[tmp_path / "own.json"])


def test_scores_of_a_slim_checkpoint_in_half_precision_are_published(slim_model, processor, unchecked, tmp_path):
    folder = tmp_path / "slim"
    copy.deepcopy(slim_model).half().save_pretrained(folder, slim=True)
    processor.save_pretrained(folder)
    measured = DevilModel.from_pretrained(folder, dtype=torch.float32)  # as evaluations load it
    (tmp_path / "scores.json").write_text(json.dumps(SCORES | {"weights": fingerprint(measured)}))
    draft = prepare(folder, "tester/devil", tmp_path / "draft", scores=[tmp_path / "scores.json"])
    assert "Captions" in str(draft.card)


def test_pushing_without_a_login_stops_before_any_work(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(devil_hf.hub.publish, "prepare", None)
    with pytest.raises(OSError, match="hf auth login"):
        push(checkpoint, "tester/nobody", token="hf_wrong")
    with pytest.raises(ValueError, match="USER/REPO"):
        push(checkpoint, "nobody")
    assert ("model", "tester/nobody") not in hub.repositories


def test_a_dry_run_shows_files_and_card_and_sends_nothing(hub, checkpoint, unchecked, capsys, tmp_path):
    asked = len(hub.requests)
    (tmp_path / "captions.json").write_text(json.dumps(SCORES))
    scores = ["--scores", str(tmp_path / "captions.json")]
    assert main(["push", str(checkpoint), "tester/dry", "--dry-run", *scores]) == 0
    output, notes = capsys.readouterr()
    assert re.search(r"^ +[\d,]+  model\.safetensors$", output, re.MULTILINE) and "# dry" in output
    assert "--license" in notes and "--scores" not in notes
    folder = tmp_path / "kept"
    assert main(["push", str(checkpoint), "tester/dry", "--dry-run", "--json", "--output-dir", str(folder)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["card"] == (folder / "README.md").read_text()
    assert answer["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert len(hub.requests) == asked


def test_the_command_publishes(hub, checkpoint, unchecked, capsys):
    arguments = ["--private", "--revision", "first", "--commit-message", "Hello", "--license", "mit", "--json"]
    assert main(["push", str(checkpoint), "tester/command", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    repository = hub.repositories["model", "tester/command"]
    commit = repository.refs["first"]
    assert answer["commit"].endswith(commit) and repository.messages[commit] == "Hello" and repository.private
    assert 'revision="first"' in hub.files("tester/command", "first")["README.md"].decode()
    assert hub.files("tester/command").keys() == {".gitattributes"}
