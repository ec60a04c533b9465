"""One reader of `shapes:COUNT:SEED` for everything, and labels that tell which world was read."""

import json
import pickle

import numpy as np
import pytest
from datasets import IterableDataset

from devil_hf.data.captioned import open_captioned
from devil_hf.data.images import open_images
from devil_hf.data.objects import open_localised
from devil_hf.data.pairs import open_pairs
from devil_hf.data.shapes import make_scene
from devil_hf.data.specifications import caption_sources, named_sources
from devil_hf.data.world_dataset import world_dataset
from devil_hf.data.worlds import USUAL_COUNT, World, parse_world
from devil_hf.evaluation.results import read_evaluations


def test_a_text_names_a_world_or_is_about_something_else():
    assert parse_world("shapes") == World(USUAL_COUNT, 1) and parse_world("shapes", 7) == World(7, 1)
    assert parse_world("shapes:3") == World(3, 1) and parse_world("shapes:3:0") == World(3, 0)
    assert parse_world("photographs") is None and parse_world("shapes.yaml") is None
    for text in ("shapes:", "shapes:many", "shapes:0", "shapes:-3", "shapes:3:-1", "shapes:3:1:2", "shapes:3:x"):
        with pytest.raises(ValueError, match="is not shapes:COUNT or shapes:COUNT:SEED"):
            parse_world(text)


@pytest.mark.parametrize("text", ["shapes:4", "shapes:4:0", "shapes:4:7"])
def test_every_room_reads_the_same_scenes(text):
    world = parse_world(text)
    scenes = [scene.image for scene in world.scenes()]
    images = open_images(text)
    assert images.name == world.name and all((np.asarray(images.load(n)) == scene).all() for n, scene in enumerate(scenes))
    captioned = open_captioned(text)
    assert captioned.name == world.label and np.array_equal([scene.image for scene in captioned.scenes], scenes)
    for one in open_localised(text):
        assert (one.read() == scenes[int(one.key.split("-")[1])]).all()
    rows = list(open_pairs(caption_sources(text), 0, False))
    assert [row["key"] for row in rows] == [f"shapes {world.seed} {n}" for n in range(4)]
    assert [row["captions"] for row in rows] == captioned.captions


def test_labels_follow_from_the_world_and_not_from_a_hope():
    assert World(3, 0).label == "shapes world, seed 0 (training scenes)"
    assert World(3).label == "shapes world, seed 1 (held-out scenes)"
    assert World(3, 9).label == "shapes world, seed 9 (scenes of another world)"
    assert open_captioned("{kind: shapes, size: 3, seed: 0}").name == World(3, 0).label


def test_results_name_every_source_that_was_read():
    shapes, hub = {"kind": "shapes", "size": 3, "seed": 0}, {"kind": "hub", "path": "user/data", "split": "val"}
    assert named_sources([hub]) == {"name": "user/data", "split": "val", "id": "user/data"}
    coco = {"kind": "coco", "annotations": "a/captions_val.json", "split": "test"}
    assert named_sources([shapes, hub, coco]) == {"name": f"{World(3, 0).label} + user/data + captions_val.json"}
    assert named_sources([shapes, {"kind": "own", "of": "us"}])["name"] == f"{World(3, 0).label} + own"
    assert open_captioned("[{kind: shapes, size: 1, seed: 0}, {kind: shapes, size: 1, seed: 1}]").name == (
        f"{World(1, 0).label} + {World(1, 1).label}"
    )


def test_a_recipe_says_which_world_it_trains_on():
    with pytest.raises(ValueError, match=r"lacks \['seed'\]"):
        open_pairs([{"kind": "shapes", "size": 3}], 0, False)


def test_results_of_the_former_layouts_are_still_read(tmp_path):
    file = tmp_path / "scores.json"
    old = {
        "title": "Controls",
        "dataset": {"name": "shapes world of devil-hf (held-out scenes)"},
        "scores": {"all": {"f1": 1}},
    }
    file.write_text(json.dumps(old))
    assert read_evaluations(file)[0].dataset == old["dataset"]
    file.write_text(json.dumps({"description_f1": {"all": {"colour": 0.9}}}))
    assert read_evaluations(file)[0].dataset["name"] == World(1).label


def test_scenes_are_the_same_in_any_order_and_process():
    world = World(10, seed=4)
    copy = pickle.loads(pickle.dumps(world))
    for index in (7, 0, 3):
        scene, captions = world.captioned(index, 2)
        assert np.array_equal(scene.image, make_scene(4, index).image) and scene == world.scene(index)
        assert captions == copy.captioned(index, 2)[1] == world.captioned(index, 5)[1][:2]
    assert len(list(world.scenes())) == len(world) == 10 and world.first(3) == World(3, 4) == world.first(99).first(3)
    with pytest.raises(IndexError, match="no scene 10"):
        world.scene(10)
    for count, seed in ((0, 0), (3, -1)):
        with pytest.raises(ValueError, match="must be positive, the seed 0 or more"):
            World(count, seed)


def test_data_set_rows_carry_the_whole_ground_truth(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    world = World(5, seed=4)
    stored, streamed = world_dataset(world), world_dataset(world, streaming=True)
    assert isinstance(streamed, IterableDataset) and streamed.num_shards == 5 and len(stored) == 5
    for index, (row, other) in enumerate(zip(stored, streamed, strict=True)):
        scene, captions = world.captioned(index, 5)
        for one in (row, other):
            assert np.array_equal(np.asarray(one["image"]), scene.image)
        assert np.array_equal(np.stack([np.asarray(mask) for mask in row["masks"]]) > 0, scene.masks)
        assert [(item["colour"], tuple(item["box"])) for item in row["objects"]] == [
            (item.colour, box) for item, box in zip(scene.objects, scene.boxes, strict=True)
        ]
        assert [(r["subject"], r["relation"], r["object"]) for r in row["relations"]] == scene.relations
        assert row["caption"] == other["caption"] == captions[0] and row["captions"] == captions
        assert row["background"] == scene.background
    with pytest.raises(ValueError, match="positive"):
        world_dataset(world, captions=0)
