"""What is reported of two networks is what a naive loop finds, and equal networks report nothing."""

import copy
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from devil_hf.build.models import with_backbone
from devil_hf.checkpoints.loading import load
from devil_hf.questions.difference import (
    GAINED,
    LOST,
    MOST_DRAWS,
    PLAUSIBLE,
    Reading,
    changed_images,
    changed_words,
    check_images,
    check_level,
    check_words,
    compare_networks,
    contrast,
    evidence_of_words,
    images_needed,
    read_images,
    said_words,
    text_log_probs,
    told,
)

WORDS = ["red", "dog", "grass"]


@pytest.fixture(scope="module")
def other(model, processor):
    """The same translator behind a backbone whose weights are disturbed."""
    torch.manual_seed(5)
    weights = {name: one + 0.5 * one.std() * torch.randn_like(one) if one.ndim > 1 else one for name, one in own(model).items()}
    backbone = copy.deepcopy(model.backbone)
    backbone.module.load_state_dict(weights)
    return with_backbone(model, processor, backbone)


def own(model):
    return model.backbone.module.state_dict()


@pytest.fixture(scope="module")
def pictures(images):
    return [(f"{number}.png", images[number % 3].rotate(17 * number)) for number in range(16)]


@pytest.fixture(scope="module")
def readings(model, processor, other, pictures):
    both, keys = read_images([(model, processor), other], [*pictures[:2], ("bad.png", None), *pictures[2:6]])
    assert keys == [key for key, _ in pictures[:6]]
    for reading in both:
        reading.texts += [f"a {'red' if at % 2 else 'blue'} dog" for at in range(6)]
    both[1].texts[3] = "the green grass"
    return both


def test_a_word_of_a_share_of_images_tells_the_logarithm_of_the_share():
    log_probs = np.log(np.array([[0.5, 0.1], [0.5, 0.1], [1e-300, 0.1], [1e-300, 0.1]]))
    assert told(log_probs) == pytest.approx([math.log(2), 0.0])
    drawn = np.random.default_rng(0).normal(-3, 1, (7, 4))
    for word in range(4):
        p = np.exp(drawn[:, word])
        naive = sum(one / p.sum() * math.log(one / p.mean()) for one in p)
        assert told(drawn)[word] == pytest.approx(naive)


def test_changes_and_p_values_are_those_of_a_naive_loop():
    rng = np.random.default_rng(1)
    a, b = rng.normal(-3, [[[2.0, 0.3]]], (1, 8, 2)), rng.normal(-3, [[[0.3, 0.3]]], (1, 8, 2))
    found = {one.word: one for one in changed_words(a, b, ["red", "dog"], ["all"], least=0.0)}
    one, two = np.exp(a[0]), np.exp(b[0])
    for at, word in enumerate(["red", "dog"]):
        sizes = []
        for signs in range(2**8):
            kept = np.array([signs >> n & 1 for n in range(8)], dtype=bool)
            sides = (np.where(kept, one[:, at], two[:, at]), np.where(kept, two[:, at], one[:, at]))
            sizes.append(told(np.log(sides[0])) - told(np.log(sides[1])))
        assert found[word].told_a - found[word].told_b == pytest.approx(sizes[-1])
        assert found[word].p == pytest.approx(np.mean(np.abs(sizes) >= abs(sizes[-1]) - 1e-9))


def test_what_one_network_tells_and_the_other_does_not_is_lost_one_way_and_gained_the_other():
    rng = np.random.default_rng(2)
    there = rng.random((40, 3)) < 0.3
    a = np.where(there, -1.0, -6.0)[None] + rng.normal(0, 0.1, (2, 40, 3))
    b = a + rng.normal(0, 0.1, (2, 40, 3))
    b[1, :, 0] = rng.permutation(a[1, :, 1]) * 0.01 - 3.0  # at the second layer, the first word tells nothing
    for pair, verdict in (((a, b), LOST), ((b, a), GAINED)):
        found = changed_words(*pair, words=WORDS, layers=["all", "layer1"])
        assert [(one.layer, one.word, one.verdict) for one in found if one.verdict] == [("layer1", "red", verdict)]


def test_equal_networks_report_nothing():
    rng = np.random.default_rng(3)
    table = rng.normal(-3, 1, (2, 20, 3))
    assert {(one.p, one.verdict) for one in changed_words(table, table.copy(), WORDS, ["all", "layer1"])} == {(1.0, None)}
    families = [rng.normal(-3, 1, (2, 1, 13, 10)) + rng.normal(0, 1, (1, 1, 13, 10)) for _ in range(60)]
    names = [f"word{number}" for number in range(10)]
    wrong = sum(any(one.verdict for one in changed_words(a, b, names, ["all"], least=0.0)) for a, b in families)
    assert wrong <= 8, "of 60 families at 5 %"


def test_small_changes_are_certain_but_not_reported():
    rng = np.random.default_rng(4)
    a = np.where(rng.random((200, 1)) < 0.3, -1.0, -6.0)[None]
    b = 0.8 * a
    (found,) = changed_words(a, b, ["red"], ["all"])
    assert found.q < 0.001 and found.verdict is None
    (found,) = changed_words(a, b, ["red"], ["all"], least=0.0)
    assert found.verdict == LOST


def test_words_of_images_are_scored_as_one_by_one(model, processor, readings, pictures):
    reading = readings[0]
    layers = ["all", model.layer_names[1]]
    table = evidence_of_words(reading, WORDS, layers)
    pixels = processor(images=[pictures[4][1]], return_tensors="pt")
    phrases = processor(text=WORDS, return_tensors="pt")
    for row, layer in enumerate((None, model.layer_names[1])):
        wanted = model.score(**pixels, **phrases, layers=layer)
        evidence = (wanted.log_probs - wanted.null_log_probs)[0]
        assert table[row, 4] == pytest.approx(evidence.numpy(), abs=1e-4)


@torch.no_grad()
def test_texts_are_scored_as_one_by_one_and_words_add_up(model, processor, readings):
    texts = ["a red dog", "the green grass on the left"]
    found = text_log_probs(readings[0], texts, [1, 5])
    for at, (text, words) in enumerate(zip(texts, found, strict=True)):
        row = [1, 5][at]
        phrases = processor(text=[text], return_tensors="pt")
        wanted = float(model.score_prefix(readings[0].prefix(rows=[row]), phrases).sum())
        assert [word for word, _ in words] == text.split()
        assert sum(nats for _, nats in words) == pytest.approx(wanted, abs=1e-3)


def test_images_are_sorted_by_how_much_each_network_prefers_its_own_words(readings):
    a, b = readings
    (found,) = changed_images(a, b, list("abcdef"))
    assert found.image == "d", "both say the same of the others"
    sums = {}
    for name, reading in (("a", a), ("b", b)):
        for text in (a.texts[3], b.texts[3]):
            (words,) = text_log_probs(reading, [text], [3])
            sums[name, text] = sum(nats for _, nats in words)
    wanted = sums["a", a.texts[3]] - sums["b", a.texts[3]] + sums["b", b.texts[3]] - sums["a", b.texts[3]]
    assert found.change == pytest.approx(wanted, abs=1e-3)
    assert isinstance(found.more_a, str) and changed_images(a, a, list("abcdef")) == []


@torch.no_grad()
def test_contrastive_decoding_takes_the_plausible_word_that_the_other_finds_least_likely(readings):
    one, two = readings
    said: list[int] = []
    for _ in range(4):
        logits = []
        for reading in readings:
            start = reading.model.embed_prefix(reading.prefix(rows=[2]))
            words = reading.model.get_input_embeddings()(torch.tensor([said], dtype=torch.long))
            logits.append(reading.model.language_model(inputs_embeds=torch.cat([start, words], dim=1)).logits[0, -1])
        here, there = (one.log_softmax(dim=-1) for one in logits)
        gain = (here - there).masked_fill(here < here.max() + math.log(PLAUSIBLE), -float("inf"))
        said.append(int(gain.argmax()))
    assert contrast(one, two, 2, max_new_tokens=4) == one.processor.decode(said, skip_special_tokens=True).strip()


def test_the_whole_reports_nothing_of_a_copy_and_is_json(model, processor, pictures):
    found = compare_networks((model, processor), (model, processor), pictures, words=["a red dog"], level=0.2)
    assert found.images == 16 and found.layers == ("all", *model.layer_names)
    assert not any(found.found(LOST).values()) and not any(found.found(GAINED).values()) and found.examples == ()
    assert json.loads(json.dumps(found.as_record()))["images"] == 16


def test_networks_with_other_words_are_compared_by_those_that_both_have(model, processor, pictures):
    shapes = load("shapes", "cpu")
    found = compare_networks((model, processor), shapes, pictures, words=["red", "blue"])
    assert found.layers == ("all", *(name for name in model.layer_names if name in shapes[0].layer_names))
    assert {"red", "blue"} <= {one.word for one in found.words} and not {one.word for one in found.words} & {*found.left_out}
    readings, _ = read_images([(model, processor), shapes], pictures[:2])
    readings[0].texts, readings[1].texts = ["a red circle", "a dog"], ["a blue circle", "a blue square"]
    (one,) = changed_images(*readings, ["first", "second"])
    assert one.image == "first" and one.more_a is None, "the other one's language model knows no dog"
    assert [word for word, _ in one.words_b] == ["a", "blue", "circle"]
    with pytest.raises(ValueError, match="cannot represent the word 'dog'"):
        compare_networks((model, processor), shapes, pictures, words=["dog"])


def test_other_weights_are_read_by_the_same_translator(model, processor, tmp_path, pixel_values):
    weights = {name: one + 0.1 for name, one in own(model).items() if one.is_floating_point()}
    rest = {name: one for name, one in own(model).items() if not one.is_floating_point()}
    save_file({**weights, **rest, "fc.weight": torch.zeros(3, 4)}, tmp_path / "tuned.safetensors")
    before = [maps.clone() for maps in model.extract_features(pixel_values)]
    twin, same = with_backbone(model, processor, tmp_path / "tuned.safetensors")
    assert twin.translator is model.translator and twin.language_model is model.language_model and same is processor
    name = next(iter(weights))
    torch.testing.assert_close(own(twin)[name], weights[name])
    torch.testing.assert_close(model.extract_features(pixel_values), before)
    save_file({name: one for name, one in own(model).items() if name != "conv1.0.weight"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"less.safetensors holds another architecture: conv1.0.weight is not there"):
        with_backbone(model, processor, tmp_path / "less.safetensors")
    (tmp_path / "none.safetensors").write_bytes(b"no weights")
    with pytest.raises(OSError, match=r"none.safetensors is no safetensors file"):
        with_backbone(model, processor, tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        with_backbone(model, processor, tmp_path / "absent.safetensors")


def test_networks_with_other_features_are_refused(model, processor):
    wide = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match=r"the translator reads layers of so many channels: .*, but this network has"):
        with_backbone(model, processor, wide)


def test_too_few_images_are_refused_with_the_number_that_is_needed(model, processor, pictures):
    needed = images_needed(layers=5, words=100, level=0.05)
    assert 2 / 2**needed <= 0.05 / 500 < 2 / 2 ** (needed - 1) and needed == 15
    check_images(15, 5)
    with pytest.raises(ValueError, match=r"14 images are too few: .* a false discovery rate of 0.05 need 15"):
        check_images(14, 5)
    with pytest.raises(ValueError, match="images are too few"):
        compare_networks((model, processor), (model, processor), pictures[:5])
    with pytest.raises(ValueError, match="images are too few"):  # of a stream, as soon as they are counted
        compare_networks((model, processor), (model, processor), iter(pictures[:5]))


@pytest.mark.parametrize(("layers", "words"), [(1, 100), (5, 100), (3, 777), (7, 33_333), (4, 1_000_000), (5, 1_000_000)])
def test_a_level_that_is_advised_is_possible(layers, words):
    with pytest.raises(ValueError, match="fewer layers or words") as refused:
        check_level(layers, words, 1e-9)
    advised = re.search(r"ask for a level of (\S+) or more", str(refused.value))
    assert (advised is None) == (2 * layers * words >= MOST_DRAWS)
    if advised:
        check_level(layers, words, float(advised[1]))


def test_wrong_questions_are_errors_that_name_the_value(model, processor, pictures):
    both = ((model, processor), (model, processor), pictures)
    with pytest.raises(ValueError, match="unknown layer 'layer9'"):
        compare_networks(*both, layers=["layer9"])
    with pytest.raises(ValueError, match="cannot represent the word ' '"):
        compare_networks(*both, words=[" "])
    with pytest.raises(ValueError, match="level=0 must lie between"):
        compare_networks(*both, level=0)
    check_words(WORDS, processor)


def test_words_are_those_said_of_most_images():
    assert said_words(["a red dog, red", "a dog", "a well-known cat"], most=2) == ["a", "dog"]
    assert said_words(["a cat", "the dog"]) == []


def test_a_reading_shows_one_layer_or_all(model, readings):
    reading: Reading = readings[0]
    name = model.layer_names[0]
    torch.testing.assert_close(reading.prefix(name), model.translate([reading.pooled[0], *[None] * (len(reading.pooled) - 1)]))
    assert len(reading.prefix()) == 6 and len(reading.prefix(rows=[0, 2])) == 2
