"""`devil knock-out` in the process, on the shipped checkpoint."""

import json
import shutil

import pytest
from PIL import Image

from devil_hf.cli.main import main
from devil_hf.data.worlds import HELD_OUT_WORLD, World


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Ten scenes with something striped, and ten without."""
    root = tmp_path_factory.mktemp("scenes")
    for name in ("striped", "others"):
        (root / name).mkdir()
    for number, scene in enumerate(World(60, HELD_OUT_WORLD).scenes()):
        folder = root / ("striped" if "striped" in scene.words["texture"] else "others")
        if len(list(folder.iterdir())) < 10:
            Image.fromarray(scene.image).save(folder / f"{number:03d}.png")
    return root


@pytest.mark.parametrize("what", ["channels", "places"])
def test_a_phrase_two_folders_and_a_layer_are_an_answer(folders, capsys, what):
    asked = ["knock-out", "the striped", "--images", str(folders / "striped"), "--without", str(folders / "others")]
    asked += ["--checkpoint", "shapes"]
    assert main([*asked, "--layer", "layer4", "--what", what, "--number", "4", "--draws", "19", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (
        record["phrase"] == "the striped"
        and len(record["random"]) == 19
        and 0.05 <= record["p_value"] <= 1
        and record["probe_right"] > 0.5
    )
    judged = record["images_judged"], record["images_chosen_on"]
    assert judged == (5, 5), "half of them; places are chosen in the image that they are removed from"
    assert len(record["drops"]) == (256 if what == "channels" else 5)


def test_what_cannot_be_asked_ends_with_a_line(folders, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / "few" / f"{name}.png")
    asked = ["knock-out", "the striped", "--images", str(folders / "striped"), "--layer", "layer4", "--checkpoint", "shapes"]
    assert main([*asked, "--without", str(tmp_path / "few")]) == 1
    assert "has 2 images: at least 6" in capsys.readouterr().err
    striped = str(folders / "striped")
    assert main([*asked, "--without", striped]) == 1
    assert f"--images and --without are both {striped}" in capsys.readouterr().err
    copied = shutil.copytree(striped, tmp_path / "copied")
    assert main([*asked, "--without", str(copied)]) == 1
    assert "which chance explains" in capsys.readouterr().err
    assert main(["knock-out", "a hospital", *asked[2:], "--without", str(folders / "others")]) == 1
    assert "hold words that this checkpoint's language model does not know" in capsys.readouterr().err
    assert main([*asked, "--without", str(folders / "others"), "--draws", "9"]) != 0
    assert "19" in capsys.readouterr().err
    assert main(["knock-out", " ", *asked[2:], "--without", str(folders / "others")]) == 1
    assert "is empty" in capsys.readouterr().err
    assert main([*asked, "--without", str(folders / "others"), "--head", "3"]) == 1
    assert "no head of its own" in capsys.readouterr().err
