"""What the public calls of a DeViL model return.

They print as the shapes that they hold; those that are naturally a table turn into one.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput, requires_backends


class ShapesRepr:
    """Prints a `ModelOutput` by shapes: nobody reads ten thousand numbers in a notebook."""

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={_short(value)}" for name, value in self.items())  # type: ignore[attr-defined]
        return f"{type(self).__name__}({fields})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_short(entry)}" for name, entry in value.items()) + "}"
    return repr(value)


@dataclass(repr=False)
class DevilOutput(ShapesRepr, ModelOutput):
    """Result of the forward pass.

    Args:
        loss: mean cross-entropy of the caption tokens and the EOS, in nats.
        logits: (B, T + 1, V), for the caption's T tokens and the EOS, at these positions only.
        prefix: (B, k, D_lm), what the language model read in place of the image.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    prefix: Tensor | None = None


@dataclass(repr=False)
class DescribeOutput(ShapesRepr, ModelOutput):
    """Descriptions, one row per question; rows by layer, then by image, then by location.

    `processor.post_process_descriptions` turns them into words.

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


@dataclass(repr=False)
class ScoreOutput(ShapesRepr, ModelOutput):
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

    def to_pandas(self, phrases: Sequence[str]) -> Any:
        """A `pandas.DataFrame` with one row per question and phrase: question, phrase, log_prob, evidence."""
        _check_phrases(phrases, self.log_probs.shape[1])
        rows = [
            (question, phrase, float(self.log_probs[question, k]), float(self.evidence[question, k]))
            for question in range(len(self.log_probs))
            for k, phrase in enumerate(phrases)
        ]
        return _table(self, rows, ["question", "phrase", "log_prob", "evidence"])


@dataclass(repr=False)
class AttributionOutput(ShapesRepr, ModelOutput):
    """Attribution maps.

    Args:
        maps: layer (or combination) -> (B, K, H_l, W_l), in nats: over the null prefix and per token for the measure
            "evidence", per token for "per_token", summed over the phrase for "sum".
        measure: which of the three.
    """

    maps: dict[str, Tensor] = None  # type: ignore[assignment]
    measure: str = None  # type: ignore[assignment]

    def to_pandas(self, phrases: Sequence[str]) -> Any:
        """A `pandas.DataFrame` with one row per place: layer, image, phrase, row, column and the value in nats."""
        rows = []
        for layer, values in self.maps.items():
            _check_phrases(phrases, values.shape[1])
            for (image, k, row, column), value in zip(_indices(values.shape), values.flatten().tolist(), strict=True):
                rows.append((layer, image, phrases[k], row, column, value))
        return _table(self, rows, ["layer", "image", "phrase", "row", "column", self.measure])


def _indices(shape: Sequence[int]) -> product:
    return product(*(range(edge) for edge in shape))


def _check_phrases(phrases: Sequence[str], expected: int) -> None:
    if len(phrases) != expected:
        raise ValueError(
            f"{len(phrases)} phrases were given, but {expected} were asked for: name them in the same order"
        )


def _table(output: Any, rows: list[tuple], columns: list[str]) -> Any:
    requires_backends(output, "pandas")
    return importlib.import_module("pandas").DataFrame(rows, columns=columns)


__all__ = ["AttributionOutput", "DescribeOutput", "DevilOutput", "ScoreOutput"]
