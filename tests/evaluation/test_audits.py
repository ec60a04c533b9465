"""Painted scenes differ in their colours alone, and repeated audits are right where the truth is known."""

import numpy as np
import pytest

from devil_hf.data.shapes import COLOURS
from devil_hf.evaluation.audits import BRIGHTNESS, LUMA, AuditsSettings, in_grey, painted_scene, repeated_audits
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.questions.audit import ENCODED, NOT_ENCODED, assert_encoded, assert_not_encoded
from devil_hf.settings import make


def test_painted_scenes_are_equally_bright_in_every_colour():
    for index in range(20):
        scene = painted_scene(1, index, "red", index % 2 == 0)
        assert ("red" in scene.words["colour"]) == (index % 2 == 0)
        brightness = [np.asarray(item.rgb) @ LUMA for item in scene.objects]
        assert BRIGHTNESS[0] - 1e-6 <= min(brightness) <= max(brightness) <= BRIGHTNESS[1] + 1e-6
        assert max(max(item.rgb) for item in scene.objects) <= 255
        assert np.ptp(in_grey(scene.image).astype(int), axis=2).max() == 0
    assert set(COLOURS) == {item.colour for at in range(60) for item in painted_scene(1, at, "red", True).objects}


def test_repeated_audits_are_right_where_the_truth_is_known():
    generator = np.random.default_rng(0)
    with_it, without = generator.normal(4, size=2_000), generator.normal(size=2_000)
    told = repeated_audits(with_it, without, 250, 40, generator)
    assert told[ENCODED] == 40 == sum(told.values())
    nothing = repeated_audits(without[:1_000], without[1_000:], 250, 40, generator)
    assert nothing[NOT_ENCODED] >= 32
    one_in_five = repeated_audits(with_it, without, 250, 100, generator, share=0.2)
    assert one_in_five[NOT_ENCODED] <= 12, "it counts as encoded"


def test_too_small_a_pool_is_an_error():
    with pytest.raises(ValueError, match=r"--limit 60: .* at least 80, twice the --images"):
        make(AuditsSettings, {"limit": 60, "images": 40})


@pytest.mark.slow
def test_audits_of_the_shipped_checkpoint_are_right(tmp_path):
    evaluation = evaluate("audit", make(AuditsSettings, {"checkpoint": "shapes", "limit": 600, "output_dir": str(tmp_path)}))
    assert evaluation.scores["seen"] == {"right": 1.0, "not_wrong": 1.0}
    assert evaluation.scores["grey"]["right"] >= 0.85 and evaluation.scores["grey"]["not_wrong"] >= 0.85
    assert evaluation.scores["one in five"]["not_wrong"] >= 0.85


@pytest.mark.slow
def test_the_shipped_checkpoint_reads_colour_and_not_behind_a_grey_filter():
    from devil_hf.checkpoints.loading import load

    model, processor = load("shapes", device="cpu")
    present, absent = ([painted_scene(3, at, "green", has_it).image for at in range(220)] for has_it in (True, False))
    control = assert_encoded(model, processor, "green", present, absent)
    with pytest.raises(AssertionError, match="Worst images"):
        assert_not_encoded(model, processor, "green", present, absent)
    grey = [[in_grey(image) for image in images] for images in (present, absent)]
    assert assert_not_encoded(model, processor, "green", *grey, control=control, probe=True).probe.area < 0.6
