"""Promises of the embedded world: exact ground truth, the same scene everywhere, true captions."""

import time

import numpy as np
import pytest
import torch

from devil_hf.data.rendering import SCENE_SIZE, SceneObject
from devil_hf.data.shapes import ATTRIBUTE_WORDS, COLOURS, RELATIONS, VOCABULARY, Scene, make_scene, sample_scene
from devil_hf.data.worlds import World
from devil_hf.evaluation.maps.pointing import chance_pointing, hit_cells, pointing
from devil_hf.evaluation.text.words import WordCounts, words_of


def plain_object(shape: str = "square", centre: tuple[float, float] = (64.0, 64.0), **changes) -> SceneObject:
    values = {
        "colour": "red",
        "texture": "plain",
        "shape": shape,
        "size": "medium",
        "centre": centre,
        "radius": 20.0,
        "rgb": (208.0, 32.0, 36.0),
    }
    drawing = {"rotation": 0.0, "texture_angle": 0.0, "texture_period": 8.0, "texture_phase": (0.0, 0.0)}
    return SceneObject(**(values | drawing | changes))


# ------------------------------------------------------------------------------------------------------------------
# scenes


def test_a_scene_is_a_function_of_seed_and_index():
    first, again = make_scene(3, 11), make_scene(3, 11)
    assert first == again
    assert np.array_equal(first.image, again.image) and np.array_equal(first.masks, again.masks)
    assert make_scene(3, 12) != first and make_scene(4, 11) != first


def test_scenes_hold_one_to_three_objects_of_every_kind_inside_the_picture():
    scenes = [make_scene(0, index) for index in range(600)]
    counts = np.bincount([len(scene.objects) for scene in scenes], minlength=4) / len(scenes)
    assert np.allclose(counts, [0, 0.3, 0.4, 0.3], atol=0.06)
    objects = [item for scene in scenes for item in scene.objects]
    for attribute, words in ATTRIBUTE_WORDS.items():
        shares = np.array([sum(item.attributes[attribute] == word for item in objects) for word in words]) / len(objects)
        assert np.allclose(shares, 1 / len(words), atol=0.05), attribute
    assert all(item.radius <= value <= SCENE_SIZE - item.radius for item in objects for value in item.centre)
    assert [len(sample_scene(np.random.default_rng(0), count).objects) for count in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("count", [0, 4])
def test_an_impossible_number_of_objects_is_refused(count):
    with pytest.raises(ValueError, match="1 to 3 objects"):
        sample_scene(np.random.default_rng(0), count)


def test_masks_are_the_visible_pixels_of_each_object():
    below, above = (
        plain_object(centre=(50.0, 64.0)),
        plain_object("circle", centre=(74.0, 64.0), colour="blue", rgb=(40.0, 66.0, 208.0)),
    )
    scene = Scene((below, above), "light", 0)
    assert scene.image.shape == (SCENE_SIZE, SCENE_SIZE, 3) and scene.image.dtype == np.uint8
    alone = Scene((below,), "light", 0).masks[0]
    assert scene.masks.sum(0).max() == 1
    assert np.array_equal(scene.masks[0], alone & ~scene.masks[1]) and scene.masks[0].sum() < alone.sum()
    for mask, item in zip(scene.masks, scene.objects, strict=True):
        assert np.abs(scene.image[mask].mean(0) - item.rgb).max() < 12
    assert scene.image[:30].min() > 150


@pytest.mark.parametrize("shape", ATTRIBUTE_WORDS["shape"])
def test_shapes_have_their_own_area(shape):
    areas = {
        "circle": np.pi,
        "square": 4 * 0.88**2,
        "triangle": 3 * 3**0.5 * 0.58**2,
        "cross": 8 * 0.34 - 4 * 0.34**2,
        "ring": 2 * np.pi * 0.74 * 0.54,
    }
    areas["star"] = 5 * 1.15**2 * 0.45 * np.sin(np.pi / 5)
    area = Scene((plain_object(shape),), "dark", 0).masks[0].sum() / 20.0**2
    assert area == pytest.approx(areas[shape], rel=0.06)


def test_boxes_hold_exactly_the_visible_pixels():
    for index in range(20):
        scene = make_scene(1, index)
        for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()


def test_edges_are_anti_aliased():
    image = Scene((plain_object("circle"),), "light", 0).image.astype(int)
    assert len(np.unique(image[..., 1])) > 10


@pytest.mark.parametrize("texture", ATTRIBUTE_WORDS["texture"])
def test_textures_differ_in_contrast_inside_the_object(texture):
    scene = Scene((plain_object(texture=texture),), "light", 0)
    inside = scene.image[scene.masks[0]].astype(float)[:, 0]
    assert (inside.std() > 25) == (texture != "plain")


def test_every_object_keeps_most_of_itself_visible():
    for index in range(200):
        scene = make_scene(2, index)
        for position, item in enumerate(scene.objects):
            whole = Scene((item,), scene.background, 0).masks[0].sum()
            assert scene.masks[position].sum() > 0.7 * whole


def test_a_core_draws_hundreds_of_scenes_per_second():
    world = World(200, seed=5)
    start = time.process_time()
    for index in range(len(world)):
        assert world.captioned(index, 1)[0].image.any()
    assert 200 / (time.process_time() - start) > 200


# ----------------------------------------------------------------------------------------------------------------
# captions


def test_captions_stay_in_the_vocabulary_and_name_only_what_is_there():
    rng = np.random.default_rng(0)
    attributes = {word for words in ATTRIBUTE_WORDS.values() for word in words}
    for index in range(500):
        scene = make_scene(6, index)
        words = scene.caption(rng).split()
        assert set(words) <= set(VOCABULARY)
        assert set(words) & attributes <= set().union(*scene.words.values())
        assert len(words) <= 32


def test_full_captions_name_every_object_and_fragments_one():
    rng = np.random.default_rng(1)
    for index in range(200):
        scene = make_scene(7, index)
        full = scene.caption(rng, fragment_share=0.0).split()
        for item in scene.objects:
            assert set(item.attributes.values()) <= set(full)
        fragment = set(scene.caption(rng, fragment_share=1.0).split())
        said = {attribute: fragment & set(words) for attribute, words in ATTRIBUTE_WORDS.items()}
        assert any(all(words <= {item.attributes[attribute]} for attribute, words in said.items()) for item in scene.objects)


def test_captions_vary_and_repeat_with_the_generator():
    scene = make_scene(8, 2)
    texts = [scene.caption(np.random.default_rng(seed)) for seed in range(50)]
    assert len(set(texts)) > 25
    assert texts == [scene.caption(np.random.default_rng(seed)) for seed in range(50)]


def test_relations_hold_for_the_centres_and_come_with_their_converse():
    converse = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    for index in range(100):
        scene = make_scene(9, index)
        for subject, relation, other in scene.relations:
            (x, y), (other_x, other_y) = scene.objects[subject].centre, scene.objects[other].centre
            assert {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}[relation]
            assert (other, converse[relation], subject) in scene.relations


def test_stated_relations_are_true():
    left, right = plain_object(centre=(30.0, 64.0)), plain_object("circle", centre=(95.0, 64.0), colour="blue")
    scene, rng = Scene((left, right), "dark", 0), np.random.default_rng(0)
    stated = [text for text in (scene.caption(rng, 0.0) for _ in range(300)) if "left of" in text or "right of" in text]
    assert stated
    for text in stated:
        before, after = text.split("left of" if "left of" in text else "right of")
        assert ("red" in before and "blue" in after) == ("left of" in text)
    assert not any(relation in text for text in stated for relation in ("above", "below"))


def test_unique_phrases_are_deserved_by_exactly_one_of_several_objects():
    for index in range(100):
        scene = make_scene(10, index)
        phrases = scene.unique_phrases()
        assert len(scene.objects) > 1 or not phrases
        for phrase in phrases:
            owners = [i for i, item in enumerate(scene.objects) if phrase.text in item.attributes.values()]
            assert owners == [phrase.object_index] and phrase.text in ATTRIBUTE_WORDS[phrase.attribute]
    twins = Scene((plain_object(centre=(30.0, 30.0)), plain_object("ring", centre=(90.0, 90.0))), "dark", 0)
    assert {phrase.text for phrase in twins.unique_phrases()} == {"square", "ring"}


# -----------------------------------------------------------------------------------------------------------------
# metrics


@pytest.mark.parametrize("grid", [(32, 32), (4, 4), (7, 5)])
@pytest.mark.parametrize("tolerance", [0.0, 0.5, 1.3])
def test_hit_cells_equals_the_distance_to_every_pixel(grid, tolerance):
    mask = make_scene(0, 5).masks[0][:120]
    hits = hit_cells(grid, mask, tolerance)
    size = np.array(mask.shape) / grid
    pixels = np.argwhere(mask) + 0.5
    slack = max(tolerance, 0.5 * np.hypot(*(1 / size)))
    for i in range(grid[0]):
        for j in range(grid[1]):
            distance = np.hypot(*((pixels / size - (i + 0.5, j + 0.5)).T)).min()
            assert hits[i, j] == (distance <= slack), (i, j)


def test_pointing_game_and_its_chance():
    mask = np.zeros((128, 128), dtype=bool)
    mask[32:64, 64:96] = True  # exactly cell (1, 2) of a 4 x 4 grid
    attribution = torch.zeros(4, 4)
    attribution[1, 2] = 1.0
    assert pointing(attribution, mask) and not pointing(attribution.T, mask)
    assert chance_pointing((4, 4), mask) == 1 / 16
    assert chance_pointing((4, 4), np.ones((128, 128))) == 1.0
    with pytest.raises(ValueError, match="shows no object"):
        pointing(attribution, np.zeros((128, 128)))
    with pytest.raises(ValueError, match="finite"):
        pointing(attribution.fill_(float("nan")), mask)


def test_word_counts_are_of_sets_of_words_over_all_texts():
    assert words_of("A red, RED circle.") == {"a", "red", "circle"}
    counts = WordCounts(COLOURS)
    assert counts.precision is counts.recall is counts.f1 is None, "of no words nothing is defined"
    counts.add("a red red blue thing", {"red", "circle"})
    counts.add("nothing", {"green"})
    assert (counts.precision, counts.recall, counts.f1) == (0.5, 0.5, 0.5)
    for index in range(20):
        scene = make_scene(0, index)
        caption = scene.caption(np.random.default_rng(0), fragment_share=0.0)
        for attribute, words in ATTRIBUTE_WORDS.items():
            counts = WordCounts(words)
            counts.add(caption, scene.words[attribute])
            assert counts.f1 == 1.0
