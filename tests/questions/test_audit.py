"""Audits: evidence as single questions give it, verdicts that follow from bounds, and errors before any image is read."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest

from devil_hf.questions.audit import (
    ENCODED,
    NOT_ENCODED,
    REVERSED,
    UNDECIDED,
    Audit,
    Finding,
    assert_encoded,
    assert_not_encoded,
    audit,
    probe_scores,
    verdict,
)
from devil_hf.statistics import Separation, detectable_area, separation

PHRASE = "a red dog"


def pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (40, 48, 3), dtype=np.uint8) for _ in range(count)]


def finding(present, absent, claim=NOT_ENCODED, **options):
    words = separation(present, absent)
    names = tuple(f"{at}.png" for at in range(len(present)))
    sizes = {"detectable": detectable_area(words.sizes), "paired": False, "layers": ("layer4",), "bound": 0.6}
    return Finding(
        phrase="tag", claim=claim, words=words, present=tuple(present), absent=tuple(absent), names=names, **sizes | options
    )


@pytest.fixture(scope="module")
def groups():
    """Evidence of a thing that is there, the same shifted the other way, and evidence without it, 300 images each."""
    generator = np.random.default_rng(1)
    with_it, without = generator.normal(2, size=300), generator.normal(size=300)
    return with_it, -with_it, without


def test_evidence_is_that_of_single_questions(model, processor):
    present, absent = pictures(9), pictures(8, seed=1)
    layers = model.layer_names[-2:]
    found = audit(
        model, processor, Audit(phrase=PHRASE, claim=ENCODED, present=present, absent=absent, layers=layers, batch_size=4)
    )
    phrases = processor(text=[PHRASE])
    for images, values in ((present, found.present), (absent, found.absent)):
        for image, value in zip(images, values, strict=True):
            one = model.score(processor(images=[image])["pixel_values"], **phrases, layers=layers)
            assert value == pytest.approx(float(one.evidence[0, 0]), abs=1e-5)
    assert found.layers == tuple(layers) and found.names[:2] == ("image 0", "image 1")
    assert found.words == separation(found.present, found.absent)


def test_a_mask_compares_the_place_of_the_thing_with_the_same_place_elsewhere(model, processor):
    present, absent = pictures(8), pictures(8, 1)
    masks = [np.zeros((40, 48), dtype=bool) for _ in present]
    for at, mask in enumerate(masks):
        mask[8 : 24 + at, 10:30] = True
    asked = {"phrase": PHRASE, "claim": ENCODED, "present": present, "absent": absent, "masks": masks}
    found = audit(model, processor, Audit(**asked, layers=[-1], batch_size=3))
    for at in (0, 7):
        regions = processor.masks_to_regions([masks[at]])
        for image, value in ((present[at], found.present[at]), (absent[at], found.absent[at])):
            one = model.score(**processor(images=[image]), **processor(text=[PHRASE]), layers=[-1], regions=regions)
            assert value == pytest.approx(float(one.evidence[0, 0]), abs=1e-5)
    assert found.paired and found.words.sizes == (8,)
    masks[7][:] = False
    with pytest.raises(ValueError, match="the mask of image 7 is empty"):
        Audit(**asked).check(model, processor)


def test_masks_of_nothing_find_nothing():
    """Random squares on scenes without stripes: a small place and a large one are not read alike, but two of one size are."""
    from devil_hf.checkpoints.loading import load
    from devil_hf.data.shapes import make_scene

    scenes = [one for one in map(partial(make_scene, 1), range(200)) if "striped" not in one.words["texture"]]
    generator, masks = np.random.default_rng(0), []
    for left, top in generator.integers(0, 128 - 24, (50, 2)):
        masks.append(np.zeros((128, 128), dtype=bool))
        masks[-1][top : top + 24, left : left + 24] = True
    images = [one.image for one in scenes]
    asked = Audit(phrase="striped", claim=NOT_ENCODED, present=images[:50], absent=images[50:100], masks=masks, bound=0.7)
    assert audit(*load("shapes", device="cpu"), asked).verdict == NOT_ENCODED


def test_verdicts_follow_from_the_bounds(groups):
    with_it, against, without = groups
    other = np.random.default_rng(2).normal(size=300)
    assert finding(with_it, without).verdict == ENCODED
    assert finding(against, without).verdict == REVERSED
    assert finding(other, without).verdict == NOT_ENCODED
    assert finding(other[:50], without[:50]).verdict == UNDECIDED
    assert finding(with_it, without, claim=ENCODED).passed and not finding(against, without).passed
    assert not finding(against, without, claim=ENCODED).passed


def test_absence_needs_a_probe_and_a_control_that_do_not_speak_against_it(groups):
    with_it, _, without = groups
    nothing = finding(np.random.default_rng(2).normal(size=300), without)
    assert nothing.passed and "No positive control" in nothing.message
    read, unclear = separation(with_it, without), separation(with_it[:20], with_it[20:40])
    assert replace(nothing, probe=read).verdict == ENCODED and "a linear probe reads it" in replace(nothing, probe=read).message
    assert replace(nothing, probe=unclear).verdict == UNDECIDED
    assert "upper bound of a linear probe is not below 0.6" in replace(nothing, probe=unclear).message
    assert replace(nothing, probe=separation(without, without)).passed
    able, mute = finding(with_it, without, claim=ENCODED), finding(without, without, claim=ENCODED)
    assert (
        replace(nothing, control=able).passed
        and "Control: the translator can say 'tag'" in replace(nothing, control=able).message
    )
    assert replace(nothing, control=mute).verdict == UNDECIDED
    assert "neither did one in the control" in replace(nothing, control=mute).message


def test_messages_quote_figures_and_name_the_worst_images(groups):
    with_it, against, without = groups
    found = finding(with_it, without)
    highest = int(np.argmax(with_it))
    assert f"AUROC {found.words.area:.3f}".replace("0.", ".") in found.message
    assert f"Worst images: {highest}.png {with_it[highest]:+.2f}" in found.message and len(found.worst) == 5
    assert finding(against, without, claim=ENCODED).worst[0][0] == f"{highest}.png"
    assert finding(against, without).worst[0][0] == f"{highest}.png", "where it is reversed the lowest speak most"
    few = finding(without[:60], without[60:120])
    assert "undecided" in few.message and "140 images on each side" in few.message
    assert "would have been found encoded with a probability of 80%" in few.message
    assert "Nothing speaks for it" in finding(without[:60] - 0.1, without[60:120], claim=ENCODED).message


def test_assertions_raise_with_the_message_and_return_what_was_found(model, processor):
    bright, dark = [np.full((40, 48, 3), 240, np.uint8)] * 60, [np.full((40, 48, 3), 10, np.uint8)] * 60
    values = [
        float(model.score(processor(images=one[:1])["pixel_values"], **processor(text=["red"])).evidence)
        for one in (bright, dark)
    ]
    high, low = (bright, dark) if values[0] > values[1] else (dark, bright)
    assert assert_encoded(model, processor, "red", high, low).words.area == 1
    with pytest.raises(AssertionError, match=r"'red' is encoded, but was claimed to be not encoded .*Worst images: image 0"):
        assert_not_encoded(model, processor, "red", high, low)
    with pytest.raises(AssertionError, match="reversed"):
        assert_encoded(model, processor, "red", low, high)
    noise = assert_not_encoded(model, processor, "red", pictures(60), pictures(60, 1), bound=0.8)
    assert noise.as_record()["verdict"] == NOT_ENCODED


def test_an_absence_says_what_it_would_have_missed():
    """Above chance and below what counts: the message does not say that so much would have been told from chance."""
    found = finding([0.0] * 3, [0.0] * 3)
    found = replace(found, words=Separation(0.544, 0.523, 0.565, 0.05, (1_000, 1_000)), detectable=0.593)
    assert found.passed and "It is above chance, but below 0.6. An area of .593 would have been found encoded" in found.message
    generator = np.random.default_rng(0)
    area = detectable_area((250, 250), bound=0.6)
    shift = 2**0.5 * NormalDist().inv_cdf(area)
    told = [verdict(separation(generator.normal(shift, size=250), generator.normal(size=250))) for _ in range(500)]
    assert 0.75 < np.mean([one == ENCODED for one in told]) < 0.86


def test_the_bounds_of_a_probe_are_wrong_as_often_as_their_level_says():
    generator = np.random.default_rng(0)
    found = [separation(*probe_scores(*generator.normal(size=(2, 80, 30)))) for _ in range(400)]
    for wrong in ([one.low > 0.5 for one in found], [one.high < 0.5 for one in found]):
        assert np.mean(wrong) < 0.08


def test_a_probe_is_judged_on_images_that_it_has_not_seen():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, 60, 200))
    assert separation(*probe_scores(*noise)).area == pytest.approx(0.5, abs=0.15), "it could tell all that it has seen"
    noise[0, :, 3:13] += 3
    assert separation(*probe_scores(*noise)).area > 0.8
    assert separation(*probe_scores(*noise)).sizes == (30, 30)
    scenes = generator.normal(size=(60, 200))  # every scene is in both groups, so that knowing it helps nobody
    assert separation(*probe_scores(scenes, scenes, paired=True), paired=True).area == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"claim": "absent"}, "claim='absent' is none of encoded, not encoded"),
        ({"level": 0.7}, "level=0.7 must be an error rate"),
        ({"level": 1e-17}, "level=1e-17 must be an error rate from 1e-06"),
        ({"probe": True, "claim": ENCODED}, "probe=True is for what is claimed to be not encoded"),
        ({"probe": True}, "at least 90 images .*a probe judges half"),
        ({"absent": [*pictures(59, 1), pictures(1)[0]]}, "image 0 is among the images with the thing and, as image 59, among"),
        ({"bound": 0.5}, "bound=0.5 must be an area between"),
        ({"masks": [1]}, "1 masks for 60 images"),
        ({"masks": [1] * 60, "absent": pictures(50)}, "60 images with the thing and 50 without it are no pairs"),
        ({"paired": True, "absent": pictures(50)}, "60 images with the thing and 50 without it are no pairs"),
        ({"present": pictures(44)}, "44 and 60 images cannot show that it is not encoded at an error rate of 0.05.*at least 45"),
        ({"present": pictures(4), "claim": ENCODED}, "at least 5 images"),
        (
            {"present": ["a.png"] * 60, "absent": ["a.png"] * 60},
            "a.png is among the images with the thing and, as a.png, among",
        ),
    ],
)
def test_claims_that_cannot_be_shown_are_errors_before_anything_is_read(wrong, message):
    with pytest.raises(ValueError, match=message):
        Audit(**{"phrase": "tag", "claim": NOT_ENCODED, "present": pictures(60), "absent": pictures(60, 1)} | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"phrase": " "}, "empty"), ({"layers": ["layer9"]}, "unknown layer 'layer9'"), ({"phrase": "a dog " * 60}, "tokens")],
)
def test_questions_that_cannot_be_asked_are_errors_before_images_are_read(model, processor, wrong, message):
    missing = {"present": [f"{at}.png" for at in range(5)], "absent": [f"no{at}.png" for at in range(5)]}
    with pytest.raises(ValueError, match=message):
        audit(model, processor, Audit(**{"phrase": PHRASE, "claim": ENCODED} | missing | wrong))


def test_a_phrase_that_the_language_model_cannot_represent_is_named():
    from devil_hf.checkpoints.loading import load

    own, its = load("shapes", device="cpu")
    with pytest.raises(ValueError, match="'a hospital tag'"):
        Audit(phrase="a hospital tag", claim=ENCODED, present=pictures(5), absent=pictures(5, 1)).check(own, its)


IN_PYTEST = """
import numpy as np
from devil_hf.evaluation.audits import in_grey, painted_scene

def scenes(has_it, change=np.asarray):
    return [change(painted_scene(1, at, "red", has_it).image) for at in range(60)]

def test_what_it_reads(devil_audit):
    found = devil_audit.assert_encoded("red", scenes(True), scenes(False))
    grey = scenes(True, in_grey), scenes(False, in_grey)
    devil_audit.assert_not_encoded("red", *grey, bound=0.7, control=found)

def test_what_it_must_not_read(devil_audit):
    devil_audit.assert_not_encoded("red", scenes(True), scenes(False))
"""


def test_the_plugin_audits_in_a_session_of_pytest(tmp_path):
    """Also where it is installed: `-p` names the entry point by its own name."""
    (tmp_path / "test_network.py").write_text(IN_PYTEST)
    command = [sys.executable, "-m", "pytest", "-p", "devil_hf.questions.pytest_plugin", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run([*command, "--devil-checkpoint", "shapes", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "AssertionError: 'red' is encoded, but was claimed to be not encoded" in done.stdout


def test_the_plugin_is_light_until_a_test_asks():
    code = (
        "import sys, devil_hf.questions.pytest_plugin\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'datasets', 'PIL'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
