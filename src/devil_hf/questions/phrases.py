"""Whether the language model knows the words of a phrase: every question asks this first, and in one way.

A word that it does not know is read as "unknown", the same for all such words, so that whatever is measured of it is of no word.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor


def unknown_phrases(processor: DevilProcessor, phrases: Iterable[str]) -> list[str]:
    """Those phrases that are empty, or hold words that the language model does not know, or reads as no words."""
    tokenizer = processor.tokenizer
    strange = {tokenizer.unk_token_id, *tokenizer.all_special_ids}

    def known(phrase: str) -> bool:
        ids = tokenizer(phrase, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return bool(phrase.strip()) and bool(ids) and not strange & set(ids)

    return [phrase for phrase in phrases if not known(phrase)]


def known_phrases(
    model: DevilModel, processor: DevilProcessor, phrases: Sequence[str], carrier: str | None = None
) -> dict[str, Tensor]:
    """Phrases as checked tokens, see `model.check_phrases`, all of whose words the language model knows.

    Raises:
        TypeError: for what is no list of texts.
        ValueError: for no phrases, and for one with words that the language model does not know.
    """
    if isinstance(phrases, str) or not isinstance(phrases, Sequence) or not all(isinstance(one, str) for one in phrases):
        raise TypeError(f"phrases={phrases!r:.100} must be a list of texts")
    if not phrases:
        raise ValueError("there are no phrases: name at least one")
    tokens = processor(text=list(phrases), carrier=carrier, return_tensors="pt")
    if strange := unknown_phrases(processor, phrases):
        raise ValueError(f"phrases {strange} hold words that this checkpoint's language model does not know: use others")
    return model.check_phrases(tokens)


__all__ = ["known_phrases", "unknown_phrases"]
