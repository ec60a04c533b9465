"""Guidance at decoding: push words towards what the feature adds over the null prefix.

Beyond the paper. The next-token distribution becomes log p(w | null) + g (log p(w | feature) - log p(w | null)), normalised;
g = 1 is ordinary decoding, as in the paper.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers import PreTrainedModel

from .scoring_devil import run_language_model


class EvidenceGuidance(LogitsProcessor):
    """Logits processor for `generate` on prefix embeddings.

    Args:
        language_model: the model that generates.
        null_embeds: (1, P, D_lm) BOS and null prefix.
        strength: g above; more than 1 favours what the feature adds, 0 is the null prefix alone.
    """

    def __init__(self, language_model: PreTrainedModel, null_embeds: Tensor, strength: float):
        self.language_model = language_model
        self.null_embeds = null_embeds
        self.strength = strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Beam search reorders rows between steps, so the null continuation is read afresh instead of from a cache.
        words = self.language_model.get_input_embeddings()(input_ids).to(self.null_embeds.dtype)
        embeds = torch.cat([self.null_embeds.expand(input_ids.shape[0], -1, -1), words], dim=1)
        null = run_language_model(self.language_model, embeds, keep=1).logits[:, -1].float().log_softmax(dim=-1)
        guided = null + self.strength * (scores.float().log_softmax(dim=-1) - null)
        return guided.log_softmax(dim=-1).to(scores.dtype)


__all__ = ["EvidenceGuidance"]
