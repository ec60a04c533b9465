"""What the public calls of a DeViL model return, and descriptions as words.

Outputs print as the shapes that they hold. Evidence of a word is the sum over its tokens:
log p(word | feature) - log p(word | null prefix), in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


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
    return f"{len(value)} entries" if isinstance(value, list) and len(str(value)) > 100 else repr(value)


@dataclass(repr=False)
class DevilOutput(ShapesRepr, ModelOutput):
    """Result of the forward pass.

    Args:
        loss: mean cross-entropy of the caption tokens and the EOS, in nats.
        logits: (B, T + 1, V), for the caption's T tokens and the EOS, at these positions only; None in training mode.
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
    """

    sequences: Tensor = None  # type: ignore[assignment]
    image_index: Tensor = None  # type: ignore[assignment]
    layer_index: Tensor = None  # type: ignore[assignment]
    locations: Tensor = None  # type: ignore[assignment]
    token_evidence: Tensor | None = None
    layer_names: list[str] = None  # type: ignore[assignment]

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


def describe_rows(output: DescribeOutput, tokenizer: Any, images: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Descriptions as rows: what was asked, the words of the answer, and what each word owes to the features.

    Args:
        output: what `model.describe` or `model.describe_directions` returned.
        tokenizer: of the language model.
        images: names of the images, to stand in the rows instead of their indices.

    Returns:
        One dict per description: `"image"` (its index, or the name given for it), `"layer"` (`"all"` where all layers were
        shown together), `"location"` ((row, column), or None for the whole image) and `"description"`; where evidence was asked
        for also `"evidence"`, the mean over the tokens in nats, and `"words"`, the (word, nats) pairs.
    """
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    special = set(tokenizer.all_special_ids)
    rows = []
    for number, text in enumerate(texts):
        image, place = int(output.image_index[number]), output.locations[number].tolist()
        row = {
            "image": image if images is None else images[image],
            "layer": output.layer_of(number),
            "location": None if place[0] < 0 else (place[0], place[1]),
            "description": text.strip(),
        }
        if output.token_evidence is not None:
            pairs = zip(output.sequences[number].tolist(), output.token_evidence[number].tolist(), strict=True)
            tokens = [(token, nats) for token, nats in pairs if token not in special]
            row["evidence"] = sum(nats for _, nats in tokens) / max(len(tokens), 1)
            row["words"] = word_evidence(tokenizer, tokens)
        rows.append(row)
    return rows


def word_evidence(tokenizer: Any, tokens: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
    """(token, nats) pairs of one text, joined to (word, nats) pairs; a token of several words counts for each of them alike."""
    words, shares = list[str](), [0.0]
    for end, (_, nats) in enumerate(tokens, 1):
        # Decoded from the start each time: only the whole text shows where a tokenizer puts its spaces.
        pieces = tokenizer.decode([token for token, _ in tokens[:end]], skip_special_tokens=True).split()
        number = max(len(pieces), 1)
        shares = [*shares[: number - 1], sum(shares[number - 1 :]), *[0.0] * (number - len(shares))]
        # The words that the token changed or began, else the last one.
        first = next((at for at in range(number - 1) if words[at : at + 1] != pieces[at : at + 1]), number - 1)
        for at in range(first, number):
            shares[at] += nats / (number - first)
        words = pieces
    return list(zip(words, shares, strict=False))
