"""Results in a notebook: data frames and views of what the public calls return."""

import pytest
import torch

from devil_hf.model.outputs_devil import DescribeOutput
from devil_hf.questions.word_evidence import explain_words
from devil_hf.report.notebook import show, to_pandas


@pytest.fixture(scope="module")
def described(model, pixel_values):
    return model.describe(pixel_values, evidence=True, max_new_tokens=6)


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


def test_explained_sentences_are_tables_of_words_and_sentences_in_tints(model, processor, pixel_values, images):
    pytest.importorskip("pandas")
    found = explain_words(model, processor, pixel_values[:2], ["a red dog", "grass"])
    table = to_pandas(found)
    assert list(table["word"]) == ["a", "red", "dog", "grass"] and list(table["sentence"]) == [0, 0, 0, 1]
    layer = model.layer_names[-1]
    assert table["evidence"][1] == found[0].words[1].evidence
    assert (
        table[f"alone {layer}"][2] == found[0].words[2].alone[layer]
        and table[f"lost {layer}"][3] == found[1].words[0].lost[layer]
    )
    view = show(found)._repr_html_()
    assert view.count("<tr>") == 2 * (1 + 2 * len(model.layer_names)) and f"lost without {layer}" in view
    maps = show(processor.overlay(found[0].maps, images=images[:1]))._repr_html_()
    assert maps.count("<img") == 2 * 3


def test_directions_are_tables_with_the_evidence_of_each_word(model, processor):
    pytest.importorskip("pandas")
    vectors = torch.randn(2, model.backbone.channels[-1], generator=torch.Generator().manual_seed(0))
    output = model.describe_directions(vectors, model.layer_names[-1], evidence=True, max_new_tokens=5)
    rows = processor.post_process_descriptions(output, ["one", "other"])
    table = to_pandas(rows)
    assert list(table["image"]) == ["one", "other"] and list(table["words"]) == [row["words"] for row in rows]
    pooled = [None] * len(model.layer_names)
    for at, row in enumerate(rows):
        pooled[-1] = vectors[at : at + 1]
        said = [token for token in output.sequences[at].tolist() if token not in processor.tokenizer.all_special_ids]
        with torch.no_grad():
            prefix = torch.cat([model.translate(pooled), model.null_prefix()])
            given, null = model.score_prefix(prefix, {"input_ids": torch.tensor([said])}).sum(dim=(1, 2)).tolist()
        assert sum(nats for _, nats in row["words"]) == pytest.approx(given - null, abs=1e-3)


def test_overlays_are_shown_layer_by_layer(model, pixel_values, phrases, processor, images):
    overlays = processor.overlay(model.attribute(pixel_values, phrases=phrases), images=images)
    view = show(overlays)._repr_html_()
    assert view.count("<img") == len(model.layer_names) * len(images) * 4
    assert view.count("<tr>") == len(model.layer_names)
