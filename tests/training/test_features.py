"""Frozen features: those of the model, drawn from its locations, computed once and never of anything else."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from devil_hf.model.pooling_devil import pool
from devil_hf.training.feature_cache import CachedFeatures, StaleCache
from devil_hf.training.features import PooledCaptions, pool_draws, pooled_feature_draws
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from tests.training.runs import Killed, weights


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


def test_regions_of_one_image_are_read_from_one_pass(model, pixel_values):
    image_of = [0, 0, 1, 2, 2]
    regions = torch.zeros(5, *pixel_values.shape[-2:])
    for row, region in enumerate(regions):
        region[:, 4 * row :] = 1
    torch.manual_seed(0)
    expected = pool_draws(model, pixel_values[image_of], 3, regions)
    torch.manual_seed(0)
    for found, rows in zip(pool_draws(model, pixel_values, 3, regions, image_of), expected, strict=True):
        torch.testing.assert_close(found, rows, atol=1e-2, rtol=1e-3)


def test_rows_of_one_image_share_its_views(fields, caption_folder, tmp_path, monkeypatch):
    passes = []

    def draw(model, pixel_values, draws, regions, image_of):
        passes.append((len(pixel_values), image_of))
        return pool_draws(model, pixel_values, draws, regions, image_of)

    monkeypatch.setattr("devil_hf.training.feature_cache.pool_draws", draw)
    source = {"kind": "folder", "path": caption_folder, "split": "train"}
    fields |= {"cache_features": str(tmp_path / "features"), "views": 2, "smallest_crop": 0.5, "max_steps": 2}
    train(Recipe(**fields | {"train_data": [source, source], "validation_data": []}))
    assert passes == [(6, [*range(6), *range(6)])] * 2


def test_samples_pair_an_images_draw_with_one_of_its_captions():
    features = [torch.arange(6.0).view(3, 2, 1)]
    captions = [["a", "b"], ["c"], ["d", "e", "f"]]
    dataset = PooledCaptions(features, captions)
    items = [dataset.sample(2, epoch) for epoch in range(60)]
    assert {(i["pooled_features"][0].item(), i["caption"]) for i in items} == {(v, t) for v in (4.0, 5.0) for t in "def"}
    assert dataset.sample(2, 7) == items[7]
    assert [text for _, text in dataset.every_caption()] == ["a", "c", "d", "b", "e", "f"]
    with pytest.raises(ValueError, match="no caption"):
        PooledCaptions(features, [["a"], [], ["b"]])


def test_training_from_a_cache_reads_no_pixels_and_refuses_a_stale_one(fields, caption_folder, tmp_path, monkeypatch):
    fields |= {"cache_features": str(tmp_path / "features"), "views": 2, "draws": 3, "smallest_crop": 0.5}
    first = train(Recipe(**fields))
    cache = CachedFeatures(tmp_path / "features", seed=0)
    assert len(cache) == 6 and load_file(cache.shards[0])["layer.0"].shape[:2] == (6, 6)
    assert load_file(cache.shards[0])["layer.0"].dtype == torch.float16

    def fail(*args, **kwargs):
        raise AssertionError("a pixel was touched")

    monkeypatch.setattr("devil_hf.data.decoding._decode", fail)
    fields |= {"output_dir": str(tmp_path / "second"), "validation_data": []}
    second = train(Recipe(**fields))
    assert set(weights(second)) == set(weights(first))
    deepest = train(Recipe(**fields | {"layers": ["layer4"], "output_dir": str(tmp_path / "one_layer")}))
    assert AutoModel.from_pretrained(deepest).layer_names == ["layer4"]
    features = load_file(cache.shards[0])
    one = CachedFeatures(tmp_path / "features", seed=0, layers=["layer4"]).sample(2, 1)["pooled_features"]
    assert len(one) == 1 and torch.equal(one[0], cache.sample(2, 1)["pooled_features"][-1]) and len(features) > 1
    monkeypatch.undo()
    for change, text in (
        ({"layers": ["act1", "layer4"]}, "layers"),
        ({"resize": "paper"}, "image_transform"),
        ({"draws": 4}, "draws"),
        ({"backbone_kwargs": {"output_stride": 16}}, "backbone_built"),
        ({"train_data": [{"kind": "folder", "path": caption_folder}]}, "data"),
    ):
        with pytest.raises(StaleCache, match=text):
            train(Recipe(**(fields | change | {"output_dir": str(tmp_path / "third")})))
    content = json.loads((tmp_path / "features/cache.json").read_text())
    del content["key"]["backbone_built"]  # as older versions wrote it
    (tmp_path / "features/cache.json").write_text(json.dumps(content))
    train(Recipe(**fields | {"output_dir": str(tmp_path / "fourth")}))


def test_an_interrupted_cache_is_finished_and_equal(fields, tmp_path, monkeypatch):
    monkeypatch.setattr("devil_hf.training.feature_cache.SHARD_IMAGES", 2)
    fields |= {"cache_features": str(tmp_path / "whole"), "max_steps": 2, "validation_data": []}
    train(Recipe(**fields))
    original, calls = pool_draws, []

    def draw(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return original(*args, **kwargs)

    fields |= {"cache_features": str(tmp_path / "parts"), "output_dir": str(tmp_path / "other")}
    monkeypatch.setattr("devil_hf.training.feature_cache.pool_draws", draw)
    with pytest.raises(Killed):
        train(Recipe(**fields))
    with pytest.raises(StaleCache, match="not complete, and of more layers"):
        train(Recipe(**fields | {"layers": ["layer4"], "output_dir": str(tmp_path / "fewer")}))
    train(Recipe(**fields))
    assert len(calls) == 4  # one shard, the one that failed, and the two that were left
    whole, parts = (CachedFeatures(tmp_path / name, seed=0) for name in ("whole", "parts"))
    assert len(whole.shards) == 3 and whole.captions == parts.captions
    for one, other in zip(whole.shards, parts.shards, strict=True):
        torch.testing.assert_close(load_file(one), load_file(other), rtol=0, atol=0)
