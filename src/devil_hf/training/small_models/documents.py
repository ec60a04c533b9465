"""Documents that teach a language model to listen to what stands before a caption, and the loss on them.

A model of bare captions learns to ignore a prefix, and a translator in front of it stays on the plateau of the unconditional
loss. So a document is `<bos> content <sep> caption <eos>`, with the loss on the caption only; several words of the content may
share a position, as the mean of their embeddings: a prefix vector, too, stands for more than one word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from devil_hf.settings import option
from devil_hf.training.small_models.optimisation import OptimisationSettings

IGNORED_INDEX = -100
# The tokens of each position of a document (the mean of their embeddings is read), and where its caption begins.
Document = tuple[list[list[int]], int]


@dataclass
class LanguageModelSettings(OptimisationSettings):
    """How a small language model is built and trained."""

    width: int = option("width of the embeddings and layers", 128)
    layers: int = option("number of transformer layers", 4)
    heads: int = option("number of attention heads", 4)
    context_length: int = option("longest document, and so prefix plus caption, in tokens", 96)
    dropout: float = option("dropout in training; useless as long as documents hardly repeat", 0.0)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; choose a multiple")


def build_language_model(tokenizer: PreTrainedTokenizerFast, settings: LanguageModelSettings) -> GPT2LMHeadModel:
    """An untrained GPT-2 with tied embeddings."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.context_length,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, by one kernel instead of eight
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def collate(documents: Sequence[Document], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad documents on the right.

    Returns:
        `input_ids` (B, T, W), the tokens of each position, and `labels` (B, T), on captions and EOS only.
    """
    length = max(len(positions) for positions, _ in documents)
    width = max(len(tokens) for positions, _ in documents for tokens in positions)
    input_ids = np.full((len(documents), length, width), pad_token_id, dtype=np.int64)
    labels = np.full((len(documents), length), IGNORED_INDEX, dtype=np.int64)
    for row, (positions, start) in enumerate(documents):
        for place, tokens in enumerate(positions):
            input_ids[row, place, : len(tokens)] = tokens
        labels[row, start : len(positions)] = input_ids[row, start : len(positions), 0]
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def caption_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats per labelled token, with logits at labelled positions only.

    `input_ids` is (B, T, W): a position's embedding is the mean over its tokens, padding aside; `labels` is (B, T).
    """
    real = input_ids.ne(cast(int, model.config.pad_token_id)).unsqueeze(-1)  # (B, T, W, 1)
    embeddings = model.get_input_embeddings()(input_ids)
    embeddings = (embeddings * real).sum(2) / real.sum(2).clamp(min=1)  # (B, T, D)
    # Padding is on the right, where causal attention never looks: no mask, and so the fast causal kernels.
    hidden = model.base_model(inputs_embeds=embeddings).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != IGNORED_INDEX
    logits = model.get_output_embeddings()(hidden[wanted])  # (tokens, vocabulary)
    return F.cross_entropy(logits.float(), targets[wanted], reduction=reduction)


__all__ = ["IGNORED_INDEX", "Document", "LanguageModelSettings", "build_language_model", "caption_loss", "collate"]
