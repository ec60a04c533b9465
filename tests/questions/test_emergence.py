"""Evidence by depth is what asking one by one gives; what is told apart is found, and what is not is not."""

import numpy as np
import pytest
import torch

from devil_hf.questions.emergence import Statement, ask_statements, check_statements, emergence, evidence_by_layer, summarise


@pytest.fixture(scope="module")
def pixels(processor, images):
    return processor(images=images[:2], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("carrier", [None, "the"])
def test_evidence_by_layer_is_that_of_single_questions(model, processor, pixels, carrier):
    phrases = ["red", "a small dog"]
    found = evidence_by_layer(model, processor, pixels, phrases, carrier=carrier)
    assert list(found) == [*model.layer_names, "all"]
    for layer, values in found.items():
        for image, phrase in ((0, 0), (1, 1)):
            tokens = processor(text=[phrases[phrase]], carrier=carrier, return_tensors="pt")
            one = model.score(pixels[image : image + 1], **tokens, layers=None if layer == "all" else layer)
            torch.testing.assert_close(values[image, phrase], one.evidence[0, 0], atol=1e-5, rtol=0)
    assert list(evidence_by_layer(model, processor, pixels, phrases, layers=[-1])) == model.layer_names[-1:]


def test_what_is_said_of_each_image_is_asked_of_it(model, processor, pixels):
    said = [
        [Statement(0, "red", "word", True, "the"), Statement(0, "a dog", "thing", False)],
        [Statement(1, "blue", "word", False, "the"), Statement(1, "red", "word", True, "the")],
    ]
    rows = ask_statements(model, processor, pixels, said)
    for image, own in enumerate(said):
        for at, one in enumerate(own):
            alone = evidence_by_layer(model, processor, pixels[image : image + 1], [one.phrase], carrier=one.carrier)
            for layer, values in alone.items():
                assert rows[image][layer][at] == pytest.approx(float(values), abs=1e-5)


def planted(images: int, seed: int, strength: dict[str, list[float]]):
    """Statements of classes of four words, one of them true of each image, and evidence that favours it by layer."""
    generator = np.random.default_rng(seed)
    statements, lift = [], []
    for image in range(images):
        for group, by_layer in strength.items():
            true = generator.integers(4)
            statements += [Statement(image, f"{group} {word}", group, word == true) for word in range(4)]
            lift += [[by_layer[layer] * (word == true) for layer in range(3)] for word in range(4)]
    values = generator.normal(size=(len(statements), 3)) + np.array(lift)
    return statements, {f"layer{at + 1}": values[:, at] for at in range(3)}


def test_the_first_layer_is_where_the_truth_was_planted():
    strength = {"early": [1.5, 2.0, 2.0], "late": [0.0, 0.0, 1.5], "never": [0.0, 0.0, 0.0]}
    found = _summary(80, 0, strength)
    assert {group: found.first(group) for group in strength} == {"early": "layer1", "late": "layer3", "never": None}
    assert found.layers == ["layer1", "layer2", "layer3"] and found.within == dict.fromkeys(strength, True)
    assert found.statements["early"] == (80, 240) and found.images["early"] == 80
    value, (low, high) = found.lead("early", "late", "layer1")
    assert value == pytest.approx(found.depths["early"]["layer1"].auroc - found.depths["late"]["layer1"].auroc)
    assert 0 < low < value < high


def _summary(images, seed, strength):
    statements, values = planted(images, seed, strength)
    return summarise(values, statements)


def test_within_images_the_area_is_the_mean_over_images_of_a_naive_count():
    statements, values = planted(12, 3, {"words": [0.5, 0.0, 0.0]})
    found = summarise(values, statements).depths["words"]["layer1"]
    table = values["layer1"].reshape(12, 4)
    table = table - table.mean(axis=0)
    truth = np.array([one.true for one in statements]).reshape(12, 4)
    areas = np.array([[np.mean(evidence[true] > evidence[~true]) for true in truth] for evidence in table])
    assert found.auroc == pytest.approx(np.diag(areas).mean())
    assert found.control == pytest.approx(areas[~np.eye(12, dtype=bool)].mean())
    means = np.array([value for one, value in zip(statements, values["layer1"], strict=True) if one.true])
    assert found.true == pytest.approx(means.mean(), abs=1e-3) and found.true_interval[0] < found.true < found.true_interval[1]


def test_a_single_phrase_is_compared_between_images():
    generator = np.random.default_rng(5)
    truth = generator.random(60) < 0.4
    statements = [Statement(image, "a dog", "a dog", bool(true)) for image, true in enumerate(truth)]
    values = {"shallow": generator.normal(size=60), "deep": generator.normal(size=60) + 2 * truth}
    found = summarise(values, statements)
    assert found.within == {"a dog": False} and found.first("a dog") == "deep"
    pairs = [a > b for a in values["deep"][truth] for b in values["deep"][~truth]]
    assert found.depths["a dog"]["deep"].auroc == pytest.approx(np.mean(pairs), abs=1e-3)


def test_without_any_truth_few_families_report_a_layer():
    """Of 40 sets of images in which nothing is told apart, with two groups at three layers."""
    wrong = 0
    for seed in range(40):
        found = _summary(16, seed, {"a": [0.0, 0.0, 0.0], "b": [0.0, 0.0, 0.0]})
        wrong += any(found.first(group) for group in found.depths)
    assert wrong <= 6, "2 are expected; more than 6 come once in 300 times"


def test_a_layer_that_says_the_same_of_everything_is_at_chance():
    statements, _ = planted(30, 1, {"words": [0.0, 0.0, 0.0]})
    blind = np.zeros(len(statements)) + 1e-6 * np.random.default_rng(0).random(len(statements))
    depth = summarise({"layer1": blind}, statements).depths["words"]["layer1"]
    assert depth.auroc == 0.5 and depth.p_value > 0.9


def liking(strength, noise, seed=0):
    """45 images of dogs and 15 of cats, and evidence for "dog" in all of them alike."""
    generator = np.random.default_rng(seed)
    names = [*["dog"] * 45, *["cat"] * 15]
    statements = [Statement(at, word, "animals", word == name) for at, name in enumerate(names) for word in ("dog", "cat")]
    values = np.array([strength * (one.phrase == "dog") for one in statements])
    return statements, values + noise * generator.exponential(size=len(statements)) * [one.phrase == "dog" for one in statements]


def test_a_liking_for_what_is_true_more_often_is_at_chance():
    statements, values = liking(2.0, 0.0)
    depth = summarise({"layer1": values}, statements).depths["animals"]["layer1"]
    assert depth.auroc == depth.control == 0.5 and depth.p_value == 1.0
    found = [summarise({"layer1": liking(2.0, 1.0, seed)[1]}, statements) for seed in range(20)]
    assert sum(one.first("animals") is not None for one in found) <= 4, "1 is expected; more than 4 come once in 400 times"
    assert all(one.depths["animals"]["layer1"].control == pytest.approx(0.4, abs=0.15) for one in found), "skewed: not .5"


def test_what_the_image_shows_is_found_beside_a_liking():
    statements, values = liking(2.0, 0.0)
    shown = values + 0.5 * np.array([one.true for one in statements])
    depth = summarise({"layer1": shown}, statements).depths["animals"]["layer1"]
    assert depth.auroc == 1.0 and depth.p_value <= 0.001 and depth.control < 0.7


def test_images_that_are_asked_different_phrases_must_be_drawn_choices():
    def said(drawn):
        words = [("big", "small") if at % 2 else ("dark", "light") for at in range(12)]
        return [Statement(at, word, "g", bool(n), drawn=drawn) for at, pair in enumerate(words) for n, word in enumerate(pair)]

    with pytest.raises(ValueError, match=r"'g': images are asked different phrases.*drawn=True"):
        check_statements(said(False), 1)
    depth = summarise({"layer1": np.arange(24.0)}, said(True)).depths["g"]["layer1"]
    assert depth.auroc == 1.0 and depth.control is None and depth.p_value < 0.001


def test_the_whole_question_is_its_parts(model, processor, images):
    statements = [
        Statement(image, word, "words", word == ("red", "blue", "dog")[image])
        for image in range(3)
        for word in ("red", "blue", "dog")
    ]
    repeated = [*images] * 3  # enough of them for a verdict
    said = [Statement(at, one.phrase, one.group, one.true) for at in range(9) for one in statements if one.image == at % 3]
    found = emergence(model, processor, repeated, said, layers=[0], batch_size=4)
    assert found.layers == [model.layer_names[0]] and found.images == {"words": 9}
    evidence = evidence_by_layer(
        model, processor, processor(images=images, return_tensors="pt")["pixel_values"], ["red", "blue", "dog"], [0]
    )
    depth = found.depths["words"][model.layer_names[0]]
    assert depth.true == pytest.approx(float(evidence[model.layer_names[0]].diagonal().mean()), abs=1e-3)


def about(images, phrases=("red",), true=(True,)):
    return [
        Statement(at, text, "g", kind == (at % 3 > 0)) for at in range(images) for text, kind in zip(phrases, true, strict=True)
    ]


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ([], "there are no statements"),
        ([Statement(at, "red", "g", True) for at in range(3)], "all 3 statements of 'g' are true"),
        ([Statement(at, text, "g", text == "red") for at in range(99) for text in ("red", "blue")], "99 images of which not all"),
        (
            about(3, ("red", "blue"), (True, False)),
            "3 images of which not all the same is true cannot tell anything from chance at an error of 5%",
        ),
        ([Statement(0, "red", "g", True), Statement(1, "red", "g", False)], "1 images that it is true of, 1 that not"),
        (about(15, ("red", "blue"), (True, False)), "about an image that is not there: there are 3"),
    ],
)
def test_wrong_statements_are_errors_before_anything_is_asked(model, processor, images, statements, message):
    with pytest.raises(ValueError, match=message):
        emergence(model, processor, images, statements)


def test_phrases_without_words_are_errors_that_name_them(model, processor, pixels):
    with pytest.raises(ValueError, match="there are no phrases"):
        evidence_by_layer(model, processor, pixels, [])
    with pytest.raises(ValueError, match="phrase ' ' is empty"):
        evidence_by_layer(model, processor, pixels, [" "])
