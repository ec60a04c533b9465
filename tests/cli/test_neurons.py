"""`devil neurons` from settings: directions as units, and what is refused."""

import copy
import json

import numpy as np
import pytest
import torch

from devil_hf.checkpoints.identity import known_by
from devil_hf.checkpoints.quantised import quantise
from devil_hf.cli.main import main
from devil_hf.report import neurons as report
from devil_hf.report.neurons import NeuronsSettings, neurons


@pytest.fixture(scope="module")
def directions(model, tmp_path_factory):
    """A file of three directions of the deepest layer, and one of their names."""
    folder = tmp_path_factory.mktemp("directions")
    np.save(folder / "probe.npy", np.random.default_rng(0).normal(size=(3, model.backbone.channels[-1])))
    (folder / "names.txt").write_text("fur\nmetal\nwater\n")
    return folder


def test_directions_of_a_file_become_units_with_names(model, processor, images, directions, tmp_path):
    settings = NeuronsSettings(
        output_dir=tmp_path,
        layers=["-1"],
        directions=directions / "probe.npy",
        direction_names=directions / "names.txt",
        exemplars=2,
        held_out=2,
        candidates=2,
        permutations=100,
    )
    pictures = [image.rotate(angle) for image in images for angle in range(0, 360, 24)]
    summary = neurons(settings, model, processor, images=pictures)
    assert summary["units"] == 3 and summary["checks"]["images"] == 22
    units = json.loads((tmp_path / "atlas" / "atlas.json").read_text())["units"]
    assert [unit["name"] for unit in units] == ["fur", "metal", "water"]
    given = neurons(
        NeuronsSettings(output_dir=tmp_path / "given", layers=["-1"], stage="exemplars", channels=True, exemplars=2),
        model,
        processor,
        images=pictures,
        directions={model.layer_names[-1]: torch.from_numpy(np.load(directions / "probe.npy")).float()},
    )
    assert given["units"] == 3 + model.backbone.channels[-1], "living directions beside the channels"


@pytest.mark.parametrize("layers", [[], ["--layers", "layer1", "layer2"]])
def test_directions_need_one_layer(layers, directions, tmp_path, capsys):
    command = ["neurons", "shapes:8", "--directions", str(directions / "probe.npy"), "--output-dir", str(tmp_path)]
    assert main([*command, *layers]) == 1
    assert "name it by --layers" in capsys.readouterr().err


def test_units_of_which_one_or_none_has_a_label_are_checked(model, processor, images, directions, tmp_path):
    options = {"output_dir": tmp_path, "layers": ["-1"], "directions": directions / "probe.npy", "exemplars": 2, "held_out": 2}
    options |= {"candidates": 2, "permutations": 100}
    pictures = [image.rotate(angle) for image in images for angle in range(0, 360, 24)]

    def run(stage):
        return neurons(NeuronsSettings(**options, stage=stage), model, processor, images=pictures)

    run("exemplars")
    run("describe")
    labels = json.loads((tmp_path / "labels.json").read_text())
    for unit in labels["units"]:
        unit["label"] = ""
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=r"no unit in .*labels\.json has a label to check: go on with the stage 'atlas'"):
        run("check")
    assert "checks" not in run("atlas")
    labels["units"][1]["label"] = "a red dog"
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    run("check")
    summary = run("atlas")
    assert set(summary["checks"]) >= {"labels", "constant label"} and "shuffled labels" not in summary["checks"]
    assert json.loads((tmp_path / "atlas" / "atlas.json").read_text())["summary"]["check"] == summary["checks"]


def test_exemplars_of_before_are_encoded_again_and_said_to_be(model, processor, images, tmp_path, caplog, monkeypatch):
    options = {"output_dir": tmp_path, "layers": ["-1"], "exemplars": 1, "held_out": 2, "permutations": 100}
    options |= {"strategy": "words", "words": tmp_path / "words.txt"}
    (tmp_path / "words.txt").write_text("red\ndog\n")
    pictures = [image.rotate(angle) for image in images for angle in range(0, 360, 24)]

    def run(stage, **changes):
        return neurons(NeuronsSettings(**options, stage=stage, **changes), model, processor, images=pictures)

    hashed = []
    monkeypatch.setattr(report, "known_by", lambda *model: hashed.append(model) or known_by(*model))
    assert run("all")["labels"]["mode"] == "features" and not caplog.records
    assert len(hashed) == 1, "of one run"
    with pytest.raises(ValueError, match="carrier"):
        run("check", carrier="the")
    assert len(hashed) == 1, "what is refused anyway costs nothing"
    file = tmp_path / "exemplars" / "exemplars.json"
    summary = json.loads(file.read_text())
    old = {"crop": summary["crop"], "crop_pct": 1.0, "crop_mode": "center"}
    file.write_text(json.dumps(summary | {"preprocessing": old}))
    assert run("describe")["labels"]["mode"] == "pixels"
    assert 'encoded again (mode "pixels"); name the mode "features"' in caplog.text
    caplog.clear()
    assert run("describe", mode="features")["labels"]["mode"] == "features" and not caplog.records


def test_labels_and_their_check_are_of_one_model(model, processor, images, directions, tmp_path):
    options = {"output_dir": tmp_path, "layers": ["-1"], "directions": directions / "probe.npy", "exemplars": 2, "held_out": 2}
    options |= {"permutations": 100, "strategy": "words", "words": tmp_path / "words.txt"}  # labels that rounding seldom changes
    (tmp_path / "words.txt").write_text("red\ndog\ncircle\n")
    pictures = [image.rotate(angle) for image in images for angle in range(0, 360, 24)]
    rounded, other = quantise(copy.deepcopy(model)), copy.deepcopy(model)
    with torch.no_grad():
        next(other.translator.parameters()).add_(0.01)

    def run(stage, by, **changes):
        return neurons(NeuronsSettings(**options, stage=stage, **changes), by, processor, images=pictures)

    for stage in ("exemplars", "describe", "check", "atlas"):
        exact = run(stage, model)
    assert "quantize" not in exact["labels"]
    before = (tmp_path / "checks.json").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"labels\.json does not say with which quantize it was made, and 'int8' is asked for: check with the same",
    ):
        run("check", rounded)
    with pytest.raises(ValueError, match=r"labels\.json was made by a model of other weights: check with the same"):
        run("check", other)
    with pytest.raises(
        ValueError, match=r"does not say with which carrier it was made, and 'the' is asked for: check with the same"
    ):
        run("check", model, carrier="the")
    assert (tmp_path / "checks.json").read_bytes() == before
    without = {name: part for name, part in json.loads(before).items() if name != "of"}  # as older versions made it
    (tmp_path / "checks.json").write_text(json.dumps(without))
    with pytest.raises(ValueError, match="does not say which labels it is of: run the check again"):
        run("atlas", model)
    texts = [unit["label"] for unit in json.loads((tmp_path / "labels.json").read_text())["units"]]
    assert run("describe", rounded)["labels"]["quantize"] == "int8"
    assert [unit["label"] for unit in json.loads((tmp_path / "labels.json").read_text())["units"]] == texts
    with pytest.raises(ValueError, match="run the check again"):  # same texts, other evidence
        run("atlas", rounded)
    with pytest.raises(ValueError, match="was made with quantize='int8', not None"):
        run("check", model)
    run("check", rounded)
    run("atlas", rounded)
    otherwise = copy.deepcopy(processor)
    otherwise.image_processor.image_std = [0.2, 0.3, 0.25]
    for stage, text in (
        ("exemplars", "exemplars of other settings: preprocessing is"),
        ("check", r"labels\.json was made with other images of the model and its processor: check with the same"),
    ):
        with pytest.raises(ValueError, match=text):
            neurons(NeuronsSettings(**options, stage=stage), rounded, otherwise, images=pictures)
    assert json.loads((tmp_path / "atlas" / "atlas.json").read_text())["summary"]["labels"]["quantize"] == "int8"
    run("describe", model, carrier="the")
    with pytest.raises(ValueError, match=r"was made with carrier='the', not None"):
        run("check", model)
    assert run("check", model, carrier="the")["labels"]["carrier"] == "the"
