"""Descriptions whose finished rows leave are those of the library, with every kind of language model."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from devil_hf.checkpoints import decoding
from devil_hf.model.checkpoint_devil import COMPANIONS

from ..model.test_phrase_trees import ALONE, FAMILIES, build


def rows_read(built, *arguments, **options):
    """What is decoded, and how many rows the language model read for it."""
    read = []
    hook = built.language_model.register_forward_pre_hook(
        lambda _module, _given, named: read.append(
            len(named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"])
        ),
        with_kwargs=True,
    )
    try:
        return built.decode(*arguments, **options), read
    finally:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"xlm"}))  # which generates from no embeddings
def test_rows_that_end_leave_and_change_nothing(model, family, monkeypatch):
    built = build(model, family)
    prefix = torch.randn(16, 4, 32, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 14, "eos_token_id": list(range(5, 60, 4)), "pad_token_id": 0}
    found, read = rows_read(built, prefix, **options)
    monkeypatch.delitem(COMPANIONS, "decoding")
    expected, all_read = rows_read(built, prefix, **options)
    assert torch.equal(found, expected)
    lengths = (found > 0).sum(dim=1)
    assert lengths.min() <= decoding.STAGE < lengths.max()
    assert (min(read) < 16) == (sum(read) < sum(all_read)) == (family not in ALONE)


@torch.no_grad()
def test_equal_prefixes_are_decoded_once(model):
    prefix = torch.randn(3, model.config.prefix_length, model.get_input_embeddings().weight.shape[1])
    order = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    found, read = rows_read(model, prefix[order], max_new_tokens=6)
    assert max(read) == 3
    assert torch.equal(found, model.decode(prefix, max_new_tokens=6)[order])


@torch.no_grad()
def test_what_is_more_than_greedy_goes_to_the_library_as_a_whole(model, monkeypatch):
    prefix = torch.randn(4, model.config.prefix_length, model.get_input_embeddings().weight.shape[1])
    staged = []
    monkeypatch.setattr(decoding, "_in_stages", lambda *arguments: staged.append(1) or torch.zeros(4, 1, dtype=torch.long))

    class Silent(BaseStreamer):
        def put(self, value):
            pass

        def end(self):
            pass

    for options in (
        {"num_beams": 2},
        {"do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"guidance": 2.0},
        {"repetition_penalty": 1.5},
        {"min_new_tokens": 3},
        {"no_repeat_ngram_size": 2},
        {"generation_config": GenerationConfig(bad_words_ids=[[5]])},
        {"return_dict_in_generate": True},
    ):
        model.decode(prefix, max_new_tokens=5, **options)
        assert not staged, options
    model.decode(prefix[:1], max_new_tokens=5, streamer=Silent())
    monkeypatch.setattr(model.language_model.generation_config, "repetition_penalty", 1.5)
    model.decode(prefix, max_new_tokens=5)
    assert not staged
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "_in_stages", lambda *arguments: staged.append(1) or torch.zeros(4, 1, dtype=torch.long))
    for options in ({}, {"max_new_tokens": 5}, {"max_new_tokens": 5, "num_beams": 1, "do_sample": False, "guidance": 1.0}):
        model.decode(prefix, **options)
    assert len(staged) == 3
