"""What comes out is readable: words with their evidence, tables, and short prints."""

import json

import pytest
import torch

from devil_hf.model.outputs_devil import DescribeOutput, word_evidence
from devil_hf.report.notebook import show, to_pandas


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


def test_tables_and_notebook_views(described, model, pixel_values, phrases, processor):
    pytest.importorskip("pandas")
    rows = processor.post_process_descriptions(described)
    table = to_pandas(rows)
    assert len(table) == len(rows) and list(table["description"]) == [row["description"] for row in rows]
    html = show(rows)._repr_html_()
    assert html.count("<tr>") == len(rows) and "nats" in html
    names = ["a dog", "the green grass", "a", "red"]
    maps = model.attribute(pixel_values, phrases=phrases, layers=-1)
    table = to_pandas(maps, names)
    (layer, values), *_ = maps.maps.items()
    assert len(table) == values.numel()
    picked = table[(table.image == 2) & (table.phrase == "a") & (table.row == 1) & (table.column == 3)]
    assert picked["evidence"].item() == pytest.approx(float(values[2, 2, 1, 3])) and picked["layer"].item() == layer
    scores = model.score(pixel_values, **phrases)
    table = to_pandas(scores, names)
    assert table[(table.question == 1) & (table.phrase == "red")]["log_prob"].item() == pytest.approx(
        float(scores.log_probs[1, 3])
    )
    with pytest.raises(ValueError, match="1 phrases were given, but 4"):
        to_pandas(maps, ["a dog"])


def test_words_cannot_break_out_of_the_html(processor, tokenizer):
    ids = tokenizer("<script>alert(1)</script>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    evidence = torch.ones(ids.shape)
    output = DescribeOutput(
        sequences=ids,
        image_index=torch.zeros(1, dtype=torch.long),
        layer_index=torch.zeros(1, dtype=torch.long),
        locations=torch.full((1, 2), -1),
        token_evidence=evidence,
        layer_names=["<b>"],
    )
    html = show(processor.post_process_descriptions(output))._repr_html_()
    assert "<script" not in html and "<b>" not in html


def test_outputs_print_shapes_not_numbers(described, model, pixel_values, phrases, processor, images):
    assert len(repr(described)) < 500 and f"({len(described.sequences)}, " in repr(described)
    maps = model.attribute(pixel_values, phrases=phrases)
    assert len(repr(maps)) < 500 and model.layer_names[0] in repr(maps)
    overlays = processor.overlay(maps, images=images)
    assert len(repr(overlays)) < 500
    assert show(overlays)._repr_html_().count("<img") == len(model.layer_names) * len(images) * 4


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
