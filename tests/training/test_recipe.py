"""Recipes: read from everywhere, what is wrong is found before the first step."""

from pathlib import Path

import pytest
import yaml

from devil_hf.settings import make, parse, read_yaml
from devil_hf.training.recipe import RECIPE_FILE, Recipe
from devil_hf.training.run import train
from devil_hf.training.trainer import DevilTrainer
from tests.conftest import SMALL_TRANSLATOR
from tests.training.runs import ROOT

RECIPES = [*sorted((ROOT / "scripts/recipes").glob("*.yaml")), Path("quickstart")]


def test_a_recipe_is_read_from_options_files_folders_and_names(tmp_path):
    fields = {"checkpoint": "shapes", "train_data": [{"kind": "shapes", "size": 3}], "learning_rate": "1e-4"}
    (tmp_path / RECIPE_FILE).write_text(yaml.safe_dump(fields | {"resume": True}))
    assert read_yaml(Recipe, tmp_path) == read_yaml(Recipe, tmp_path / RECIPE_FILE)
    options = ["--config", str(tmp_path), "--max_steps=3", "--batch-size", "7", "--output_dir", "here", "--no-resume"]
    options += ["--lora", '{"rank": 2}', "--validation_data", '[{"kind": "shapes", "size": 2}]', "--class_tokens"]
    recipe = parse(Recipe, [*options, "--report-to", "none"])
    assert recipe == make(
        Recipe,
        fields
        | {"max_steps": 3, "batch_size": 7, "output_dir": "here", "lora": {"rank": 2}, "class_tokens": True}
        | {"validation_data": [{"kind": "shapes", "size": 2}], "report_to": "none"},
    )
    assert recipe.learning_rate == 1e-4 and not recipe.resume
    assert make(Recipe, yaml.safe_load(recipe.to_yaml())) == recipe
    named = parse(Recipe, ["--config", "quickstart", "--resume", "true"])
    assert named.new_translator and named.resume
    with pytest.raises(FileNotFoundError, match="quickstarts"):
        parse(Recipe, ["--config", "quickstarts"])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_valid(file):
    recipe = parse(Recipe, ["--config", str(file), "--report_to", "none"])
    assert Path(recipe.output_dir).parts[:2] == ("runs", file.stem)
    if file.stem.startswith("cc3m"):  # the paper's settings
        assert (recipe.learning_rate, recipe.final_learning_rate, recipe.batch_size) == (1e-4, 1e-6, 64)
        assert (recipe.warmup_steps, recipe.schedule, recipe.max_steps) == (5000, "linear", 1_000_000)
        assert (recipe.weight_decay, recipe.resize) == (1e-6, "paper")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backbone": ""}, "backbone"),
        ({"draws": 0}, "draws=0"),
        ({"model": {"widht": 3}}, "widht"),
        ({"lora": {"r": 3}}, "'r'"),
        ({"precision": "half"}, "half"),
        ({"save_steps": 3}, "save_steps=3"),
        ({"save_steps": 4}, "save_steps=4 must equal evaluation_steps=2"),
        ({"keep_checkpoints": 1}, "keep_checkpoints=1"),
        ({"validation_data": [{"kind": "shapes", "split": "test"}]}, "no longer be held out"),
        ({"validation_data": [{"kind": "hub", "path": "a/b", "split": "test[:100]"}]}, "no longer be held out"),
        ({"cache_features": "features", "smallest_crop": 0.5}, "smallest_crop=0.5"),
        ({"push_to_hub": "devil"}, "USER/REPO"),
        ({"logging_steps": 4}, "logging_steps=4"),
        ({"report_to": "tensorbored"}, "tensorbored"),
        ({"layers": ["layer9"]}, "layer9"),
        ({"model": SMALL_TRANSLATOR | {"prefix_length": 80}}, "prefix_length=80"),
        ({"train_data": [{"kind": "folder", "path": "nowhere"}]}, "nowhere"),
        ({"processes": 3}, "3"),
        ({"save": "merged"}, "lora"),
        ({"checkpoint": "shapes"}, "leave backbone"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_step(change, text, fields, monkeypatch):
    monkeypatch.setattr(DevilTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(Exception, match=text):
        train(Recipe(**(fields | change)))


def test_a_slim_checkpoint_of_local_parts_is_not_to_be_pushed(fields, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {})
    monkeypatch.setattr(DevilTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(ValueError, match=r"directory of this machine.*save='full'"):
        train(Recipe(**fields, push_to_hub="tester/devil"))


def test_sharded_weights_are_refused_with_validation(fields, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--multi_gpu"):
        train(Recipe(**fields))


def test_a_full_disk_is_found_before_the_first_step(fields, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="GB free"):
        train(Recipe(**fields))
    # Where every checkpoint is kept, all of them need room.
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10**9}))
    monkeypatch.setattr(DevilTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(OSError, match="GB free"):
        train(Recipe(**fields | {"keep_checkpoints": 0, "max_steps": 10**6, "evaluation_steps": 10}))


def test_an_unknown_field_of_a_recipe_file_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match="batchsize"):
        parse(Recipe, ["--config", str(tmp_path / "r.yaml")])


def test_half_a_step_is_no_number_of_steps(tmp_path):
    (tmp_path / "r.yaml").write_text("max_steps: 2.5\n")
    with pytest.raises(ValueError, match=r"max_steps=2\.5: 2\.5 must be a whole number"):
        parse(Recipe, ["--config", str(tmp_path / "r.yaml")])
