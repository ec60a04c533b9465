"""The evidence of each word, its layers and its places are what asking one by one gives."""

import pytest
import torch

from devil_hf.questions.word_evidence import explain_words, hiding_weights, tile_shares

SENTENCE = "a red dog on the grass"


@pytest.fixture(scope="module")
def pixels(processor, images):
    return processor(images=images[:2], return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def explained(model, processor, pixels):
    return explain_words(model, processor, pixels, [SENTENCE, "a blue square"], combine="mean")


def of_words(model, processor, prefix, sentence=SENTENCE):
    """Log-probabilities of the words under one prefix, a word being the tokens that begin with its space."""
    ids = processor(text=[sentence], return_tensors="pt")["input_ids"]
    tokens = model.score_prefix(prefix, {"input_ids": ids})[0, 0].tolist()
    words, sums = sentence.split(), []
    for token, nats in zip(ids[0].tolist(), tokens, strict=True):
        text = processor.tokenizer.decode([token])
        if not sums or text.startswith(" "):
            sums.append(0.0)
        sums[-1] += nats
    assert len(sums) == len(words)
    return torch.tensor(sums)


def test_evidence_and_layers_are_those_of_single_questions(model, processor, pixels, explained):
    null = of_words(model, processor, model.null_prefix())
    whole = of_words(model, processor, model.ask(pixels[:1]))
    assert [word.text for word in explained[0].words] == SENTENCE.split()
    found = torch.tensor([word.evidence for word in explained[0].words])
    torch.testing.assert_close(found, whole - null, atol=1e-5, rtol=0)
    assert explained[0].evidence == pytest.approx(float((whole - null).sum()), abs=1e-4)
    for name in model.layer_names:
        alone = of_words(model, processor, model.ask(pixels[:1], layers=name)) - null
        rest = [other for other in model.layer_names if other != name]
        lost = whole - of_words(model, processor, model.ask(pixels[:1], layers=rest))
        for figure, wanted in (("alone", alone), ("lost", lost)):
            found = torch.tensor([getattr(word, figure)[name] for word in explained[0].words])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_places_are_those_of_single_questions(model, processor, pixels, explained):
    null = of_words(model, processor, model.null_prefix())
    for name in model.layer_names:
        maps = explained[0].by_layer[name]
        for row, column in ((0, 0), (1, 2)):
            asked = model.ask(pixels[:1], layers=name, locations=[(row, column)])
            torch.testing.assert_close(maps[:, row, column], of_words(model, processor, asked) - null, atol=1e-5, rtol=0)


def test_hiding_a_tile_is_the_mean_of_the_other_places(model, processor, pixels):
    """On a grid as fine as the layer's a tile is a location, and what is left is the mean of the others."""
    name = model.layer_names[-1]
    index = len(model.layer_names) - 1
    features = model.extract_features(pixels[:1])
    grid = tuple(features[index].shape[-2:])
    (found,) = explain_words(model, processor, pixels[:1], [SENTENCE], layers=name, tiles=grid, combine="mean")
    whole = of_words(model, processor, model.ask(pixels[:1], layers=name))
    for row, column in ((0, 0), (grid[0] - 1, grid[1] - 2)):
        others = torch.ones(grid, dtype=torch.bool)
        others[row, column] = False
        pooled = [None] * len(model.layer_names)
        pooled[index] = features[index][0][:, others].mean(dim=1)[None]
        lost = whole - of_words(model, processor, model.translate(pooled))
        torch.testing.assert_close(found.maps.maps["hidden"][0, :, row, column], lost, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tiles", "cells"), [(4, 4), (2, 4), (4, 2), (3, 7), (1, 5)])
def test_tiles_share_the_cells_out(tiles, cells):
    shares = tile_shares(tiles, cells)
    torch.testing.assert_close(shares.sum(dim=0), torch.ones(cells))
    torch.testing.assert_close(shares.sum(dim=1), torch.full((tiles,), cells / tiles))
    weights = hiding_weights((tiles, 2), (cells, cells))
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(2 * tiles))


def test_images_are_explained_as_if_each_were_alone(model, processor, pixels, explained):
    (alone,) = explain_words(model, processor, pixels[1:], ["a blue square"], combine="mean")
    assert [word.text for word in alone.words] == [word.text for word in explained[1].words] == ["a", "blue", "square"]
    for name, values in alone.maps.maps.items():
        torch.testing.assert_close(values, explained[1].maps.maps[name], atol=1e-5, rtol=0)


def test_without_a_sentence_the_image_is_described_first(model, processor, pixels):
    (found,) = explain_words(model, processor, pixels[:1], max_new_tokens=5)
    said = model.generate(pixels[:1], max_new_tokens=5)
    assert found.text == processor.batch_decode(said, skip_special_tokens=True)[0].strip()
    assert " ".join(word.text for word in found.words) == " ".join(found.text.split())


def test_the_p_value_counts_images_that_carry_the_sentence_as_well(model, processor, pixels):
    prefixes = model.ask(pixels)
    own, other = (float(of_words(model, processor, prefixes[[row]]).sum()) for row in (0, 1))
    others = torch.cat([prefixes, prefixes[1:], prefixes[1:]])
    (found,) = explain_words(model, processor, pixels[:1], [SENTENCE], others=others)
    assert found.permutations == 4 and found.p_value == (2 if own > other else 5) / 5
    (found,) = explain_words(model, processor, pixels[:1], [SENTENCE])
    assert found.permutations == 0 and found.p_value is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sentences": ["a dog"]}, r"sentences=\['a dog'\] for 2 images"),
        ({"sentences": ["a dog", ""]}, "phrase '' is empty"),
        ({"sentences": ["a", "b"], "max_new_tokens": 3}, "max_new_tokens"),
        ({"combine": "joint"}, "combine='joint' is not one of"),
        ({"tiles": (1, 1)}, r"tiles=\(1, 1\)"),
        ({"layers": "layer9"}, "unknown layer 'layer9'"),
    ],
)
def test_wrong_questions_are_errors_that_name_the_value(model, processor, pixels, wrong, message):
    with pytest.raises(ValueError, match=message):
        explain_words(model, processor, pixels, **wrong)
