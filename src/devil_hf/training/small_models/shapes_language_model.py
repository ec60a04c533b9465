"""The language model of the embedded world, from text alone.

The content of its documents (see `documents`) are keywords in groups, one group per object, in shuffled order, sometimes
incomplete, and sometimes a group is packed into a single position, which is nearer to what a prefix vector is. In some documents
a group holds one attribute of all the objects instead: which colours there are, but not of what. They teach that every word has
to be said once, whatever it belongs to; without them, a description names one object twice where a pooled feature does not tell
what belongs together. Documents without keywords define what a caption is when nothing is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from devil_hf.data.shapes import VOCABULARY, Scene, sample_scene
from devil_hf.settings import option
from devil_hf.training.small_models.documents import Document, LanguageModelSettings, build_language_model, caption_loss, collate
from devil_hf.training.small_models.optimisation import minimise, state_of


@dataclass
class ShapesLanguageModelSettings(LanguageModelSettings):
    """How the language model of the embedded world is built and trained."""

    bare_share: float = option("share of documents without keywords", 0.12)
    partial_share: float = option("share of documents from whose keywords some are missing", 0.3)
    packed_share: float = option("share of documents whose groups of keywords take one position each", 0.5)
    unbound_share: float = option("share of documents whose groups are attributes of all objects, not objects", 0.1)
    single_steps: int = option("first steps, on scenes with one object only", 400)
    max_steps: int = option("optimiser steps", 6_000)


def build_shapes_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the shapes world; a word from outside is `<unk>`. It adds no special token by itself."""
    special = ("<pad>", "<bos>", "<eos>", "<unk>", "<sep>")
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate((*special, *VOCABULARY))}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        sep_token="<sep>",
        clean_up_tokenization_spaces=False,
    )


class KeywordDocuments:
    """Documents of the shapes world, made as they are needed.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): From [`build_shapes_tokenizer`].
        settings (`ShapesLanguageModelSettings`): The shares of the kinds of documents.
    """

    group_width = 8  # most words in one position of a packed document

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: ShapesLanguageModelSettings):
        self.settings, self.tokenizer = settings, tokenizer
        self.index = tokenizer.get_vocab()

    def keywords(self, scene: Scene, rng: np.random.Generator) -> list[list[str]]:
        """Groups of keywords of a scene, one per object (or attribute) and sometimes one for the background, shuffled."""
        missing = rng.uniform(0.0, 0.7) if rng.random() < self.settings.partial_share else 0.0
        with_size, with_zone = rng.random(2) < 0.3
        groups = []
        if rng.random() < self.settings.unbound_share:
            for kind in zip(*(item.attributes.values() for item in scene.objects), strict=True):
                groups.append([word for word in kind if rng.random() >= missing])
            return [_shuffled(group, rng) for group in _shuffled(groups, rng) if group]
        for item in scene.objects:
            words = [*item.attributes.values(), *([item.size] if with_size else []), *(item.zone.split() if with_zone else [])]
            groups.append([word for word in words if rng.random() >= missing])
        if rng.random() < 0.3:
            groups.append([scene.background, "background"])
        return [_shuffled(group, rng) for group in _shuffled(groups, rng) if group]

    def document(self, scene: Scene, rng: np.random.Generator) -> Document:
        """One document about `scene`."""
        groups = [] if rng.random() < self.settings.bare_share else self.keywords(scene, rng)
        if rng.random() >= self.settings.packed_share:
            groups = [[word] for group in groups for word in group]
        context = [[self.index[word] for word in group[: self.group_width]] for group in groups]
        # Half of the bare captions lack the separator too: a prefix need not end in anything that resembles it.
        separator = [[self.tokenizer.sep_token_id]] if groups or rng.random() < 0.5 else []
        start = [[self.tokenizer.bos_token_id], *context, *separator]
        caption = [[self.index[word]] for word in scene.caption(rng).split()]
        return [*start, *caption, [self.tokenizer.eos_token_id]], len(start)

    def batch(self, size: int, rng: np.random.Generator, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Make documents about scenes of `count` objects (any number by default).

        Returns:
            `input_ids` (B, T, W), the words of each position, padded on the right with the pad token; `labels` (B, T),
                on captions and EOS only.
        """
        documents = [self.document(sample_scene(rng, count), rng) for _ in range(size)]
        return collate(documents, cast(int, self.tokenizer.pad_token_id))


def build_shapes_language_model(tokenizer: PreTrainedTokenizerFast, settings: ShapesLanguageModelSettings) -> GPT2LMHeadModel:
    """Build the untrained language model, a GPT-2 with tied embeddings and without dropout: documents never repeat."""
    model = build_language_model(tokenizer, settings)
    # Learned embeddings of words put colours into opposite pairs, and then the mean of red and yellow is that of cyan and
    # purple. Fixed orthogonal ones let any set of words be told from its sum.
    embedding: Any = model.get_input_embeddings()
    nn.init.orthogonal_(embedding.weight)
    embedding.weight.requires_grad_(False)
    return model


def train_shapes_language_model(
    settings: ShapesLanguageModelSettings, device: str | torch.device = "cpu", unfinished: Path | None = None
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, list[dict[str, float]]]:
    """Train the language model on text alone.

    Args:
        unfinished: file in which a stopped training goes on; the caller removes it in the end.

    Returns:
        The model in eval mode, its tokenizer, and the history of `minimise`, in nats per token.

    Raises:
        Diverged: when the loss or the weights are no longer finite.
    """
    torch.manual_seed(settings.seed)
    tokenizer = build_shapes_tokenizer()
    documents = KeywordDocuments(tokenizer, settings)
    model = build_shapes_language_model(tokenizer, settings)
    nn.Module.to(model, device)
    rng = np.random.default_rng((settings.seed, 2))

    def loss_of_step(step: int) -> torch.Tensor:
        input_ids, labels = documents.batch(settings.batch_size, rng, count=1 if step <= settings.single_steps else None)
        return caption_loss(model, input_ids.to(device), labels.to(device))

    state = state_of(unfinished, settings, rng) if unfinished else None
    return model, tokenizer, minimise(model, loss_of_step, settings, unfinished=state)


@torch.inference_mode()
def held_out_document_losses(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, documents: int = 512, seed: int = 77
) -> dict[str, float]:
    """Loss in nats per token on fresh documents with keywords, one per position or packed, and without."""
    losses = {}
    for name, bare, packed in (("with_keywords", 0.0, 0.0), ("with_packed_keywords", 0.0, 1.0), ("without_keywords", 1.0, 0.0)):
        settings = ShapesLanguageModelSettings(bare_share=bare, packed_share=packed, partial_share=0.0)
        batch = KeywordDocuments(tokenizer, settings).batch(documents, np.random.default_rng(seed))
        losses[name] = float(caption_loss(model, *batch))
    return losses


def _shuffled(items: Sequence, rng: np.random.Generator) -> list:
    return [items[index] for index in rng.permutation(len(items))]


__all__ = [
    "KeywordDocuments",
    "ShapesLanguageModelSettings",
    "build_shapes_language_model",
    "build_shapes_tokenizer",
    "held_out_document_losses",
    "train_shapes_language_model",
]
