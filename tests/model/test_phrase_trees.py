"""Phrases read as a tree have the log-probabilities of each read alone, with every kind of language model."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from devil_hf import DevilModel
from devil_hf.model import scoring_devil
from devil_hf.model.scoring_devil import room_for_trees, split_phrases

from ..conftest import SMALL_TRANSLATOR
from .test_model import naive_log_probs, rows

COMMON = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
COMMON |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "gpt2": GPT,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 9},
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 2},  # grouped queries
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},  # shorter than the tree, and longer than a phrase
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},  # shorter than a phrase
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "falcon": {"alibi": False},
    "falcon alibi": {"alibi": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "recurrent_gemma": {"num_key_value_heads": 1, "lru_width": 32, "num_hidden_layers": 3},
    "mamba": {},
    "roberta": {"is_decoder": True},  # counts positions from behind the padding's
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True},  # reads no mask of pairs
}
ALONE = {"falcon alibi", "bloom", "recurrent_gemma", "mamba", "roberta", "xlm"}  # one phrase after another
IDS = torch.tensor([[5, 7, 9, 11], [5, 7, 3, 0], [6, 0, 0, 0], [5, 7, 9, 11], [6, 7, 9, 12], [8, 0, 0, 0]])
PHRASES = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "scored_mask": IDS > 5}


def build(model, family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **{**COMMON, **FAMILIES[family]})
    language_model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in language_model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)  # so that every token seen or hidden makes a difference of nats
    return DevilModel.from_backbone_and_language_model(model.backbone, language_model, **SMALL_TRANSLATOR).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_a_tree_as_each_phrase_alone(model, family):
    built = build(model, family)
    assert (room_for_trees(built.language_model) > 1) == (family not in ALONE)
    prefix = torch.randn(3, 4, 32)
    found = built.score_prefix(prefix, PHRASES)
    for n, one in enumerate(prefix):
        for k, tokens in enumerate(rows(PHRASES)):
            expected = naive_log_probs(built, one[None], tokens).masked_fill(~PHRASES["scored_mask"][k, : len(tokens)], 0)
            torch.testing.assert_close(found[n, k, : len(tokens)], expected, atol=1e-4, rtol=0)
            assert found[n, k, len(tokens) :].abs().sum() == 0


@torch.no_grad()
def test_every_beginning_is_read_once_and_nothing_else(model, monkeypatch):
    read = []
    run = scoring_devil.run_language_model

    def counting(language_model, embeds, keep, **options):
        read.append((tuple(embeds.shape[:2]), keep))
        return run(language_model, embeds, keep, **options)

    monkeypatch.setattr(scoring_devil, "run_language_model", counting)
    width = model.get_input_embeddings().weight.shape[1]
    whole = model.score_prefix(torch.randn(3, model.config.prefix_length, width), PHRASES)
    start = model.config.prefix_length + 1
    # 5, 57, 579, 6, 67, 679; logits behind these and behind the prefix.
    assert read == [((3, start + 6), 7)] and whole.shape == (3, 6, 4)


@torch.no_grad()
def test_many_phrases_are_read_in_parts(model, monkeypatch):
    prefix = torch.randn(3, model.config.prefix_length, model.get_input_embeddings().weight.shape[1])
    whole = model.score_prefix(prefix, PHRASES)
    for most in (1, 3, 5):
        monkeypatch.setattr(scoring_devil, "BEGINNINGS", most)
        torch.testing.assert_close(model.score_prefix(prefix, PHRASES, chunk_size=2), whole, atol=1e-5, rtol=1e-5)
        parts = list(split_phrases([tuple(tokens.tolist()) for tokens in rows(PHRASES)], most))
        assert all(len(starts) <= most or group.stop == group.start + 1 for group, starts in parts)
        bounds = [group.start for group, _ in parts] + [parts[-1][0].stop]
        assert bounds[0] == 0 and bounds[-1] == 6 and all(a < b for a, b in pairwise(bounds))


@torch.no_grad()
def test_places_of_equal_features_are_asked_once(model, phrases, monkeypatch):
    asked = []
    translate = model.translate
    features = [torch.randn(1, channels, 3, 3) for channels in model.backbone.channels]
    features[-1][:, :, 1:] = features[-1][:, :, 2:, 2:]
    expected = [model.score(feature_maps=features, layers=-1, locations=[(row, 0)], **phrases).evidence[0] for row in range(3)]

    def counting(pooled, *arguments, **options):
        asked.append([len(one) for one in pooled if one is not None])
        return translate(pooled, *arguments, **options)

    monkeypatch.setattr(model, "translate", counting)
    (found,) = model.attribute(phrases=phrases, feature_maps=features, layers=-1).maps.values()
    assert [4] in asked and max(map(max, filter(None, asked))) == 4
    torch.testing.assert_close(found[0, :, :, 0].T, torch.stack(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_answers_of_many_phrases_count_towards_the_memory_of_a_chunk(model, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (700, 6), generator=generator)
    phrases = {"input_ids": ids, "attention_mask": (torch.arange(6) < torch.arange(700)[:, None] % 6 + 1).long()}
    features = [torch.randn(2, channels, 5, 5, generator=generator) for channels in model.backbone.channels]
    (whole,) = model.attribute(phrases=phrases, feature_maps=features, layers=-1, chunk_size=50).maps.values()
    held = []
    check = scoring_devil.finite_log_probs

    def counting(log_probs, *arguments):
        held.append(log_probs.nbytes)
        return check(log_probs, *arguments)

    monkeypatch.setattr(scoring_devil, "finite_log_probs", counting)
    monkeypatch.setattr(scoring_devil, "CHUNK_BYTES", 1 << 19)
    (found,) = model.attribute(phrases=phrases, feature_maps=features, layers=-1).maps.values()
    assert len(held) > 10 and max(held) <= (1 << 19) / 4
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size", "sizes"), [((2, 5, 5), 20, [17, 17, 16]), ((1, 7, 7), 6, [6] * 4 + [5] * 5), ((1, 7, 7), 100, [49])]
)
def test_chunks_of_places_are_of_equal_size(model, phrases, monkeypatch, shape, size, sizes):
    """The last of them would otherwise be a few rows, which a processor multiplies no faster than many."""
    images, *grid = shape
    features = [torch.randn(images, channels, *grid) for channels in model.backbone.channels]
    (whole,) = model.attribute(phrases=phrases, feature_maps=features, layers=-1, measure="sum").maps.values()
    asked, translate = [], model.translate
    monkeypatch.setattr(model, "translate", lambda pooled, *rest: asked.append(pooled[-1]) or translate(pooled, *rest))
    (found,) = model.attribute(phrases=phrases, feature_maps=features, layers=-1, measure="sum", chunk_size=size).maps.values()
    assert [len(rows) for rows in asked] == sizes
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_chunks_of_prefixes_are_of_equal_size(model, monkeypatch):
    prefix = torch.randn(5, model.config.prefix_length, model.get_input_embeddings().weight.shape[1])
    whole, read, run = model.score_prefix(prefix, PHRASES), [], scoring_devil.run_language_model

    def counting(language_model, embeds, keep, **options):
        read.append(len(embeds))
        return run(language_model, embeds, keep, **options)

    monkeypatch.setattr(scoring_devil, "run_language_model", counting)
    found = model.score_prefix(prefix, PHRASES, chunk_size=4)
    assert read == [3, 2]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
