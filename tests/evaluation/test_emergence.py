"""What is true of an image is read from what is known of it, and the evaluation over it can be read again."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from devil_hf.data.labels import open_labelled
from devil_hf.data.worlds import World
from devil_hf.evaluation.emergence import (
    EmergenceEvaluator,
    EmergenceSettings,
    read_groups,
    statements_of_labels,
    statements_of_scene,
    true_of_scene,
    true_of_texts,
)
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.settings import make


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Six pictures of each of two classes."""
    root = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for name in ("red_dog", "blue"):
        (root / name).mkdir()
        for number in range(6):
            Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
    return root


def test_the_classes_of_the_shapes_world_are_true_as_the_scene_says():
    scene = next(scene for scene in map(World(50, 4).scene, range(50)) if scene.relations)
    said = statements_of_scene(7, scene)
    assert {one.group for one in said} == {"colour", "texture", "shape", "size", "relation"} and {one.image for one in said} == {
        7
    }
    for kind in ("colour", "texture", "shape"):
        assert {one.phrase for one in said if one.group == kind and one.true} == scene.words[kind]
    for kind, options in (("size", 3), ("relation", 2)):
        own = [one.phrase for one in said if one.group == kind]
        assert len(own) == options and true_of_scene(own[0], scene)


def test_phrases_are_true_of_one_object_of_a_scene():
    scene = next(scene for scene in map(World(50, 4).scene, range(50)) if len(scene.objects) == 2 and scene.relations)
    one, other = (item.attributes for item in scene.objects)
    assert true_of_scene(f"a {one['colour']} {one['shape']}", scene) and true_of_scene(scene.objects[1].size, scene)
    crossed = f"a {one['texture']} {one['colour']} {other['shape']}"
    assert true_of_scene(crossed, scene) is any(
        {one["texture"], one["colour"], other["shape"]} <= {*o.values()} for o in (one, other)
    )
    for wrong, message in (("a dog", "has no ['dog']"), ("the", "names no colour"), ("a star and a ring", "several objects")):
        with pytest.raises(ValueError, match=re.escape(message)):
            true_of_scene(wrong, scene)


def test_names_are_whole_and_captions_are_searched():
    assert true_of_texts("a Dog", ["dog"], named=True) and true_of_texts("hot dog", ["hot_dog"], named=True)
    assert not true_of_texts("dog", ["hot dog"], named=True), "a hot dog is no dog"
    assert true_of_texts("the red dog", ["A cat, a red dog."], named=False)
    assert not true_of_texts("dog", ["dogs at play"], named=False)


def test_folders_of_classes_are_read_one_of_each_in_turn(classes, tmp_path):
    data = open_labelled(str(classes), limit=5)
    assert data.named and data.texts == [["blue"], ["red dog"], ["blue"], ["red dog"], ["blue"]]
    assert data.load(1).size == (40, 40) and data.identity(0) != data.identity(1)
    said = statements_of_labels(data, {}, None)
    assert [[one.true for one in own] for own in said] == [[name == t for name in ("blue", "red dog")] for (t,) in data.texts]
    with pytest.raises(ValueError, match=r"'a cat' is true of none of the 5 images of .*; its names are blue, red dog"):
        statements_of_labels(data, {"a cat": ["a cat"]}, None)
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    with pytest.raises(ValueError, match=r"alone\.png lies in no folder of a class"):
        open_labelled(str(tmp_path))


def test_labelled_objects_may_say_where_images_and_names_are(tmp_path, classes):
    for place in ("labels", "elsewhere"):
        (tmp_path / place).mkdir()
    (tmp_path / "labels" / "one.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    Image.new("RGB", (40, 40)).save(tmp_path / "elsewhere" / "one.png")
    (tmp_path / "names.txt").write_text("red dog\n")
    with pytest.raises(FileNotFoundError, match=r"--images"):
        open_labelled(str(tmp_path / "labels"))
    data = open_labelled(str(tmp_path / "labels"), None, 5, tmp_path / "elsewhere", str(tmp_path / "names.txt"))
    assert data.texts == [["red dog"]] and data.load(0).size == (40, 40)
    settings = {"source": str(tmp_path / "labels"), "images": tmp_path / "elsewhere", "names": str(tmp_path / "names.txt")}
    run = EmergenceEvaluator(make(EmergenceSettings, settings))
    with pytest.raises(ValueError, match="all 1 statements of 'names' are true"):
        run.open()
    with pytest.raises(ValueError, match=r"has no objects by COCO, VOC or YOLO, which --images and --names are of"):
        open_labelled(str(classes), names="names.txt")


def test_captions_need_phrases(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    lines = [{"file_name": "a.png", "text": "a red dog"}, {"file_name": "b.png", "text": "a cat"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = open_labelled(str(tmp_path))
    assert not data.named
    assert [own[0].true for own in statements_of_labels(data, {"dog": ["dog"]}, None)] == [True, False]
    with pytest.raises(ValueError, match="has captions and no names"):
        statements_of_labels(data, {}, None)


def test_groups_are_read_from_the_command_line():
    assert read_groups(["a dog", "colour=red, blue"]) == {"a dog": ["a dog"], "colour": ["red", "blue"]}
    for wrong in (["="], ["colour=red,"], ["a", "a"], ["x=red,red"], [" "]):
        with pytest.raises(ValueError, match=r"is no PHRASE|says something twice"):
            read_groups(wrong)


def test_an_evaluation_over_folders_of_classes_and_its_picture(model, processor, classes, tmp_path):
    values = {"source": str(classes), "phrases": ["blue", "both=red dog,blue"], "output_dir": str(tmp_path / "out")}
    (classes / "blue" / "6.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"'blue': .* cannot tell anything from chance"):
        evaluate("emergence", make(EmergenceSettings, values | {"limit": 4}), model, processor)
    settings = make(EmergenceSettings, values)
    evaluation = evaluate("emergence", settings, model, processor)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["dataset"]["size"] == 12 and scores["bad_images"] == 1
    assert list(scores["scores"]) == [*model.layer_names, "all"] and list(scores["depths"]) == ["blue", "both"]
    assert scores["within"] == {"blue": False, "both": True} and "blue - both" in scores["leads"]
    assert "above chance at" in evaluation.text and Image.open(tmp_path / "out" / "emergence.png").width > 800
    again = evaluate("emergence", settings, model, processor)
    assert again.scores == evaluation.scores


@pytest.mark.slow
def test_colour_is_readable_before_shape_and_shape_before_relation(tmp_path):
    evaluation = evaluate(
        "emergence", make(EmergenceSettings, {"checkpoint": "shapes", "limit": 100, "output_dir": str(tmp_path)})
    )
    layers = [layer for layer in evaluation.scores if layer != "all"]
    at = {group: layers.index(layer) if layer else len(layers) for group, layer in evaluation.details["first"].items()}
    assert at["colour"] <= at["shape"] <= at["relation"]
    leads = evaluation.details["leads"]
    assert leads["colour - shape"]["layer1"]["interval"][0] > 0.1 and leads["shape - relation"]["layer3"]["interval"][0] > 0.1
