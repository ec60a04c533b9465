"""Captions are tokenised once, and as the processor does it."""

from collections import Counter

import pytest
import torch

from devil_hf.settings import make
from devil_hf.training.feed import CaptionCollator
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from devil_hf.training.tokens import CaptionTokens

CAPTIONS = ["a red dog", "the cat on grass", "a", "a red dog", "left of the small dotted square on the right of grass"]


@pytest.fixture
def read(monkeypatch, processor):
    """How often the tokenizer has read each text since the test began."""
    texts: Counter = Counter()
    kind = type(processor.tokenizer)
    original = kind.__call__

    def counting(self, text=None, *args, **kwargs):
        texts.update([text] if isinstance(text, str) else text)
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    return texts


@pytest.mark.parametrize("most", [100, 3, 1])
def test_a_batch_is_that_of_the_processor(processor, most):
    expected = processor(text=CAPTIONS, max_length=most)
    found = CaptionTokens(processor).batch(CAPTIONS, most)
    assert set(found) == {"input_ids", "attention_mask"}
    for name, values in found.items():
        assert values.dtype == expected[name].dtype and torch.equal(values, expected[name])


def test_no_caption_is_read_twice(processor, read):
    tokens = CaptionTokens(processor)
    tokens.read(CAPTIONS)
    assert set(read) == set(CAPTIONS) and max(read.values()) == 1
    features = {"pooled_features": [torch.zeros(2)]}
    collator = CaptionCollator(processor, 4, tokens)
    for _ in range(3):
        assert collator([features | {"caption": text} for text in CAPTIONS])["input_ids"].shape == (5, 4)
    assert max(read.values()) == 1


def test_what_is_not_kept_is_read_again(processor, read):
    tokens = CaptionTokens(processor, kept=1)
    first, second = (tokens.batch(CAPTIONS, 100) for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert sorted(read.values()) == [1, 2, 2, 2]


@pytest.mark.parametrize(("caption", "error"), [("", ValueError), ("  ", ValueError), (3, TypeError)])
def test_what_the_processor_refuses_is_refused_in_its_words(processor, caption, error):
    with pytest.raises(error) as expected:
        processor(text=[caption])
    with pytest.raises(error) as found:
        CaptionTokens(processor).batch(["a red dog", caption], 100)
    assert str(found.value) == str(expected.value)


def test_a_training_reads_each_caption_once(shared_fields, tmp_path, read):
    """Those of the validation, too, though they are checked, evaluated again and again, and described."""
    fields = shared_fields | {"output_dir": str(tmp_path / "run"), "cache_features": str(tmp_path / "features")}
    train(make(Recipe, fields))
    assert len(read) > 3 and max(read.values()) == 1
