"""Audits: evidence as single questions give it, verdicts that follow from bounds, and errors before any image is read."""

import subprocess
import sys
from dataclasses import replace

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
)
from devil_hf.statistics import detectable_area, separation

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


def test_a_mask_compares_the_place_of_the_thing_with_the_rest(model, processor):
    present = pictures(8)
    masks = [np.zeros((40, 48), dtype=bool) for _ in present]
    for at, mask in enumerate(masks):
        mask[8 : 24 + at, 10:30] = True
    found = audit(model, processor, Audit(phrase=PHRASE, claim=ENCODED, present=present, masks=masks, layers=[-1], probe=True))
    for at in (0, 7):
        inputs = processor(images=[present[at]])
        regions = processor.masks_to_regions([np.stack([masks[at], ~masks[at]])])
        inside, outside = model.score(**inputs, **processor(text=[PHRASE]), layers=[-1], regions=regions).evidence[:, 0].tolist()
        assert (found.present[at], found.absent[at]) == pytest.approx((inside, outside), abs=1e-5)
    assert found.paired and found.words.sizes == (8,) and found.probe.sizes == (8,)
    masks[7][:] = False
    with pytest.raises(ValueError, match="the mask of image 7 is empty"):
        audit(model, processor, Audit(phrase=PHRASE, claim=ENCODED, present=present, masks=masks))


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
    assert "would have been told from chance" in few.message
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
    same = assert_not_encoded(model, processor, "red", high, [image.copy() for image in high])
    assert same.words.area == 0.5 and same.as_record()["verdict"] == NOT_ENCODED


def test_a_probe_is_judged_on_images_that_it_has_not_seen():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, 60, 200))
    assert separation(*probe_scores(*noise)).area == pytest.approx(0.5, abs=0.15), "it could tell all that it has seen"
    noise[0, :, 3] += 3
    assert separation(*probe_scores(*noise)).area > 0.8
    scenes = generator.normal(size=(60, 200))  # every scene is in both groups, so that knowing it helps nobody
    assert separation(*probe_scores(scenes, scenes, paired=True), paired=True).area == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"claim": "absent"}, "claim='absent' is none of encoded, not encoded"),
        ({"level": 0.7}, "level=0.7 must be an error rate"),
        ({"bound": 0.5}, "bound=0.5 must be an area between"),
        ({"absent": None}, "either images without the thing"),
        ({"masks": [1] * 60}, "either images without the thing"),
        ({"absent": None, "masks": [1]}, "1 masks for 60 images"),
        ({"paired": True, "absent": pictures(50)}, "60 images with the thing and 50 without it are no pairs"),
        ({"present": pictures(44)}, "44 and 60 images cannot show that it is not encoded at an error rate of 0.05.*at least 45"),
        ({"present": pictures(4), "claim": ENCODED}, "at least 5 images"),
        (
            {"present": ["a.png"] * 60, "absent": ["a.png"] * 60},
            "a.png is among the images with the thing and among",
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
