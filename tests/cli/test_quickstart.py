"""The embedded checkpoint, the quickstart and the command line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from devil_hf.checkpoints import locate
from devil_hf.checkpoints.identity import fingerprint
from devil_hf.checkpoints.loading import load
from devil_hf.cli import main as cli
from devil_hf.cli.quickstart import QuickstartSettings, recipe
from devil_hf.data.shapes import make_scene
from devil_hf.data.worlds import HELD_OUT_WORLD
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.shapes import ShapesSettings
from devil_hf.report.scenes import draw_pictures
from devil_hf.settings import make, read_yaml
from devil_hf.training.recipe import Recipe


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(make_scene(HELD_OUT_WORLD, 0).image).save(path)
    return str(path)


def test_the_embedded_checkpoint_is_small_and_in_half_precision():
    files = [path for path in locate("shapes").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    model, _ = load("shapes")
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "computed in fp32 unless told otherwise"
    config = json.loads((locate("shapes") / "config.json").read_text())
    assert config["dtype"] == "float16" and config["frozen_weights"] == "embedded"
    assert config["backbone_config"]["source"] is None


def test_the_embedded_checkpoint_knows_its_world(tmp_path):
    """Far below what is measured on 500 scenes, far above chance: 20 scenes are few."""
    settings = ShapesSettings(limit=20, questions=["described", "pointing"], pointing_limit=8, output_dir=tmp_path)
    scores = evaluate("shapes", settings).details
    said, pointing = scores["described"], scores["pointing"]
    f1 = {name: said["all"][name]["f1"] for name in ("colour", "texture", "shape")}
    assert f1["colour"] > 0.85 and f1["texture"] > 0.9 and f1["shape"] > 0.9
    assert max(row["colour"] for row in pointing.values()) > 0.9
    assert said["layer1"]["shape"]["f1"] < f1["shape"]
    assert 0 < scores["chance_pointing"] < 0.4


def test_quickstart_trains_measures_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("devil_hf.report.scenes.draw_pictures", partial(draw_pictures, scenes=1))
    options = ["--scenes", "64", "--steps", "3", "--held-out", "3", "--output-dir", str(tmp_path), "--json"]
    assert cli.main(["quickstart", *options]) == 0
    printed = capsys.readouterr()
    scores = json.loads(printed.out)
    assert "training: 100%" in printed.err and "loss=" in printed.err
    assert not re.search(r"\{'|Warning|warn\(", printed.err), "one line of progress, and no records or warnings of libraries"
    assert json.loads((tmp_path / "scores.json").read_text()) == scores and scores["seconds"] > 0
    assert set(scores["described"]) >= {"all", "layer1", "layer2", "layer3", "layer4"} and scores["pointing"]
    assert scores["dataset"]["size"] == 3 and "held-out" in scores["dataset"]["name"]
    assert (tmp_path / "checkpoint" / "modeling_devil.py").exists()
    assert fingerprint(load(tmp_path / "checkpoint", "cpu")[0]) == scores["weights"]
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert {"layers.png", "maps_0.png", "locations_0.png", "scene_0.png"} <= {path.name for path in pictures}
    assert all(min(Image.open(path).size) > 50 for path in pictures)


def test_quickstart_answers_before_it_trains(tmp_path, capsys, monkeypatch):
    """The shipped model on a scene that nothing was trained on: words, and a map of one of them."""
    told: list[str] = []

    def stop(recipe):
        told.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr("devil_hf.training.run.train", stop)
    assert cli.main(["quickstart", "--output-dir", str(tmp_path)]) == cli.INTERRUPTED
    (text,) = told
    truth = set(re.search(r"\(truth\) +(.*)", text)[1].replace(",", "").split())
    assert truth <= set(re.search(r"all +(.*)", text)[1].split()), "it says all that is there"
    word = re.search(r"sees '(\w+)'", text)[1]
    assert word in truth and len(re.findall(r"^  \|[ .:+#]+\|$", text, re.M)) == 8
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"first_scene.png", "first_map.png"}


def test_quickstart_is_the_recipe_of_that_name():
    shipped, ours = make(Recipe, read_yaml(Recipe, Path("quickstart"))), recipe(QuickstartSettings())
    assert set(ours.differences(dataclasses.asdict(shipped))) <= {"cache_features"}
    other = recipe(QuickstartSettings(steps=100, scenes=640, seed=3))
    assert (other.max_steps, other.train_data[0]["size"], other.seed, other.warmup_steps) == (100, 640, 3, 5)


def test_describe_prints_layers_and_what_it_knows_needs_no_word(scene_file, capsys, tmp_path):
    picture = tmp_path / "layers.png"
    asked = ["describe", scene_file, "--checkpoint", "shapes", "--layers", "all", "-1", "--evidence"]
    assert cli.main([*asked, "--output", str(picture)]) == 0
    printed = capsys.readouterr()
    assert "all: " in printed.out and "layer4: " in printed.out
    assert "note:" not in printed.err, "the scene is like those of the training"
    assert picture.exists()


def test_describe_shows_a_scene_where_no_image_is_named(capsys):
    assert cli.main(["describe", "--layers", "all", "--max-new-tokens", "2"]) == 0
    assert re.match(r"a scene \(.*\)  all: \w+", capsys.readouterr().out)
    assert cli.main(["describe", "--checkpoint", "somewhere"]) == 1
    assert "name an image" in capsys.readouterr().err


def test_describe_and_attribute_speak_json(scene_file, capsys, tmp_path):
    cli.main(["describe", scene_file, "--checkpoint", "shapes", "--layers", "layer4", "--locations", "0,0", "1,3", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["location"]) for row in rows] == [("layer4", [0, 0]), ("layer4", [1, 3])]
    picture = str(tmp_path / "maps.png")
    asked = ["attribute", scene_file, "red", "a circle", "--checkpoint", "shapes", "--layers", "layer3", "layer4"]
    cli.main([*asked, "--json", "--output", picture])
    maps = json.loads(capsys.readouterr().out)
    assert set(maps) == {"layer3", "layer4"} and len(maps["layer4"]) == 2 and len(maps["layer4"][0]) == 4
    exact = ["attribute", scene_file, "red", "--checkpoint", "shapes", "--layers", "layer1", "--json", "--output", picture]
    found = []
    for command in (exact, [*exact, "--refine", "0.5"]):
        cli.main(command)
        found.append(np.array(json.loads(capsys.readouterr().out)["layer1"][0]).flatten())
    assert (
        found[0].shape == found[1].shape
        and 0.9 < np.corrcoef(*found)[0, 1] < 1
        and (np.abs(found[0] - found[1]) < 1e-4).mean() >= 0.5
    )


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["describe", "nowhere.png"], "nowhere.png"),
        (["describe", "SCENE", "--layers", "layer9"], "layer9"),
        (["describe", "SCENE", "--checkpoint", "shapes", "--layers", "layer4", "--locations", "7,7"], "outside"),
        (["describe", "SCENE", "--locations", "seven"], "seven"),
        (["attribute", "SCENE", " "], "phrase"),
        (["attribute", "SCENE", "red " * 200], "shorten"),
        (["quickstart", "--steps", "0"], "at least 1 step"),
    ],
)
def test_bad_commands_end_with_one_clear_line(command, text, scene_file, capsys):
    command = [scene_file if word == "SCENE" else word for word in command]
    assert cli.main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("devil ") and text in error


def test_the_console_command_runs(scene_file):
    run = subprocess.run(
        [sys.executable, "-m", "devil_hf", "describe", scene_file, "--layers", "all"],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0 and "all: " in run.stdout, run.stderr
