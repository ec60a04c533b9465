"""Knock-outs of words are added up as they are found, and the channels of a word carry its class."""

import pytest

from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.knock_out import KINDS, KnockOutEvaluationSettings, KnockOutEvaluator
from devil_hf.settings import make


def test_words_are_added_up_by_layer():
    evaluator = KnockOutEvaluator(make(KnockOutEvaluationSettings, {}))
    evaluator.open()
    evaluator.right = 1.0
    words = {
        "red": {"fall": 4.0, "random": 0.5, "least": 0.1, "others": 0.2, "p_value": 0.01, "ratio": 8.0},
        "ring": {"fall": 1.0, "random": 0.5, "least": 0.3, "others": 0.0, "p_value": 0.2, "ratio": 2.0},
    }
    evaluation = evaluator.score({"layer3": words})
    assert evaluation.scores == {"layer3": {"fall": 2.5, "ratio": 5.0, "three_times": 0.5, "significant": 0.5}}
    beside = {"fall_of_random": 0.5, "fall_of_least": 0.2, "fall_of_others": 0.1}
    assert evaluation.details["beside"]["layer3"] == pytest.approx(beside)
    with pytest.raises(ValueError, match="at least 20 scenes"):
        make(KnockOutEvaluationSettings, {"limit": 5}).validate()
    with pytest.raises(ValueError, match="there are 50 scenes"):
        make(KnockOutEvaluationSettings, {"fit": 50, "choose": 100}).validate()
    assert evaluation.details["left_out"] == {"layer3": len(KINDS) - 2} and evaluation.settings["choose"] == 100


def test_all_scenes_choose_where_there_are_few():
    settings = make(KnockOutEvaluationSettings, {"fit": 50})
    settings.validate()
    evaluator = KnockOutEvaluator(settings)
    evaluator.open()
    assert evaluator.decides()["choose"] == 50


@pytest.mark.slow
def test_planted_classes_fall_with_the_channels_of_their_words(tmp_path):
    settings = {"checkpoint": "shapes", "layers": ["layer3"], "limit": 20, "fit": 200, "others": 40, "draws": 39}
    evaluation = evaluate("knock-out", make(KnockOutEvaluationSettings, settings | {"output_dir": tmp_path}))
    scores = evaluation.scores["layer3"]
    assert scores["ratio"] >= 3 and scores["three_times"] >= 0.9 and scores["significant"] >= 0.9
    assert abs(evaluation.details["beside"]["layer3"]["fall_of_others"]) < scores["fall"] / 10
