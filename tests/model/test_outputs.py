"""What comes out is readable: words with their evidence, tables, and short prints."""

import json

import pytest
import torch

from devil_hf.model.outputs_devil import word_evidence


@pytest.fixture(scope="module")
def described(model, pixel_values):
    return model.describe(pixel_values, evidence=True, max_new_tokens=6)


def test_every_description_becomes_one_row_with_its_words(described, processor):
    rows = processor.post_process_descriptions(described)
    texts = processor.batch_decode(described.sequences, skip_special_tokens=True)
    assert [row["description"] for row in rows] == [text.strip() for text in texts]
    assert [row["image"] for row in rows] == described.image_index.tolist()
    assert [row["layer"] for row in rows] == [described.layer_of(row) for row in range(len(texts))]
    for number, row in enumerate(rows):
        special = torch.isin(described.sequences[number], torch.tensor(processor.tokenizer.all_special_ids))
        nats = described.token_evidence[number][~special]
        if row["words"]:
            assert sum(value for _, value in row["words"]) == pytest.approx(float(nats.sum()), abs=1e-4)
            assert row["evidence"] == pytest.approx(float(nats.mean()), abs=1e-4)
        assert [word for word, _ in row["words"]] == row["description"].split()
    named = processor.post_process_descriptions(described, ["x.png", "y.png", "z.png"])
    assert {row["image"] for row in named} == {"x.png", "y.png", "z.png"}
    json.dumps(rows)


def test_a_word_of_several_tokens_owes_what_its_tokens_owe_together(tokenizer):
    ids = tokenizer("striped zebra", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    words = word_evidence(tokenizer, [(token, 1.0) for token in ids])
    assert [word for word, _ in words] == ["striped", "zebra"]
    assert sum(nats for _, nats in words) == len(ids) and words[1][1] > 1


def test_outputs_print_shapes_not_numbers(described, model, pixel_values, phrases, processor, images):
    assert len(repr(described)) < 500 and f"({len(described.sequences)}, " in repr(described)
    maps = model.attribute(pixel_values, phrases=phrases)
    assert len(repr(maps)) < 500 and model.layer_names[0] in repr(maps)
    overlays = processor.overlay(maps, images=images)
    assert len(repr(overlays)) < 500


def test_places_can_be_named_layer_by_layer(model, pixel_values):
    deep, shallow = model.layer_names[-1], model.layer_names[0]
    both = model.describe(pixel_values, locations={deep: [(0, 1)], shallow: [(3, 4)]}, evidence=True, max_new_tokens=5)
    assert [both.layer_of(row) for row in range(6)] == [deep] * 3 + [shallow] * 3
    assert both.locations.tolist() == [[0, 1]] * 3 + [[3, 4]] * 3
    for layer, place, rows in ((deep, (0, 1), slice(0, 3)), (shallow, (3, 4), slice(3, 6))):
        alone = model.describe(pixel_values, layers=layer, locations=[place], evidence=True, max_new_tokens=5)
        width = alone.sequences.shape[1]
        assert torch.equal(both.sequences[rows, :width], alone.sequences)
        torch.testing.assert_close(both.token_evidence[rows, :width], alone.token_evidence, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="leave out layers"):
        model.describe(pixel_values, layers=deep, locations={deep: [(0, 1)]})
