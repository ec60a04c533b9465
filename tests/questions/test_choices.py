"""Multiple choice: evidence is that of single sentences at single places, and what cannot be asked is refused before it is."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from devil_hf.checkpoints.identity import preprocessing_of
from devil_hf.questions.choices import ALL, NONE_BETTER, NONE_WRONG, WHOLE, Calibration, Scale, ask, fit_scale, part_hashes
from devil_hf.questions.grounding import tile_regions

QUESTION, CHOICES = "the {} dog", ["red", "small green"]


def naive_evidence(model, processor, pixels, sentence, grid, **where):
    """In nats per token, one place after the other."""
    phrases = processor(text=[sentence], return_tensors="pt")
    features = model.extract_features(pixels)
    rows, columns = features[0].shape[-2:]
    chances = []
    for region in tile_regions(grid, columns / rows):
        scored = model.score(**phrases, feature_maps=features, regions=region[None], **where)
        chances.append(math.exp(float(scored.log_probs[0, 0] - scored.null_log_probs[0])))
    return math.log(sum(chances) / len(chances)) / phrases["input_ids"].shape[1]


@pytest.mark.parametrize("where", [{}, {"layers": -1}], ids=["all layers", "one layer"])
def test_evidence_is_that_of_a_sentence_at_a_place_that_nobody_names(model, processor, images, where):
    answers = ask(model, processor, images[:2], QUESTION, CHOICES, grid=2, least_evidence=-100, **where)
    for image, answer in zip(images, answers, strict=False):
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        wanted = [naive_evidence(model, processor, pixels, f"the {choice} dog", 2, **where) for choice in CHOICES]
        assert list(answer.evidence.values()) == pytest.approx(wanted, abs=1e-4)
        assert answer.choice == answer.text == CHOICES[wanted.index(max(wanted))]
        shares = torch.tensor(wanted).softmax(dim=0).tolist()
        assert list(answer.probabilities.values()) == pytest.approx(shares, abs=1e-4) and not answer.calibrated
    null = model.score(pixels, **processor(text=[f"the {choice} dog" for choice in CHOICES], return_tensors="pt")).null_log_probs
    assert list(answers[0].habit.values()) == pytest.approx(null.softmax(dim=0).tolist(), abs=1e-5)


def test_one_place_is_the_whole_image_and_a_text_without_a_mark_is_continued(model, processor, images):
    (answer,) = ask(model, processor, images[0], "the small", ["dog", "cat"], grid=1)
    pixels = processor(images=images[0], return_tensors="pt")["pixel_values"]
    scored = model.score(pixels, **processor(text=["the small dog", "the small cat"], return_tensors="pt"))
    assert list(answer.evidence.values()) == pytest.approx(scored.evidence[0].tolist(), abs=1e-5)


def test_below_the_least_evidence_nothing_is_answered(model, processor, images):
    (answer,) = ask(model, processor, images[0], QUESTION, CHOICES, grid=1, least_evidence=100)
    assert answer.choice is None and answer.as_record()["answer"] == "not encoded"
    assert answer.probabilities is None, "a share of 1 among choices that are all false means nothing"


def test_feature_maps_stand_for_images(model, processor, images):
    maps = model.extract_features(processor(images=images[:2], return_tensors="pt")["pixel_values"])
    asked = {"question": QUESTION, "choices": CHOICES, "layers": 0, "grid": 2}
    assert ask(model, processor, None, **asked, feature_maps=maps) == ask(model, processor, images[:2], **asked)
    for given in ({"images": None}, {"images": images, "feature_maps": maps}):
        with pytest.raises(ValueError, match=r"give images, or the feature_maps of an earlier call, and not both"):
            ask(model, processor, **given, **asked)


@pytest.mark.parametrize("grid", [0, -1, 65, 100_000, 10**30])
def test_so_many_places_are_refused_before_the_model_runs(grid):
    with pytest.raises(ValueError, match=rf"grid={grid}"):
        ask(None, None, None, QUESTION, CHOICES, grid=grid)


@pytest.mark.parametrize(
    ("question", "choices", "message"),
    [
        ("", ["red", "blue"], "is empty: give a sentence"),
        ("the {} or {}", ["red", "blue"], "several marks"),
        ("the {} dog", ["red"], "at least two"),
        ("the {} dog", [], "at least two"),
        ("the {} dog", "red", "at least two"),
        ("the {} dog", ["red", " "], "hold an empty one"),
        ("the {} dog", ["red", "blue", "red "], r"\['red'\] are given twice"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_runs(processor, question, choices, message):
    with pytest.raises(ValueError, match=message):
        ask(None, processor, None, question, choices)


@pytest.fixture(scope="module")
def shapes():
    """The processor of a language model that knows whole words only."""
    from transformers import AutoProcessor

    from devil_hf.checkpoints import locate

    return AutoProcessor.from_pretrained(locate("shapes"))


@pytest.mark.parametrize(
    ("question", "choices", "message"),
    [
        ("the {} square", ["red", "mauve"], "choice 'mauve' holds words that the language model does not know"),
        ("the {} square", ["red", "mauve striped"], "choice 'mauve striped' holds words that the language model does not know"),
        ("the {} elephant", ["red", "blue"], "question 'the {} elephant' holds words"),
        ("the {} square", ["red", "Red"], "'red' and 'Red' are the same tokens"),
    ],
)
def test_what_the_tokenizer_cannot_represent_or_tell_apart_is_refused_before_the_model_runs(shapes, question, choices, message):
    with pytest.raises(ValueError, match=message):
        ask(None, shapes, None, question, choices)


def test_a_fitted_temperature_is_the_one_that_made_the_answers():
    random = torch.Generator().manual_seed(0)
    evidence = torch.randn(4000, 5, generator=random)
    answers = torch.multinomial((evidence / 0.4).softmax(dim=1), 1, generator=random)[:, 0].tolist()
    scale = fit_scale(evidence.tolist(), answers)
    assert scale.temperature == pytest.approx(0.4, rel=0.06) and scale.least_evidence == 0
    mixed = fit_scale([[3.0, 1.0], [2.0, 4.0], [0.5, 0.0], [-1.0, -2.0]], [0, 1, None, None])
    assert mixed.least_evidence == pytest.approx(1.75), "between what has an answer and what has none"
    uneven = fit_scale([[3.0, 1.0], [2.0, 4.0, 0.0]], [0, 2])
    assert (uneven.temperature, uneven.bound) == (50, NONE_BETTER), "where answers are wrong, nothing is sure"
    assert scale.bound is None
    with pytest.raises(ValueError, match="no question has an answer"):
        fit_scale([[1.0, 2.0]], [None])


@pytest.mark.parametrize("questions", [1, 20, 2_000])
def test_where_every_answer_is_right_the_temperature_is_the_highest_that_they_do_not_refute(questions):
    evidence = torch.tensor([1.0, 0.0, -0.5])
    scale = fit_scale([evidence.tolist()] * questions, [0] * questions)
    assert scale.bound == NONE_WRONG, "the likeliest temperature is zero, of which no probability follows"
    assert float(scale.probabilities(evidence)[0]) ** questions == pytest.approx(0.05, rel=1e-3) or questions == 1
    assert 0.05 < scale.temperature <= 50, "no probability of 1 follows from a score of 1"


def test_one_wrong_answer_of_many_fits_no_temperature():
    right, close = [1.0, 0.0], [0.0, 0.05]
    scale = fit_scale([*[right] * 261, close], [0] * 262)
    assert scale.bound == NONE_WRONG and scale.temperature > fit_scale([right] * 262, [0] * 262).temperature - 1e-6
    many = fit_scale([*[right] * 261, *[close] * 30], [0] * 291)
    assert many.bound is None, "the coldest is refuted"


def test_a_calibration_is_for_its_parts_its_layers_and_its_places(model, processor, images, tmp_path):
    names = model.layer_names
    scales = {ALL: Scale(0.5, -90.0), WHOLE: Scale(0.25, 90.0), names[0]: Scale(0.1, -80.0)}
    own = Calibration(scales, 2, "tests", 10, **part_hashes(model))
    own.write(tmp_path / "calibration.json")
    assert Calibration.read(tmp_path / "calibration.json") == own
    asked = {"calibration": own, "question": QUESTION, "choices": CHOICES}
    (fitted,) = ask(model, processor, images[0], **asked)
    (plain,) = ask(model, processor, images[0], QUESTION, CHOICES, grid=2)
    assert fitted.calibrated and fitted.least_evidence == -90 and fitted.evidence == plain.evidence
    halves = torch.tensor(list(plain.evidence.values())).mul(2).softmax(dim=0).tolist()
    assert list(fitted.probabilities.values()) == pytest.approx(halves, abs=1e-6)
    assert ask(model, processor, images[0], grid=1, **asked)[0].text == "not encoded"
    assert ask(model, processor, images[0], layers=0, **asked)[0].least_evidence == -80
    assert not ask(model, processor, images[0], layers=1, **asked)[0].calibrated
    assert not ask(model, processor, images[0], grid=3, **asked)[0].calibrated
    for part in ("translator", "backbone"):
        other = Calibration(scales, 2, "tests", 10, **part_hashes(model) | {part: "0" * 64})
        with pytest.raises(ValueError, match=rf"another {part} \(00000000\)"):
            ask(model, processor, images[0], QUESTION, CHOICES, calibration=other)
    with pytest.raises(ValueError, match="or of another precision than bfloat16"):
        own.check(copy.deepcopy(model).to(torch.bfloat16), processor)
    own_images = preprocessing_of(processor.image_processor)
    known = Calibration(scales, 2, "tests", 10, **part_hashes(model), preprocessing=own_images)
    known.write(tmp_path / "calibration.json")
    Calibration.read(tmp_path / "calibration.json").check(model, processor)
    changed = copy.deepcopy(processor)
    changed.image_processor.image_std = [0.2, 0.3, 0.25]
    with pytest.raises(ValueError, match=r"of another preprocessing .*\(image_std \[.*\], not \[0.2, 0.3, 0.25\]\): fit"):
        ask(model, changed, images[0], QUESTION, CHOICES, calibration=known)
    later = own_images | {"image_processor_type": "Renamed", "added": 1}
    dataclasses.replace(known, preprocessing=later).check(model, processor)
    usual = {name: value for name, value in own_images.items() if name != "crop_mode"}
    dataclasses.replace(known, preprocessing=usual).check(model, processor)
    changed = copy.deepcopy(processor)
    changed.image_processor.crop_mode = "squash"
    with pytest.raises(ValueError, match=r"checkpoint's \(crop_mode 'center', not 'squash'\): fit"):
        dataclasses.replace(known, preprocessing=usual).check(model, changed)
    unfitted = Calibration({ALL: Scale(0.5, -90.0, NONE_WRONG)}, 2, "tests", 10, **part_hashes(model))
    (bounded,) = ask(model, processor, images[0], QUESTION, CHOICES, calibration=unfitted)
    assert not bounded.calibrated and bounded.bound == NONE_WRONG and bounded.probabilities == fitted.probabilities


SCALE = {"temperature": 1.0, "least_evidence": 0.0, "bound": None}
WRITTEN = {"scales": {"all": SCALE}, "grid": 4, "fitted_on": "tests", "questions": 1, "translator": "a", "backbone": "b"}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        *(json.dumps({name: value for name, value in WRITTEN.items() if name != left}) for left in WRITTEN),
        *(
            json.dumps(WRITTEN | {"scales": {"all": {name: value for name, value in SCALE.items() if name != left}}})
            for left in SCALE
        ),
        *(
            json.dumps(WRITTEN | {"scales": {"all": SCALE | changed}})
            for changed in (
                *({"temperature": value} for value in (0, 0.019, 50.1, -1, 1e400, "1", True, None, [1])),
                *({"least_evidence": value} for value in (1e400, math.nan, "0", None)),
                *({"bound": value} for value in ("cold", 1, [])),
                {"heat": 1},
            )
        ),
        *(
            json.dumps(WRITTEN | changed)
            for changed in (
                *({"grid": value} for value in (0, 1.5, 65, 10**40, "4", True, None)),
                *({"scales": value} for value in (None, [], {"all": None}, {"all": []}, {"all": 1})),
                *({name: 1} for name in ("fitted_on", "translator", "backbone")),
                *({"questions": value} for value in ("1", None, 1.5, -1)),
                {"more": 1},
            )
        ),
    ],
)
def test_a_file_that_is_no_calibration_is_named(tmp_path, content):
    (tmp_path / "scales.json").write_text(content)
    with pytest.raises(ValueError, match=r"scales.json is no calibration .*: make one with devil evaluate choices"):
        Calibration.read(tmp_path / "scales.json")


def test_a_calibration_beside_a_checkpoint_is_found(tmp_path):
    assert Calibration.beside(tmp_path) is None
    Calibration({}, 4, "tests", 1, "a", "b").write(tmp_path / "calibration.json")
    assert json.loads((tmp_path / "calibration.json").read_text())["grid"] == 4
    assert Calibration.beside(tmp_path).grid == 4
