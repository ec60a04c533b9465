"""`devil ask` in the process, on the shipped checkpoint."""

import json

import pytest
from PIL import Image

from devil_hf.checkpoints import locate
from devil_hf.cli.main import main
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.evaluation.choices import exams
from devil_hf.questions.choices import Calibration, Scale


@pytest.fixture(scope="module")
def scene():
    return next(scene for scene in World(50, HELD_OUT_WORLD).scenes() if len(scene.objects) == 2)


@pytest.fixture
def picture(scene, tmp_path):
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def test_an_object_is_asked_for_its_colour_and_one_that_is_not_there_has_none(scene, picture, capsys):
    first, *_, absent = exams(scene)
    for exam in (first, absent):
        asked = ["ask", picture, "--checkpoint", "shapes", "--question", exam.question.text, "--choices", *exam.question.choices]
        assert main([*asked, "--least-evidence", "0.3", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["answer"] == ("not encoded" if exam.answer is None else exam.question.choices[exam.answer])
        assert row["image"] == picture and set(row["evidence"]) == set(exam.question.choices)
        assert (row["probabilities"] is None) == (exam.answer is None)
    assert main([*asked, "--least-evidence", "0.3"]) == 0
    told = capsys.readouterr().out
    assert f"{picture}: not encoded" in told and "no choice has the least evidence of +0.30" in told
    assert "shapes world, seed 1" in told and "where no choice is true, a probability promises nothing" in told
    assert main([*asked[:4], "--question", first.question.text, "--choices", *first.question.choices]) == 0
    assert (
        "(not calibrated: its temperature is at the bound, no answer, or too few, clearly wrong where it was to be fitted)"
        in capsys.readouterr().out
    )


def test_what_cannot_be_asked_ends_before_the_checkpoint_is_opened(picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("devil_hf.checkpoints.loading.open_checkpoint", None)
    asked = ["ask", picture, "--question", "the {} square", "--choices"]
    assert main([*asked, "red"]) == 1
    assert "at least two" in capsys.readouterr().err
    assert main([*asked, "red", "blue", "--grid", "100000"]) == 1
    assert "grid=100000: at most 64 places" in capsys.readouterr().err
    assert main([*asked, "red", "red"]) == 1
    assert "given twice" in capsys.readouterr().err
    assert main([*asked, "red", "blue", "--calibration", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    assert main(["ask", "--checkpoint", "somewhere", "--question", "{}", "--choices", "red", "blue"]) == 1
    assert "name an image for somewhere" in capsys.readouterr().err


def test_a_calibration_of_another_checkpoint_is_refused(picture, tmp_path, capsys):
    Calibration({"all": Scale()}, 4, "tests", 1, "0" * 64, "0" * 64).write(tmp_path / "scales.json")
    asked = ["ask", picture, "--question", "the {} square", "--choices", "red", "blue"]
    assert main([*asked, "--calibration", str(tmp_path / "scales.json")]) == 1
    assert "another translator" in capsys.readouterr().err


def test_rounded_weights_are_asked_without_the_calibration_beside_them(picture, tmp_path, capsys):
    asked = ["ask", picture, "--checkpoint", "shapes", "--question", "the {} square", "--choices", "red", "blue", "--grid", "1"]
    assert main([*asked, "--quantize", "int8"]) == 0
    shown = capsys.readouterr()
    assert "calibration beside the checkpoint is left out" in shown.err and "not calibrated" in shown.out
    assert main(asked) == 0
    assert "left out" not in capsys.readouterr().err
    Calibration.beside(locate("shapes")).write(tmp_path / "scales.json")
    assert main([*asked, "--quantize", "int8", "--calibration", str(tmp_path / "scales.json")]) == 1
    assert "the calibration is of another translator" in capsys.readouterr().err


def test_the_network_looks_once(picture, capsys, monkeypatch):
    from devil_hf.model.modeling_devil import DevilModel

    looks = []
    extract = DevilModel.extract_features
    monkeypatch.setattr(DevilModel, "extract_features", lambda *given: looks.append(1) or extract(*given))
    assert main(["ask", picture, "--question", "the {} square", "--choices", "red", "blue", "--grid", "1"]) == 0
    assert len(looks) == 1, "for the scope's warning and the answer"
