"""Tokens of captions: read once, many in one call of the tokenizer, and remembered.

A caption is met when its row is checked and in every step that shows it; a call of the tokenizer costs more than the caption
that it reads. What is no caption for the language model is said by the processor, word for word as it says it of any phrase.
"""

from collections.abc import Sequence

import numpy as np
import torch

from devil_hf.model.processing_devil import DevilProcessor

KEPT = 200_000  # captions whose tokens are remembered: some 80 MB


class CaptionTokens:
    """The tokens of captions as `processor(text=captions, max_length=...)` gives them.

    Args:
        processor: tokenises captions, and says what is wrong with one.
        kept: captions that are remembered; further ones are read whenever they are met.
    """

    def __init__(self, processor: DevilProcessor, kept: int = KEPT):
        self.processor, self.kept = processor, kept
        self._special = set(processor.tokenizer.all_special_ids)
        self._known: dict[str, np.ndarray | ValueError] = {}

    def read(self, captions: Sequence[str]) -> list[np.ndarray | ValueError]:
        """The tokens (T,) of each caption without BOS and EOS, or the error of one that the language model reads as no words.

        Raises:
            TypeError: for what is no text.
        """
        unread = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        found = dict(zip(unread, self._tokenise(unread), strict=True)) if unread else {}
        for caption, ids in found.items():
            if len(self._known) < self.kept:
                self._known[caption] = ids
        return [found[caption] if caption in found else self._known[caption] for caption in captions]

    def _tokenise(self, captions: list[str]) -> list[np.ndarray | ValueError]:
        for caption in captions:
            if not isinstance(caption, str):
                self.processor(text=[caption])  # raises
        # What spells a special token is text of the user's.
        rows = self.processor.tokenizer(captions, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [self._checked(caption, ids) for caption, ids in zip(captions, rows, strict=True)]

    def _checked(self, caption: str, ids: list[int]) -> np.ndarray | ValueError:
        if not ids or not caption.strip() or not self._special.isdisjoint(ids):  # may be no caption
            try:
                self.processor(text=caption, max_length=1, return_tensors=None)  # whatever its length: captions are cut
            except ValueError as error:
                return error
        return np.asarray(ids, dtype=np.int32)

    def batch(self, captions: Sequence[str], most: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, T) of captions that are cut to `most` tokens, padded on the right.

        Raises:
            TypeError, ValueError: for captions that the processor refuses, and where `most` is beyond what the tokenizer allows.
        """
        rows = []
        for ids in self.read(captions):
            if isinstance(ids, ValueError):
                raise ids
            rows.append(ids[:most])
        tokenizer, width = self.processor.tokenizer, max(map(len, rows))
        if width > tokenizer.model_max_length:
            return dict(self.processor(text=list(captions), max_length=most))  # raises
        ids = np.full((len(rows), width), tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = row
            mask[at, : len(row)] = 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


__all__ = ["CaptionTokens"]
