"""Questions of the shapes world have the answers that the scenes have, and a file of questions is asked as it says."""

import json
import math

import numpy as np
import pytest

from devil_hf.data.shapes import ATTRIBUTE_WORDS
from devil_hf.data.worlds import World
from devil_hf.evaluation.choices import (
    ABSENT,
    LEFT_OUT,
    ChoicesSettings,
    _calibration,
    _refusals,
    _with_left_out,
    exams,
    read_exams,
)
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.questions.choices import NONE_WRONG, Calibration, Scale
from devil_hf.settings import make


def test_questions_of_a_scene_are_about_one_object_and_one_is_about_none():
    for scene in World(50, 4).scenes():
        *answered, absent = exams(scene)
        for exam in answered:
            words = set(exam.question.sentences[exam.answer].split()) - {"the"}
            having = [item for item in scene.objects if words <= set(item.attributes.values())]
            assert len(having) == 1 and exam.question.choices == ATTRIBUTE_WORDS[exam.kind]
        assert absent.kind == ABSENT and absent.answer is None
        shape = absent.question.text.split()[-1]
        assert shape in ATTRIBUTE_WORDS["shape"] and shape not in scene.words["shape"]
    assert len(answered) == 3, "of the last scene, all kinds"


def write(file, rows):
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_questions_of_a_file_are_asked_and_fitted(model, processor, images, tmp_path):
    asked = {"question": "the {} dog", "choices": ["red", "green"]}
    rows = []
    for at in range(4):
        images[at % 3].save(tmp_path / f"{at}.png")
        rows.append({"image": f"{at}.png", **asked, "answer": "red"})
        rows.append({"image": f"{at}.png", "question": "a {}", "choices": ["cat", "circle", "square"], "answer": None})
    file = write(tmp_path / "questions.jsonl", rows)
    settings = {"questions": file, "limit": 2, "fit": 2, "grid": 2, "output_dir": tmp_path / "out"}
    evaluation = evaluate("choices", make(ChoicesSettings, settings), model, processor)
    assert list(evaluation.scores) == ["all", *model.layer_names, "whole"]
    assert evaluation.controls["chance"]["accuracy"] == 0.5 and evaluation.settings["questions"] == 2
    assert {"accuracy", "answered", "refused", "sure"} == set(evaluation.scores["all"])
    found = Calibration.read(tmp_path / "out" / "calibration.json")
    assert found.grid == 2 and found.questions == 4 and set(found.scales) == set(evaluation.scores)
    found.check(model, processor)
    assert found.preprocessing["image_mean"] == list(processor.image_processor.image_mean)
    assert (tmp_path / "out" / "reliability.png").is_file()
    with pytest.raises(ValueError, match=r"asks 4 images, fewer than --limit 3 and --fit 2"):
        evaluate("choices", make(ChoicesSettings, settings | {"limit": 3}), model, processor)
    (tmp_path / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"questions.jsonl asks 1 images that are not there: .*3.png"):
        evaluate("choices", make(ChoicesSettings, settings))


def test_a_file_in_which_nothing_can_be_answered_is_refused_before_a_model_is_loaded(images, tmp_path):
    images[0].save(tmp_path / "0.png")
    images[0].save(tmp_path / "1.png")
    asked = {"question": "the {} dog", "choices": ["red", "green"]}
    rows = [{"image": f"{at}.png", **asked, "answer": None} for at in range(2)]
    settings = {"limit": 2, "fit": 2, "grid": 2, "output_dir": tmp_path / "out", "checkpoint": str(tmp_path / "none")}
    for at, part in ((0, "fit"), (2, "limit")):
        answered = [{"image": f"{name}.png", **asked, "answer": "red"} for name in (2, 3)]
        for name in (2, 3):
            images[0].save(tmp_path / f"{name}.png")
        file = write(tmp_path / "questions.jsonl", [*answered, *rows] if at == 0 else [*rows, *answered])
        with pytest.raises(ValueError, match=rf"no question of the images of --{part} has an answer"):
            evaluate("choices", make(ChoicesSettings, settings | {"questions": file}))


def test_the_truth_is_left_out_of_every_question_that_has_others():
    row = {"kind": "colour", "answer": 1, "evidence": {"all": [0.1, 0.9, 0.2]}, "habit": [-1.0, -2.0, -3.0]}
    few = {"kind": "", "answer": 0, "evidence": {"all": [0.1, 0.9]}, "habit": [-1.0, -2.0]}
    none = row | {"answer": None, "kind": ABSENT}
    *kept, left = _with_left_out([row, few, none])
    assert kept == [row, few, none], "of two choices one would be left"
    assert left == {"kind": LEFT_OUT, "answer": None, "evidence": {"all": [0.1, 0.2]}, "habit": [-1.0, -3.0]}
    found = _refusals([(0, row), (0, left), (0, none)], "all", Scale(0.02, 0.15))
    assert found == {"answered": 1.0, "refused_left_out": 0.0, "sure_left_out": 1.0, "refused_absent": 0.0, "sure_absent": 1.0}
    assert _refusals([(0, row), (0, left)], "all", Scale(0.02, 0.3))["refused_left_out"] == 1.0


def test_calibration_is_that_of_answered_questions():
    sure, refused = ({"answer": at, "evidence": {"all": values}} for at, values in ((0, [2.0, 0.0]), (1, [0.1, 0.0])))
    found = _calibration([sure, refused, refused], "all", Scale(0.1, 1.0))
    assert found["error"] == pytest.approx(0, abs=1e-6) and sum(count for count, *_ in found["bins"]) == 1
    assert math.isnan(_calibration([refused], "all", Scale(0.1, 1.0))["error"]), "nothing is answered"


def test_exact_probabilities_err_in_few_questions_and_wrong_ones_in_many():
    scale, random = Scale(1.0, -9.0), np.random.default_rng(1)

    def asked(count, sharper):
        rows = []
        for _ in range(count):
            values = random.normal(size=4)
            truth = random.choice(4, p=np.exp(values) / np.exp(values).sum())
            rows.append({"answer": int(truth), "evidence": {"all": (sharper * values).tolist()}})
        return _calibration(rows, "all", scale)

    few, many, wrong = asked(60, 1.0), asked(3000, 1.0), asked(600, 3.0)
    assert few["error"] > 0.05 and few["error_of_exact_probabilities"] == pytest.approx(few["error"], abs=0.06)
    assert many["error_of_exact_probabilities"] < 0.3 * few["error_of_exact_probabilities"] and many["error"] < 0.05
    assert min(few["p_of_exact"], many["p_of_exact"]) > 0.05
    assert wrong["error"] > 0.1 and wrong["p_of_exact"] == pytest.approx(1 / 201)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a {}", "choices": ["a", "b"], "answer": "a"}, "needs image, question, choices and answer"),
        ({"image": "a.png", "question": "a {}", "choices": ["a", "b"]}, "needs image, question, choices and answer"),
        ({"image": "a.png", "question": "a {}", "choices": ["a", "b"], "answer": "c"}, "'c' is not one of the choices"),
        ({"image": "a.png", "question": "a {}", "choices": ["a"], "answer": "a"}, "at least two"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, row, message):
    file = write(tmp_path / "questions.jsonl", [row])
    with pytest.raises(ValueError, match=f"questions.jsonl:1.*{message}"):
        read_exams(file)


@pytest.mark.slow
def test_the_shipped_checkpoint_knows_how_sure_it_may_be(tmp_path):
    settings = {"checkpoint": "shapes", "limit": 100, "fit": 100, "output_dir": tmp_path}
    evaluation = evaluate("choices", make(ChoicesSettings, settings))
    accuracy = {**evaluation.scores, **evaluation.controls}
    assert accuracy["all"]["accuracy"] >= 0.95 > 2 * max(accuracy[name]["accuracy"] for name in ("null", "chance"))
    assert evaluation.details["calibration"]["all"]["error"] <= 0.05
    assert evaluation.details["calibration"]["all"]["bound"] == NONE_WRONG
    assert min(evaluation.scores["all"][name] for name in ("answered", "refused_absent")) >= 0.9
