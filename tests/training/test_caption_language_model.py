"""The caption language model listens to its context, and its documents are what they promise."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from devil_hf.training.small_models import caption_language_model
from devil_hf.training.small_models.caption_language_model import (
    CaptionLanguageModelSettings,
    KeywordCaptions,
    content_words,
    held_out_loss,
    train_caption_language_model,
    train_caption_tokenizer,
)
from devil_hf.training.small_models.documents import IGNORED_INDEX, caption_loss

COLOURS, ANIMALS, PLACES = (
    ["black", "white", "brown", "red"],
    ["dog", "cat", "horse", "bird"],
    ["grass", "snow", "sand", "water"],
)
GROUPS = [
    [f"A {colour} {animal} runs on the {place} .", f"The {animal} is {colour} and plays in {place}"]
    for colour in COLOURS
    for animal in ANIMALS
    for place in PLACES
]
TINY = {
    "vocab_size": 400,
    "width": 64,
    "layers": 2,
    "heads": 4,
    "dropout": 0.0,
    "context_length": 40,
    "warmup_steps": 10,
}


@pytest.fixture(scope="session")
def trained():
    torch.set_num_threads(1)
    arguments = CaptionLanguageModelSettings(
        **TINY,
        max_steps=240,
        batch_size=32,
        learning_rate=5e-3,
        logging_steps=120,
        max_words=4,
        own_words_probability=0.5,
    )
    random.Random(0).shuffle(groups := list(GROUPS))
    return train_caption_language_model(groups[8:], arguments, groups[:8])


@pytest.fixture(scope="module")
def documents():
    tokenizer = train_caption_tokenizer((caption for group in GROUPS for caption in group), 400)
    return KeywordCaptions(GROUPS, tokenizer, CaptionLanguageModelSettings(**TINY))


def test_content_words_leave_out_function_words_and_punctuation():
    assert content_words("A black-and-white dog, the dog's owner and 2 kids are in front of a red T-shirt .") == [
        "black-and-white", "dog", "dog's", "owner", "kids", "red", "t-shirt",
    ]  # fmt: skip


def test_the_tokenizer_drops_case_and_punctuation_and_round_trips_any_word():
    tokenizer = train_caption_tokenizer(["A black dog runs ."] * 3, 300)
    ids = tokenizer('A Black  dog, "runs" past Łódź\'s café!')["input_ids"]
    assert tokenizer.decode(ids).strip() == "a black dog runs past łódź's café"
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_a_document_is_bos_words_separator_caption_eos(documents):
    positions, start = documents.document(0, 0, [["red"], ["dog"]])
    ids, tokenizer = [token for (token,) in positions], documents.tokenizer
    assert tokenizer.decode(ids[:start]) == "<bos> red dog<sep>" and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[start:-1]) == " a black dog runs on the grass"


def test_words_of_one_group_share_a_position(documents):
    positions, start = documents.document(0, 0, [["red", "dog"], ["snow"]])
    words = documents.tokenizer(["red dog", "snow"], add_special_tokens=False)["input_ids"]
    assert start == 2 + 1 + len(words[1]), "BOS, both words at once, the pieces of the third, separator"
    assert positions[1] == words[0] and [token for (token,) in positions[2:-1][: len(words[1])]] == words[1]


def test_the_packed_share_decides_whether_positions_are_shared(documents):
    widths = {}
    for share in (0.0, 1.0):
        arguments = CaptionLanguageModelSettings(**TINY, packed_share=share)
        packed = KeywordCaptions(GROUPS, documents.tokenizer, arguments)
        widths[share] = next(packed.batches(random.Random(1), 64))[0].shape[2]
    assert widths[0.0] == 1 < widths[1.0], "most tokens in one position"


def test_a_long_document_keeps_its_caption_and_fits_the_context(documents):
    positions, start = documents.document(0, 0, [["dog"]] * 100)
    ids = [token for (token,) in positions]
    assert len(ids) == 40 and documents.tokenizer.decode(ids[start:-1]) == " a black dog runs on the grass"


def test_words_come_from_other_captions_unless_asked(documents):
    documents.settings.own_words_probability = 0.0
    drawn = {word for seed in range(20) for word in documents.draw_words(0, 0, random.Random(seed))}
    assert drawn == {"black", "dog", "plays", "grass"} and "runs" not in drawn


def test_batches_label_captions_only_and_repeat_with_the_seed(documents):
    first, second = (next(documents.batches(random.Random(3), 16)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    input_ids, labels = first[0][..., 0], first[1]
    tokenizer = documents.tokenizer
    for row, label in zip(input_ids, labels, strict=True):
        separator = int((row == tokenizer.sep_token_id).nonzero())
        assert (label[: separator + 1] == IGNORED_INDEX).all()
        end = int((row == tokenizer.eos_token_id).nonzero())
        assert (
            torch.equal(label[separator + 1 : end + 1], row[separator + 1 : end + 1])
            and (label[end + 1 :] == IGNORED_INDEX).all()
        )


def test_caption_loss_equals_the_library_loss_over_all_positions(trained):
    model, tokenizer, _ = trained
    documents = KeywordCaptions(GROUPS, tokenizer, CaptionLanguageModelSettings(**TINY, packed_share=1.0))
    input_ids, labels = next(documents.batches(random.Random(0), 8))
    table = model.get_input_embeddings().weight
    embeds = torch.zeros(*labels.shape, table.shape[1])
    for row, positions in enumerate(input_ids.tolist()):
        for place, tokens in enumerate(positions):
            if words := [token for token in tokens if token != tokenizer.pad_token_id]:
                embeds[row, place] = torch.stack([table[token] for token in words]).mean(dim=0)
    mask = (input_ids[..., 0] != tokenizer.pad_token_id).long()
    expected = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(caption_loss(model, input_ids, labels), expected, rtol=1e-5, atol=1e-5)


def test_the_trained_model_listens_to_the_words(trained):
    history = trained[2]
    assert [row["step"] for row in history] == [120, 240]
    assert history[-1]["loss_with_words"] < history[-1]["loss_without_words"] - 0.1


def test_training_repeats_with_its_seed_and_leaves_the_held_out_measure_alone():
    arguments = CaptionLanguageModelSettings(**TINY, max_steps=4, batch_size=8, logging_steps=2)
    measured, _, _ = train_caption_language_model(GROUPS, arguments, GROUPS[:2])
    plain, _, _ = train_caption_language_model(GROUPS, arguments)
    assert all(torch.equal(a, b) for a, b in zip(measured.parameters(), plain.parameters(), strict=True))


def test_a_stopped_training_goes_on_exactly_and_not_on_other_captions(tmp_path, monkeypatch):
    monkeypatch.setattr("devil_hf.training.small_models.optimisation.SAVE_SECONDS", 0.0)
    settings = CaptionLanguageModelSettings(**TINY | {"warmup_steps": 1, "dropout": 0.1}, max_steps=4, batch_size=4)
    whole, _, history = train_caption_language_model(GROUPS[:10], settings)
    caption_loss, calls = caption_language_model.caption_loss, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return caption_loss(*args, **kwargs)

    monkeypatch.setattr(caption_language_model, "caption_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_caption_language_model(GROUPS[:10], settings, unfinished=tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"other values of \['captions'\]"):
        train_caption_language_model(GROUPS[1:11], settings, unfinished=tmp_path / "a.pt")
    again, _, resumed = train_caption_language_model(GROUPS[:10], settings, unfinished=tmp_path / "a.pt")
    assert len(calls) == 5 and [row["loss"] for row in resumed] == [row["loss"] for row in history]
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), whole.parameters(), strict=True))


def test_model_and_tokenizer_load_through_the_auto_classes(trained, tmp_path):
    model, tokenizer, _ = trained
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert again("A red dog .")["input_ids"] == tokenizer("A red dog .")["input_ids"] and again.sep_token == "<sep>"
    documents = KeywordCaptions(GROUPS[:4], again, CaptionLanguageModelSettings(**TINY))
    assert held_out_loss(loaded, documents, True) == pytest.approx(held_out_loss(model, documents, True), abs=1e-6)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="width 30"):
        CaptionLanguageModelSettings(width=30, heads=4)
    with pytest.raises(ValueError, match="null_probability"):
        CaptionLanguageModelSettings(null_probability=1.0)
