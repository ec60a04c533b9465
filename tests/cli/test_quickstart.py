"""The embedded checkpoint, the quickstart and the command line."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from devil_hf.checkpoints import CHECKPOINT
from devil_hf.checkpoints.loading import load
from devil_hf.cli import main as cli
from devil_hf.data.shapes import make_scene
from devil_hf.data.worlds import HELD_OUT_WORLD
from devil_hf.report.quickstart import TRANSLATOR, measure, quickstart, train_translator
from devil_hf.settings import read_yaml
from devil_hf.training.recipe import Recipe


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(make_scene(HELD_OUT_WORLD, 0).image).save(path)
    return str(path)


def test_the_embedded_checkpoint_is_small_and_in_half_precision():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    model, _ = load()
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "computed in fp32 unless told otherwise"
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["dtype"] == "float16" and config["frozen_weights"] == "embedded"
    assert config["backbone_config"]["source"] is None


def test_the_embedded_checkpoint_knows_its_world():
    """Far below what is measured on 500 scenes, far above chance: 20 scenes are few."""
    model, processor = load()
    scores = measure(model, processor, scenes=20)
    f1, pointing = scores["description_f1"]["all"], scores["pointing"]
    assert f1["colour"] > 0.85 and f1["texture"] > 0.9 and f1["shape"] > 0.9
    assert max(row["colour"] for row in pointing.values()) > 0.9
    assert scores["description_f1"]["layer1"]["shape"] < f1["shape"]
    assert 0 < scores["chance_pointing"] < 0.4


def test_quickstart_trains_measures_and_draws(tmp_path):
    scores = quickstart(tmp_path, scenes=64, steps=3, held_out=3)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written == scores and scores["seconds"] > 0
    assert set(scores["description_f1"]) == {"all", "layer1", "layer2", "layer3", "layer4"}
    assert (tmp_path / "checkpoint" / "modeling_devil.py").exists()
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert {"layers.png", "maps_0.png", "locations_0.png", "scene_0.png"} <= {path.name for path in pictures}
    assert all(min(Image.open(path).size) > 50 for path in pictures)


def test_the_quickstart_recipe_trains_the_same_translator():
    recipe = read_yaml(Recipe, Path("quickstart"))
    defaults = {name: option.default for name, option in inspect.signature(quickstart).parameters.items()}
    assert recipe["model"] == TRANSLATOR and recipe["new_translator"]
    assert recipe["train_data"][0]["size"] == defaults["scenes"] and recipe["max_steps"] == defaults["steps"]
    assert float(recipe["learning_rate"]) == inspect.signature(train_translator).parameters["learning_rate"].default


def test_describe_prints_layers_and_says_what_it_does_not_know(scene_file, capsys, tmp_path):
    picture = tmp_path / "layers.png"
    assert cli.main(["describe", scene_file, "--layers", "all", "-1", "--evidence", "--output", str(picture)]) == 0
    printed = capsys.readouterr()
    assert "all: " in printed.out and "layer4: " in printed.out
    assert "rendered scenes" in printed.err
    assert picture.exists()


def test_describe_and_attribute_speak_json(scene_file, capsys, tmp_path):
    cli.main(["describe", scene_file, "--layers", "layer4", "--locations", "0,0", "1,3", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["location"]) for row in rows] == [("layer4", [0, 0]), ("layer4", [1, 3])]
    picture = str(tmp_path / "maps.png")
    cli.main(
        ["attribute", scene_file, "red", "a circle", "--layers", "layer3", "layer4", "--json", "--output", picture]
    )
    maps = json.loads(capsys.readouterr().out)
    assert set(maps) == {"layer3", "layer4"} and len(maps["layer4"]) == 2 and len(maps["layer4"][0]) == 4


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["describe", "nowhere.png"], "nowhere.png"),
        (["describe", "SCENE", "--layers", "layer9"], "layer9"),
        (["describe", "SCENE", "--layers", "layer4", "--locations", "7,7"], "outside"),
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
