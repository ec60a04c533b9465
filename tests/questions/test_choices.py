"""Multiple choice: evidence is that of single sentences at single places, and what cannot be asked is refused before it is."""

import json
import math

import pytest
import torch

from devil_hf.questions.choices import ALL, WHOLE, Calibration, Scale, ask, fit_scale, translator_hash
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
    assert sum(answer.probabilities.values()) == pytest.approx(1)


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
    assert uneven.temperature == pytest.approx(50, rel=0.01), "where answers are wrong, nothing is sure"
    with pytest.raises(ValueError, match="no question has an answer"):
        fit_scale([[1.0, 2.0]], [None])


def test_a_calibration_is_for_its_translator_its_layers_and_its_places(model, processor, images, tmp_path):
    names = model.layer_names
    scales = {ALL: Scale(0.5, -90.0), WHOLE: Scale(0.25, 90.0), names[0]: Scale(0.1, -80.0)}
    own = Calibration(scales, 2, "tests", 10, translator_hash(model))
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
    other = Calibration(scales, 2, "tests", 10, "0" * 64)
    with pytest.raises(ValueError, match=r"another translator \(00000000\)"):
        ask(model, processor, images[0], QUESTION, CHOICES, calibration=other)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"scales": {"all": {"temperature": 0}}, "grid": 4, "fitted_on": "", "questions": 1, "translator": "a"}',
        '{"scales": {"all": {"heat": 1}}, "grid": 4, "fitted_on": "", "questions": 1, "translator": "a"}',
        '{"scales": {}, "grid": 4, "fitted_on": "", "questions": 1, "translator": "a", "more": 1}',
    ],
)
def test_a_file_that_is_no_calibration_is_named(tmp_path, content):
    (tmp_path / "scales.json").write_text(content)
    with pytest.raises(ValueError, match=r"scales.json is no calibration: make one with devil evaluate choices"):
        Calibration.read(tmp_path / "scales.json")


def test_a_calibration_beside_a_checkpoint_is_found(tmp_path):
    assert Calibration.beside(tmp_path) is None
    Calibration({}, 4, "tests", 1, "a").write(tmp_path / "calibration.json")
    assert json.loads((tmp_path / "calibration.json").read_text())["grid"] == 4
    assert Calibration.beside(tmp_path).grid == 4
