"""Descriptions as rows: what was asked, the words of the answer, and what each word owes to the features.

The one place that turns generated tokens and their evidence into words, for the command line, the pipeline, notebooks and
the demo. Evidence of a word is the sum over its tokens: log p(word | feature) - log p(word | null prefix), in nats.
"""

import importlib
from collections.abc import Sequence
from html import escape
from typing import Any

from transformers.utils import requires_backends

from .outputs_devil import DescribeOutput

WARM, COOL = (240, 130, 40), (63, 142, 206)  # of the maps' own colour scale
FULL_TINT = 2.0  # nats at which a word has its full colour


class Descriptions(list):
    """A list of dicts, one per description, that shows itself as a table in a notebook.

    Each has `"image"` (its index, or the name given for it), `"layer"` (`"all"` where all layers were shown together),
    `"location"` ((row, column), or None for the whole image) and `"description"`; where evidence was asked for also
    `"evidence"`, the mean over the tokens in nats, and `"words"`, the (word, nats) pairs.
    """

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one row per description."""
        requires_backends(self, "pandas")
        return importlib.import_module("pandas").DataFrame(list(self))

    def __repr__(self) -> str:
        return "\n".join(f"{_where(row)}: {row['description']}" for row in self) or "no descriptions"

    def _repr_html_(self) -> str:
        cells = [
            f'<tr><th style="text-align:left">{escape(_where(row))}</th><td style="text-align:left">{_sentence(row)}</td></tr>'
            for row in self
        ]
        return f"<table>{''.join(cells)}</table>"


def describe_rows(output: DescribeOutput, tokenizer: Any, images: Sequence[str] | None = None) -> Descriptions:
    """The rows of `output`; see `DevilProcessor.post_process_descriptions`."""
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    special = set(tokenizer.all_special_ids)
    rows = Descriptions()
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
    """(token, nats) pairs of one text, joined to (word, nats) pairs."""
    words: list[tuple[str, float]] = []
    before = ""
    for end in range(1, len(tokens) + 1):
        # Decoded from the start each time: only the whole text shows where a tokenizer puts its spaces.
        text = tokenizer.decode([token for token, _ in tokens[:end]], skip_special_tokens=True)
        nats = tokens[end - 1][1]
        pieces = text.split()
        if len(pieces) > len(before.split()):
            words.append((pieces[-1], nats))
        elif words:
            words[-1] = (pieces[-1], words[-1][1] + nats)
        before = text
    return words


def tint(nats: float) -> str:
    """CSS colour behind a word: warm for evidence of the features, cool for words that they speak against."""
    red, green, blue = WARM if nats > 0 else COOL
    return f"rgba({red}, {green}, {blue}, {0.65 * min(abs(nats) / FULL_TINT, 1.0):.2f})"


def _where(row: dict) -> str:
    place = "" if row["location"] is None else f" {row['location']}"
    image = f"{row['image']}  " if "image" in row else ""
    return f"{image}{row['layer']}{place}"


def _sentence(row: dict) -> str:
    if "words" not in row:
        return escape(row["description"])
    return " ".join(
        f'<span title="{nats:+.2f} nats" style="background:{tint(nats)};border-radius:3px;padding:0 2px">{escape(word)}</span>'
        for word, nats in row["words"]
    )


__all__ = ["Descriptions", "describe_rows", "tint", "word_evidence"]
