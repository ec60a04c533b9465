"""Questions of the shapes world have the answers that the scenes have, and a file of questions is asked as it says."""

import json

import pytest

from devil_hf.data.shapes import ATTRIBUTE_WORDS
from devil_hf.data.worlds import World
from devil_hf.evaluation.choices import ABSENT, ChoicesSettings, exams, read_exams
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.questions.choices import Calibration
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
    assert {"accuracy", "answered", "refused"} == set(evaluation.scores["all"])
    found = Calibration.read(tmp_path / "out" / "calibration.json")
    assert found.grid == 2 and found.questions == 4 and set(found.scales) == set(evaluation.scores)
    found.check(model)
    assert (tmp_path / "out" / "reliability.png").is_file()
    with pytest.raises(ValueError, match=r"asks 4 images, fewer than --limit 3 and --fit 2"):
        evaluate("choices", make(ChoicesSettings, settings | {"limit": 3}), model, processor)


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
    assert min(evaluation.scores["all"][name] for name in ("answered", "refused")) >= 0.9
