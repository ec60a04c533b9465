"""Captions that the language model reads as no words are counted where rows are decoded, and end no training."""

import io

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from devil_hf import DevilProcessor
from devil_hf.data.decoding import BadSamples, PairDecoder
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.training.feed import CaptionCollator
from devil_hf.training.tokens import CaptionTokens


@pytest.fixture
def by_words():
    """A processor whose tokenizer knows whole words, among them what spells its padding token."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "dog": 2, "red": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    return DevilProcessor(DevilImageProcessor(crop_size={"height": 8, "width": 8}), tokenizer)


def row(*captions):
    content = io.BytesIO()
    Image.new("RGB", (9, 9)).save(content, "PNG")
    image = {"bytes": content.getvalue(), "path": None}
    return {"key": "k", "image": image, "captions": list(captions), "region": None, "problem": None}


@pytest.mark.parametrize("caption", ["dog <pad>", "zebra quagga"])
def test_a_caption_of_no_words_is_a_bad_sample(by_words, caption, caplog):
    bad = BadSamples(limit=1)
    decoder = PairDecoder(bad, read=CaptionTokens(by_words).read)
    assert decoder(row(caption)) is None and (bad.read, bad.bad) == (1, 1)
    assert "skipped k: unreadable caption (ValueError: phrase" in caplog.text
    item = decoder(row(caption, "red dog", "dog " * 300))
    assert item["captions"] == ["red dog", ("dog " * 300).strip()] and (bad.read, bad.bad) == (2, 1)
    assert len(CaptionCollator(by_words)([item])["input_ids"]) == 1
