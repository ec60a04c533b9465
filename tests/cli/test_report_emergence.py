"""`devil report emergence` draws one image, or labelled ones, and says what is wrong before a model is loaded."""

import json

import pytest
from PIL import Image

from devil_hf.cli.main import main
from devil_hf.data.worlds import World


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    file = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(World(1, 1).scene(0).image).save(file)
    return str(file)


def test_phrases_in_one_image(scene, tmp_path, capsys):
    assert (
        main(
            [
                "report",
                "emergence",
                scene,
                "pink",
                "a star",
                "--checkpoint",
                "shapes",
                "--layers",
                "layer1",
                "layer3",
                "--output-dir",
                str(tmp_path),
                "--json",
            ]
        )
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert list(record["phrases"]) == ["pink", "a star"]
    assert list(record["phrases"]["pink"]["evidence"]) == ["layer1", "layer3", "all"]
    assert len(record["phrases"]["pink"]["maps"]["layer1"]) > 4
    assert Image.open(tmp_path / "emergence.png").height > 400


def test_phrases_over_labelled_images(tmp_path, capsys):
    words = ["report", "emergence", "shapes:24:3", "plain", "tone=red,blue,green,pink", "--output-dir", str(tmp_path)]
    assert main([*words, "--layers", "layer1"]) == 0
    told = capsys.readouterr().out
    assert "plain: " in told and "between 24 images" in told and "tone: " in told and "emergence.png" in told
    assert (tmp_path / "emergence.png").is_file() and (tmp_path / "scores.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photo.jpg"], "say what is asked of photo.jpg"),
        (["photo.jpg", " "], "must each hold a word"),
        (["nowhere.jpg", "red"], "nowhere.jpg"),
        (["x.png", "red", "red"], "['red'] are named twice"),
        (["", "red"], "the image has no name"),
        (["photo.jpg", "red", "--names", "names.txt"], "--names names.txt is of labelled images, and photo.jpg is one picture"),
        (["photo.jpg", "red", "--images", "."], "--images . is of labelled images"),
        (
            ["shapes:24", "red", "--names", "names.txt"],
            "--images, --names and --split are of labelled images, and shapes:24 draws its own",
        ),
        (["x.png", "red", "--split", "val"], "x.png is one picture"),
        (["shapes:20", "dog"], "the shapes world has no ['dog']"),
        (["shapes:20", "a=red,"], "is no PHRASE"),
        (["shapes:3", "red"], "cannot tell anything from chance"),
    ],
)
def test_what_is_wrong_is_said(words, message, capsys, monkeypatch):
    monkeypatch.setattr("devil_hf.checkpoints.loading.load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(["report", "emergence", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_refused_before_the_model(scene, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("devil_hf.checkpoints.loading.load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "afile").write_text("")
    assert main(["report", "emergence", scene, "red", "--output-dir", str(tmp_path / "afile")]) == 1
    assert "afile" in capsys.readouterr().err
