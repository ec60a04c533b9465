"""Training: cached features equal fresh ones, recipes round-trip, a run ends in a checkpoint that loads."""

import json

import pytest
import torch
import yaml
from transformers import AutoModel
from transformers import AutoProcessor

from devil_hf.pooling_devil import pool
from devil_hf.training.features import PooledCaptions
from devil_hf.training.features import pooled_feature_draws
from devil_hf.training.recipe import Recipe
from devil_hf.training.recipe import parse_recipe
from devil_hf.training.recipe import train
from tests.conftest import SMALL_TRANSLATOR


def test_cached_features_equal_those_of_the_model(model, pixel_values):
    cached = pooled_feature_draws(model, [pixel_values[:2], pixel_values[2:]])
    expected = [pool(maps, None) for maps in model.extract_features(pixel_values)]
    for found, fresh in zip(cached, expected, strict=True):
        torch.testing.assert_close(found[:, 0].float(), fresh, atol=1e-2, rtol=1e-3)


def test_draws_of_one_image_differ_and_come_from_its_locations(model, pixel_values):
    torch.manual_seed(0)
    cached = pooled_feature_draws(model, [pixel_values], draws=6)
    assert cached[0].shape[:2] == (3, 6)
    assert not torch.equal(cached[0][0, 0], cached[0][0, 1])
    maps = model.extract_features(pixel_values)[0]
    low, high = maps.amin(dim=(2, 3)), maps.amax(dim=(2, 3))
    tolerance = 1e-2 * maps.abs().max()
    assert (cached[0] >= low[:, None] - tolerance).all() and (cached[0] <= high[:, None] + tolerance).all()


def test_items_pair_an_images_draw_with_one_of_its_captions():
    features = [torch.arange(6.0).view(3, 2, 1)]
    captions = [["a", "b"], ["c"], ["d", "e", "f"]]
    dataset = PooledCaptions(features, captions)
    seen = {(item["pooled_features"][0].item(), item["caption"]) for _ in range(60) for item in [dataset[2]]}
    assert seen == {(value, text) for value in (4.0, 5.0) for text in "def"}
    every = PooledCaptions(features, captions, every_caption=True)
    assert [every[i]["caption"] for i in range(len(every))] == ["a", "b", "c", "d", "e", "f"]
    with pytest.raises(ValueError, match="no caption"):
        PooledCaptions(features, [["a"], [], ["b"]])


@pytest.fixture
def caption_folder(images, tmp_path):
    folder = tmp_path / "captions"
    folder.mkdir()
    lines = []
    for index in range(6):
        images[index % 3].save(folder / f"{index}.png")
        record = {"image": f"{index}.png", "captions": ["a red dog", "the cat on grass"]}
        lines.append(json.dumps(record | {"split": "train" if index < 4 else "val"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return str(folder)


def test_a_run_by_recipe_ends_in_a_checkpoint_that_loads_and_trains_again(sources, caption_folder, images, tmp_path):
    file = tmp_path / "recipe.yaml"
    fields = {
        "backbone": sources["backbone"],
        "language_model": sources["language_model"],
        "folders": [caption_folder],
        "model": SMALL_TRANSLATOR,
        "views": 2,
        "draws": 2,
        "batch_size": 2,
        "max_steps": 4,
        "evaluation_steps": 2,
        "warmup_steps": 1,
    }
    file.write_text(yaml.safe_dump(fields))
    recipe = parse_recipe(["--config", str(file), "--output_dir", str(tmp_path / "run"), "--draws", "3"])
    assert (recipe.draws, recipe.views, recipe.batch_size) == (3, 2, 2)
    checkpoint = train(recipe)
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert model.config.frozen_weights == "reference"
    assert model.generate(**processor(images=images, return_tensors="pt"), max_new_tokens=3).shape[0] == 3
    again = Recipe(**yaml.safe_load((checkpoint / "recipe.yaml").read_text()))
    assert again == recipe


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "backbone"),
        ({"backbone": "b", "language_model": "l", "folders": ["f"], "draws": 0}, "draws=0"),
        ({"backbone": "b", "language_model": "l", "folders": ["f"], "model": {"widht": 3}}, "widht"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_loaded(fields, text):
    with pytest.raises(ValueError, match=text):
        train(Recipe(**fields))


def test_an_unknown_field_of_a_recipe_file_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match="batchsize"):
        parse_recipe(["--config", str(tmp_path / "r.yaml")])
