"""Descriptions of regions are those of asking one region after the other, and their scores those of a loop."""

import json

import numpy as np
import pytest
from PIL import Image

from devil_hf.data.objects import open_localised
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.regions import ALL, EVERY, WHOLE, RegionScores, RegionsSettings
from devil_hf.evaluation.text.head_words import head_word
from devil_hf.evaluation.text.metrics import caption_scores
from devil_hf.settings import make

SIZE = (64, 48)
BOXES = {"1": [[2, 2, 20, 20]], "2": [[30, 10, 20, 30]], "3": [[0, 0, 10, 10], [40, 30, 20, 10]], "4": [[63, 0, 0.2, 1]]}
ENTITIES = [
    {"entity": "1", "types": ["people"], "phrases": ["A small girl", "A child"], "boxes": BOXES["1"]},
    {"entity": "2", "types": ["clothing", "other"], "phrases": ["a red hat"], "boxes": BOXES["2"]},
    {"entity": "3", "types": ["animals"], "phrases": ["two dogs", "a child"], "boxes": BOXES["3"]},
    {"entity": "4", "types": ["other"], "phrases": ["a hair"], "boxes": BOXES["4"]},  # covers no pixel's centre
    {"entity": "5", "types": ["scene"], "phrases": ["the beach"], "boxes": []},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Entities of three images; the last image is broken."""
    place = tmp_path_factory.mktemp("entities")
    lines = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        kept = ENTITIES if number != 1 else ENTITIES[:1]
        lines.append({"image": f"{number}.png", "split": "val", "size": list(SIZE), "regions": kept, "scene_phrases": []})
    (place / "2.png").write_bytes(b"no image")
    (place / "regions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


@pytest.fixture(scope="module")
def result(folder, model, processor, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    asked = {"source": f"{folder}:val", "batch_size": 3, "max_new_tokens": 5, "output_dir": str(output)}
    found = evaluate("regions", make(RegionsSettings, {"checkpoint": "shapes", **asked}), model, processor)
    rows = [json.loads(line) for line in (output / "descriptions.jsonl").read_text().splitlines()]
    return found, [row["row"] for row in rows if "row" in row]


def test_things_are_told_apart_where_one_phrase_is_of_two(folder):
    image = open_localised(f"{folder}:val")[0]
    assert [one.phrases for one in image.regions][:3] == [("a small girl", "a child"), ("a red hat",), ("two dogs", "a child")]
    assert len(image.parts["a child"]) == 3 and [len(one.parts) for one in image.regions] == [1, 1, 2, 1]
    assert [one.group for one in image.regions] == ["people", "clothing", "animals", "other"]


def test_objects_of_scenes_are_called_by_all_of_their_words():
    for image in open_localised("shapes:5:1"):
        for one in image.regions:
            assert all(set(phrase.split()[1:]) <= image.present for phrase in one.phrases)


def test_regions_of_a_batch_are_described_as_each_alone(folder, result, model, processor):
    _, rows = result
    assert [len(row["regions"]) for row in rows] == [3, 1, 0] and [row["out_of_sight"] for row in rows] == [1, 0, 0]
    for number, row in enumerate(rows[:2]):
        image = Image.open(folder / f"{number}.png").convert("RGB")
        pixels = processor(images=image, return_tensors="pt")
        for one, (left, top, width, height) in zip(row["regions"][:2], [BOXES["1"][0], BOXES["2"][0]], strict=False):
            mask = np.zeros(SIZE[::-1], dtype=bool)
            mask[top : top + height, left : left + width] = True
            regions = processor.masks_to_regions([mask])
            for name, said in one["said"].items():
                layers = None if name == ALL else name
                ids = model.generate(**pixels, regions=regions, layers=layers, max_new_tokens=5)
                assert said == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        ids = model.generate(**pixels, max_new_tokens=5)
        assert row["whole"] == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_what_stands_beside_is_there_and_what_is_left_out_is_counted(result, model):
    found, _ = result
    assert list(found.scores) == [ALL, *model.layer_names] and set(found.controls) == {"shuffled", "null"}
    assert found.settings["bad_images"] == 1 and found.settings["out_of_sight"] == 1 and found.settings["regions"] == 4
    assert set(found.details["groups"]) == {EVERY, "people", "clothing", "animals"}
    assert found.details["counts"] == {EVERY: 4, "people": 2, "animals": 1, "clothing": 1}
    assert WHOLE in found.details["baselines"] and {WHOLE, "shuffled", "null"} == set(found.details["lead"])
    assert "language model alone" in found.text and "1 bad images" in found.text


ROWS = [
    {"regions": [{"phrases": ["a dog", "the brown dog"], "group": "animals"}, {"phrases": ["a red hat"], "group": "clothing"}]},
    {"regions": [{"phrases": ["two men"], "group": "people"}, {"phrases": ["a horse"], "group": "animals"}]},
    {"regions": [{"phrases": ["the water"], "group": "other"}]},
]
SAID = {ALL: ["dogs in water", "a hat", "a man", "a dog", "a big wave"], WHOLE: ["a dog"] * 5}


def test_scores_are_those_of_a_loop_and_of_the_caption_metrics():
    judged = RegionScores(ROWS, SAID)
    phrases = [one["phrases"] for row in ROWS for one in row["regions"]]
    expected = caption_scores(SAID[ALL], phrases)
    values = judged.values(EVERY, ALL)
    right = [any(head_word(said) == head_word(phrase) for phrase in one) for said, one in zip(SAID[ALL], phrases, strict=True)]
    assert values == pytest.approx(expected | {"head_word": np.mean(right)}) and right == [True, True, True, False, False]
    assert judged.values("animals", ALL)["head_word"] == 0.5 and judged.values("people", WHOLE)["head_word"] == 0


def test_intervals_are_of_images_drawn_again():
    judged = RegionScores(ROWS, SAID)
    drawn = []
    for draw in judged.draws.astype(int):
        hits = [[1, 1], [1, 0], [0]]
        several = [hit for times, own in zip(draw, hits, strict=True) for _ in range(times) for hit in own]
        drawn.append(np.mean(several))
    assert judged.intervals(EVERY, ALL)["head_word"] == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))))
    assert judged.intervals("people", ALL)["bleu_1"] is None is judged.intervals("people", ALL)["head_word"], "one image"
    value, low, high = judged.lead(WHOLE)["head_word"]
    assert value == pytest.approx(0.4) and low <= value <= high
    assert judged.lead(ALL)["head_word"] == (0, 0, 0), "paired"


def test_a_source_without_a_usable_image_says_why(folder, model, processor, tmp_path):
    (folder / "bad").mkdir()
    (folder / "bad" / "0.png").write_bytes(b"no image")
    line = {"image": "0.png", "size": list(SIZE), "regions": ENTITIES[:1], "scene_phrases": []}
    (folder / "bad" / "regions.jsonl").write_text(json.dumps(line))
    asked = {"checkpoint": "shapes", "source": str(folder / "bad"), "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"no region of 1 images can be described; the first: broken image"):
        evaluate("regions", make(RegionsSettings, asked), model, processor)
    with pytest.raises(ValueError, match="layer"):
        evaluate("regions", make(RegionsSettings, asked | {"layers": ["layer9"]}), model, processor)


@pytest.mark.slow
def test_the_shipped_checkpoint_calls_objects_by_their_name(tmp_path):
    asked = {"checkpoint": "shapes", "source": "shapes:60:1", "output_dir": str(tmp_path)}
    found = evaluate("regions", make(RegionsSettings, asked))
    value, low, _ = found.details["lead"][WHOLE]["head_word"]
    assert found.scores[ALL]["head_word"] >= 0.9 and value > low > 0.2
