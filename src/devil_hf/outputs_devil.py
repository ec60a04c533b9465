"""What the public calls of a DeViL model return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class DevilOutput(ModelOutput):
    """Result of the forward pass.

    Args:
        loss: mean cross-entropy of the caption tokens and the EOS, in nats.
        logits: (B, T + 1, V), for the caption's T tokens and the EOS, at these positions only.
        prefix: (B, k, D_lm), what the language model read in place of the image.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    prefix: Tensor | None = None


@dataclass
class DescribeOutput(ModelOutput):
    """Descriptions, one row per question; rows by layer, then by image, then by location.

    Args:
        sequences: (N, T) generated tokens.
        image_index: (N,) which image the row describes.
        layer_index: (N,) position in `layer_names`; -1 for all layers together.
        locations: (N, 2) row and column; (-1, -1) for the whole image.
        token_evidence: (N, T) log p(token | feature) - log p(token | null prefix) in nats, 0 on padding; None if not asked for.
        layer_names: the model's layers, shallowest first.
        strengths: (N,) the factor that each direction was taken with; None where no direction was described.
    """

    sequences: Tensor = None  # type: ignore[assignment]
    image_index: Tensor = None  # type: ignore[assignment]
    layer_index: Tensor = None  # type: ignore[assignment]
    locations: Tensor = None  # type: ignore[assignment]
    token_evidence: Tensor | None = None
    layer_names: list[str] = None  # type: ignore[assignment]
    strengths: Tensor | None = None

    def layer_of(self, row: int) -> str:
        """Name of the layer that `row` describes, "all" for all layers together."""
        index = int(self.layer_index[row])
        return "all" if index < 0 else self.layer_names[index]


@dataclass
class ScoreOutput(ModelOutput):
    """How likely each of K phrases is at each of N questions, in nats.

    Args:
        log_probs: (N, K) sum over the scored tokens.
        null_log_probs: (K,) the same under the null prefix.
        evidence: (N, K) (log_probs - null_log_probs) per scored token.
        token_log_probs: (N, K, T) of every scored token, 0 elsewhere.
    """

    log_probs: Tensor = None  # type: ignore[assignment]
    null_log_probs: Tensor = None  # type: ignore[assignment]
    evidence: Tensor = None  # type: ignore[assignment]
    token_log_probs: Tensor = None  # type: ignore[assignment]


@dataclass
class AttributionOutput(ModelOutput):
    """Attribution maps.

    Args:
        maps: layer name (or "joint", "mean") -> (B, K, H_l, W_l), in nats: over the null prefix and per token for the measure
            "evidence", per token for "per_token", summed over the phrase for "sum".
        measure: which of the three.
    """

    maps: dict[str, Tensor] = None  # type: ignore[assignment]
    measure: str = None  # type: ignore[assignment]


__all__ = ["AttributionOutput", "DescribeOutput", "DevilOutput", "ScoreOutput"]
