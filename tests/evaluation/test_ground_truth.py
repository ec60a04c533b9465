"""What each layer knows of the shapes world: answers against exact truth."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from devil_hf import DevilModel
from devil_hf.checkpoints.loading import load
from devil_hf.cli import main as cli
from devil_hf.data.shapes import ATTRIBUTE_WORDS, make_scene
from devil_hf.evaluation import knowledge
from devil_hf.evaluation import shapes as truth
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.maps.pointing import pointing
from devil_hf.evaluation.results import read_evaluations
from devil_hf.report.knowledge import knowledge_figure
from devil_hf.statistics import bootstrap

SCENES = 8


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The embedded checkpoint's answers, by the command line."""
    folder = tmp_path_factory.mktemp("shapes")
    assert cli.main(["evaluate", "shapes", "--limit", str(SCENES), "--output-dir", str(folder), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (folder / "shapes.jsonl").read_text().splitlines()[1:]]
    return folder, json.loads((folder / "scores.json").read_text()), {row["key"]: row["row"] for row in rows}


def test_depth_shows_in_shape_and_not_in_colour(answers):
    _, result, _ = answers
    places = result["places_chosen"]
    assert places["layer4"]["shape"] > 0.8 > 0.5 > places["layer1"]["shape"]
    assert places["layer2"]["colour"] > 0.8
    assert result["chosen"]["all"]["texture"] > result["chosen"]["constant"]["texture"] > result["chosen"]["chance"]["texture"]
    assert result["described"]["all"]["colour"]["f1"] > result["described"]["constant"]["colour"]["f1"]
    assert result["described"]["all"]["shape"]["f1"] > result["described"]["shuffled"]["shape"]["f1"]


def test_the_table_and_the_figure_show_every_layer(answers):
    folder, result, _ = answers
    table = knowledge.knowledge_table(result)
    for layer in ("all", "layer1", "layer2", "layer3", "layer4", "mean", "constant", "chance"):
        assert any(line.startswith(layer) for line in table.splitlines())
    assert "relation" in table and "size" in table and "count" in table
    picture = Image.open(folder / "layers.png")
    (evaluation,) = read_evaluations(folder / "scores.json")
    assert evaluation.scores["layer2"]["place_colour"] == result["places_chosen"]["layer2"]["colour"]
    assert evaluation.controls["chance"]["pointing_shape"] < evaluation.scores["mean"]["pointing_shape"]
    assert min(picture.size) > 300 and (folder / "layers.png").stat().st_size < 200_000


def test_intervals_are_over_scenes(answers):
    _, result, rows = answers
    for layer, metrics in result["intervals"].items():
        assert metrics and all(low <= result["scores"][layer][name] <= high for name, (low, high) in metrics.items())
    games = [[p["games"]["layer1"][0] for p in row["pointing"] if p["attribute"] == "texture"] for row in rows.values()]
    expected = bootstrap([sum(one) for one in games], [len(one) for one in games])
    assert result["intervals"]["layer1"]["pointing_texture"] == pytest.approx(expected)
    assert result["scores"]["layer2"]["pointing_colour"] == 1 and "pointing_colour" not in result["intervals"]["layer2"]
    assert "[" in knowledge.knowledge_table(result)
    assert any("f1_shape" in metrics for metrics in result["intervals"].values())


def test_answers_are_not_asked_twice(answers, monkeypatch):
    folder, result, _ = answers
    monkeypatch.setattr(DevilModel, "extract_features", None)
    settings = truth.ShapesSettings(limit=SCENES, output_dir=folder)
    again = evaluate("shapes", settings, *load("shapes", device="cpu"))
    assert json.loads(json.dumps(again.as_record())) == result
    with pytest.raises(ValueError, match="seed"):
        evaluate("shapes", replace(settings, seed=5), *load("shapes", device="cpu"))
    monkeypatch.setattr(truth, "INFORMED", (1, 1 / 32))
    with pytest.raises(ValueError, match=r"was made with \{'informed': \[2, 0.03125\]\}, not"):
        evaluate("shapes", settings, *load("shapes", device="cpu"))


def test_some_questions_have_the_same_answers_as_all(answers, tmp_path):
    """What `devil quickstart` asks: descriptions of every scene, pointing in the first ones."""
    _, result, rows = answers
    settings = truth.ShapesSettings(limit=4, questions=["described", "pointing"], pointing_limit=2, output_dir=tmp_path)
    few = evaluate("shapes", settings, *load("shapes", device="cpu"))
    found = {line["key"]: line["row"] for line in map(json.loads, (tmp_path / "shapes.jsonl").read_text().splitlines()[1:])}
    for key in "0123":
        assert found[key]["said"] == rows[key]["said"]
        assert found[key]["pointing"] == (rows[key]["pointing"] if int(key) < 2 else [])
    assert "chosen" not in few.details and set(few.scores["all"]) == {
        name for name in result["scores"]["all"] if name.startswith("f1_")
    }
    assert few.details["chance_pointing"] == np.mean(
        [chance for key in "01" for p in rows[key]["pointing"] for _, chance in p["games"].values()]
    )
    assert not (tmp_path / "layers.png").exists()


def test_places_and_maps_are_those_of_the_public_calls(answers):
    """Descriptions of places against `describe`, choices against `attribute`, pointing against the game played by hand."""
    _, _, rows = answers
    model, processor = load("shapes", device="cpu")
    scene, row = make_scene(1, 1), rows["1"]
    pixel_values = processor(images=scene.image)["pixel_values"]
    for layer in ("layer2", "layer4"):
        for answer in row["places"][layer]:
            said = model.describe(pixel_values, layers=layer, locations=[tuple(answer["place"])], max_new_tokens=40)
            assert processor.batch_decode(said.sequences, skip_special_tokens=True)[0].strip() == answer["text"]
            words = ATTRIBUTE_WORDS["shape"]
            maps = model.attribute(pixel_values, processor(text=list(words), carrier="the"), layer).maps[layer][0]
            at = answer["place"]
            assert words[int(maps[:, at[0], at[1]].argmax())] == answer["likeliest"]["shape"]
    for phrase in row["pointing"]:
        maps = model.attribute(pixel_values, processor(text=phrase["text"], carrier="the"), "layer3").maps["layer3"]
        (found,) = (p for p in scene.unique_phrases() if p.text == phrase["text"])
        assert phrase["games"]["layer3"][0] == pointing(maps[0, 0].numpy(), scene.masks[found.object_index])


def test_captions_of_the_grammar_are_perfect_descriptions():
    """A caption that names every object counts right, states true relations, and has perfect words."""
    stated, counted = [], []
    for index in range(300):
        scene = make_scene(3, index)
        caption = scene.caption(np.random.default_rng(index), fragment_share=0.0)
        held = knowledge.relations_hold(caption, scene)
        assert all(held), caption
        counted.append(knowledge.named_objects(caption) == len(scene.objects))
        scores = knowledge.word_scores([caption], [scene.words])
        assert all(score["f1"] == 1 for score in scores.values())
        if held:
            (relation,) = (word for word in knowledge.OPPOSITE if f" {word} " in caption)
            wrong = caption.replace(f" {relation} ", f" {knowledge.OPPOSITE[relation]} ")
            stated.append(any(knowledge.relations_hold(wrong, scene)))
    assert all(counted) and len(stated) > 30 and not any(stated)


def test_choices_differ_in_one_thing_and_the_first_is_true():
    relations = 0
    for index in range(60):
        scene = make_scene(4, index)
        options = knowledge.choices(scene)
        words = [option.split() for option in options["size"]]
        assert {one[1] for one in words} == {"small", "medium", "large"} and words[0][1] == scene.objects[0].size
        assert len({tuple(one[:1] + one[2:]) for one in words}) == 1
        if "relation" in options:
            relations += 1
            assert knowledge.relations_hold(options["relation"][0], scene) == [True]
            assert knowledge.relations_hold(options["relation"][1], scene) == [False]
    assert relations > 20


def test_a_translator_that_sees_nothing_chooses_no_better_than_chance():
    """All options then have the same evidence: the true one, which `choices` names first, must not win."""
    model, processor = load("shapes", device="cpu")
    torch.nn.init.zeros_(model.translator.output.weight)
    indices = [index for index in range(40) if make_scene(1, index).relations][:6]
    scenes = [make_scene(1, index) for index in indices]
    with torch.no_grad():
        features = model.extract_features(truth.pixel_values(processor, scenes))
        chosen = truth._choose(model, processor, features, scenes, range(6))
    for name, chance in (("size", 1 / 3), ("relation", 1 / 2)):
        right = [row["all"][name] == knowledge.choices(scene)[name][0] for row, scene in zip(chosen, scenes, strict=True)]
        assert np.mean(right) == pytest.approx(chance)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (32, 32)])
def test_places_hold_most_of_an_object_or_nothing(grid):
    side = 128 // grid[0]
    empty = 0
    for index in range(12):
        scene = make_scene(5, index)
        cells = scene.masks.reshape(len(scene.objects), grid[0], side, grid[1], side).sum(axis=(2, 4))
        for item, row, column in truth.object_places(scene, grid):
            if item is None:
                assert cells[:, row, column].sum() == 0
                empty += 1
            else:
                assert cells[item, row, column] == cells[item].max()
    assert empty > 8


def test_no_constant_answer_beats_the_constant_row():
    truths = [{name: knowledge._true_words(make_scene(6, index), name) for name in knowledge.CLASSES} for index in range(40)]
    best = knowledge.constant_scores(truths)
    generator = np.random.default_rng(0)
    for name, words in knowledge.CLASSES.items():
        for _ in range(30):
            text = " ".join(word for word in words if generator.random() < 0.5)
            only = [{name: one[name]} for one in truths]
            assert knowledge.word_scores([text] * 40, only)[name]["f1"] <= best[name]["f1"] + 1e-9


def test_the_figure_is_white_at_chance_and_blue_at_always_right():
    panels = {"a question": {"layer1": {"colour": 0.25, "shape": 1.0}, "layer2": {"colour": 1.0}}}
    figure = np.asarray(knowledge_figure(panels, {"a question": {"colour": 0.25, "shape": 0.2}}, "What"))
    blue = (np.abs(figure.astype(int) - (24, 78, 148)).sum(axis=2) == 0).sum()
    pale = (np.abs(figure.astype(int) - (246, 248, 251)).sum(axis=2) == 0).sum()
    assert blue / pale == pytest.approx(2, rel=0.1)
    worse = {"a question": {"layer1": {"colour": 0.25, "shape": 0.1}, "layer2": {"colour": 0.25}}}
    figure = np.asarray(knowledge_figure(worse, {"a question": {"colour": 0.25, "shape": 0.2}}, "What"))
    assert (np.abs(figure.astype(int) - (24, 78, 148)).sum(axis=2) == 0).sum() == 0


def test_one_scene_is_too_few(tmp_path, capsys):
    assert cli.main(["evaluate", "shapes", "--limit", "1", "--output-dir", str(tmp_path)]) == 1
    assert "at least 2" in capsys.readouterr().err


def test_results_name_the_world_that_was_measured(answers, tmp_path):
    assert answers[1]["dataset"]["name"] == "shapes world, seed 1 (held-out scenes)"
    options = ["--limit", "2", "--output-dir", str(tmp_path), "--device", "cpu"]
    assert cli.main(["evaluate", "shapes", "--seed", "0", *options]) == 0
    assert read_evaluations(tmp_path / "scores.json")[0].dataset["name"] == "shapes world, seed 0 (training scenes)"
