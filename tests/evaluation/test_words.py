"""Words of sentences are about the right objects, and their scores are those of a naive loop."""

import pytest

from devil_hf.checkpoints.loading import load
from devil_hf.data.worlds import World
from devil_hf.evaluation import words as words_module
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.words import WordsSettings, mentions
from devil_hf.settings import make


def test_words_are_about_the_object_that_has_all_of_their_phrase():
    scene = next(scene for scene in map(World(50, 4).scene, range(50)) if len(scene.objects) == 2)
    first, second = (item.attributes for item in scene.objects)
    words = [
        "a",
        first["colour"],
        first["shape"],
        "beside",
        "a",
        second["texture"],
        second["colour"],
        second["shape"],
        "and",
        "circle",
    ]
    found = mentions(words, scene)
    assert [(one.at, one.kind) for one in found[:5]] == [(1, "colour"), (2, "shape"), (5, "texture"), (6, "colour"), (7, "shape")]
    assert [one.object for one in found[:5]] == [0, 0, 1, 1, 1]
    crossed = mentions([first["colour"], first["texture"], second["shape"]], scene)
    assert {one.object for one in crossed} == {None}, "no object has them all"
    assert mentions(["red", "and", "nothing"], scene) == [], "a phrase without a shape is about nothing"


def test_rows_of_maps_that_were_combined_otherwise_are_refused(tmp_path, monkeypatch):
    settings = make(WordsSettings, {"limit": 2, "output_dir": str(tmp_path)})
    evaluate("words", settings, *load("shapes", device="cpu"))
    monkeypatch.setattr(words_module, "INFORMED", (1, 1 / 32))
    with pytest.raises(ValueError, match=r"was made with \{'informed': \[2, 0.03125\]\}, not"):
        evaluate("words", settings, *load("shapes", device="cpu"))


@pytest.mark.slow
def test_the_shipped_checkpoint_points_at_the_objects_of_its_words(tmp_path):
    evaluation = evaluate("words", make(WordsSettings, {"checkpoint": "shapes", "limit": 100, "output_dir": str(tmp_path)}))
    for kind, least in (("colour", 0.95), ("texture", 0.9), ("shape", 0.85)):
        assert evaluation.scores["shown"][f"pointing_{kind}"] >= least > 3 * evaluation.controls["chance"][f"pointing_{kind}"]
        assert evaluation.scores["all"][f"auroc_{kind}"] >= 0.95
    assert evaluation.details["p_value"] < 0.001
