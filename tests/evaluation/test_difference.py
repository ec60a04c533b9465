"""What is reported of a network that lost an attribute, and of equal ones, on the shapes world."""

import numpy as np
import pytest

from devil_hf.data.shapes import ATTRIBUTE_WORDS
from devil_hf.data.worlds import World
from devil_hf.evaluation.difference import DifferenceEvaluator, DifferenceSettings, redrawn
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.settings import make


@pytest.mark.parametrize("attribute", ATTRIBUTE_WORDS)
def test_one_attribute_is_drawn_anew_and_nothing_else(attribute):
    scenes = [World(40, 4).scene(number) for number in range(40)]
    changed = [redrawn(scene, attribute, np.random.default_rng(number)) for number, scene in enumerate(scenes)]
    pairs = [pair for one, two in zip(scenes, changed, strict=True) for pair in zip(one.objects, two.objects, strict=True)]
    assert any(one.attributes[attribute] != two.attributes[attribute] for one, two in pairs)
    for one, two in pairs:
        assert {**one.attributes, attribute: ""} == {**two.attributes, attribute: ""} and one.centre == two.centre
    assert any((one.image != two.image).any() for one, two in zip(scenes, changed, strict=True))


def test_shares_are_of_the_words_of_the_attribute_and_of_all_that_is_lost():
    class Model:
        layer_names = ("layer1",)

    evaluator = DifferenceEvaluator(make(DifferenceSettings, {}))
    evaluator.model, evaluator.world = Model(), World(200, 1)
    rows = {
        "texture": {"lost": {"all": ["plain", "striped", "red"], "layer1": ["dotted"]}, "gained": {"all": [], "layer1": []}},
        "copy:0": {"reported": 0, "certain": 0},
        "noise:0": {"reported": 0, "certain": 3},
        "noise:1": {"reported": 1, "certain": 1},
    }
    scores = evaluator.score(rows).scores
    assert scores == {
        "texture": {"recall": 3 / 8, "precision": 3 / 4},
        "copy": {"quiet": 1.0, "certain": 1.0},
        "noise": {"quiet": 0.5, "certain": 0.0},
    }


@pytest.mark.parametrize(("values", "named"), [({"limit": 10}, "--limit 10"), ({"attributes": ["size"]}, "'size' is none of")])
def test_wrong_settings_are_named(values, named):
    with pytest.raises(ValueError, match=named):
        make(DifferenceSettings, values)


@pytest.mark.slow
def test_unlearning_colour_loses_the_words_of_colour_and_no_others(tmp_path):
    settings = {"limit": 120, "splits": 20, "output_dir": str(tmp_path)}
    evaluation = evaluate("difference", make(DifferenceSettings, settings))
    assert evaluation.scores["colour"]["precision"] == 1.0 and evaluation.scores["colour"]["recall"] >= 0.9
    assert not any(evaluation.details["reported"]["colour"]["gained"].values())
    for null in ("copy", "views", "noise"):
        assert evaluation.scores[null]["quiet"] >= 0.95
