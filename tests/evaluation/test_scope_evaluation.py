"""`devil evaluate scope`: images of the training's kind are let pass, others are not, and bad ones are counted."""

import numpy as np
import pytest
from PIL import Image

from devil_hf.checkpoints.loading import load
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.scope import ScopeSettings


def test_scenes_pass_and_noise_does_not(tmp_path):
    photos = tmp_path / "noise"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(photos / f"{number}.png")
    (photos / "bad.png").write_bytes(b"no picture")
    settings = ScopeSettings(sources=["shapes:24:5", str(photos)], output_dir=tmp_path / "out")
    evaluation = evaluate("scope", settings, *load("shapes"))
    assert evaluation.scores["shapes:24:5"]["warned"] <= 0.1
    assert evaluation.scores[str(photos)]["warned"] == 1
    assert evaluation.settings["sizes"] == {"shapes:24:5": 24, str(photos): 4} and evaluation.settings["bad"] == 1
    (photos / "0.png").unlink()  # what is recorded of the others is taken as it is
    again = evaluate("scope", settings, *load("shapes"))
    assert again.settings["sizes"][str(photos)] == 3


def test_a_source_that_is_named_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name one twice"):
        evaluate("scope", ScopeSettings(sources=["shapes", "shapes"], output_dir=tmp_path))
