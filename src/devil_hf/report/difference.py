"""The page of a difference: words gained and lost by layer, and the images that changed most. It opens from disk."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from devil_hf.folders import written
from devil_hf.questions.difference import GAINED, LOST, Difference, Example, WordChange
from devil_hf.report.colours import tint
from devil_hf.report.drawing import scaled
from devil_hf.report.html import data_uri, tinted
from devil_hf.report.templates import render

TEMPLATE = "report/templates/difference.html"
PICTURE = 260  # pixels of the longer side


def write_difference(
    found: Difference,
    output: str | PathLike,
    a: str,
    b: str,
    source: str,
    pictures: Mapping[str, Image.Image],
) -> Path:
    """Write the page.

    Args:
        found: what `compare_networks` returned.
        output: file to write.
        a, b: names of the two networks, or where they lie; the page shows as much of the end as tells them apart.
        source: name of the images.
        pictures: those of the examples, by key.
    """
    name_a, name_b = distinct_names(a, b)
    by_word: dict[str, dict[str, WordChange]] = {}
    for one in found.words:
        by_word.setdefault(one.word, {})[one.layer] = one
    most = max((max(one.told_a, one.told_b) for one in found.words), default=1.0)
    rows = [_row(word, by_layer, found, most) for word, by_layer in by_word.items()]
    page = render(
        TEMPLATE,
        a=name_a,
        b=name_b,
        source=source,
        images=found.images,
        layers=found.layers,
        level=found.level,
        least=found.least,
        tests=len(found.words),
        left_out=found.left_out,
        lost=_named(found, LOST),
        gained=_named(found, GAINED),
        changed=[row for row in rows if row["changed"]],
        same=[row for row in rows if not row["changed"]],
        examples=[_example(one, pictures.get(one.image)) for one in found.examples],
    )
    with written(output) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return Path(output)


def distinct_names(a: str, b: str) -> tuple[str, str]:
    """The shortest ends of two paths that are not the same: of runs/1/checkpoint and runs/2/checkpoint, all but `runs/`."""
    parts = [Path(name).parts or (name,) for name in (a, b)]
    for length in range(1, max(map(len, parts)) + 1):
        one, other = ("/".join(own[-length:]) for own in parts)
        if one != other:
            return one, other
    return parts[0][-1], parts[1][-1]


def _named(found: Difference, verdict: str) -> list[dict[str, Any]]:
    """Words with a verdict, those of most layers first, with the layers."""
    layers: dict[str, list[str]] = {}
    for layer, words in found.found(verdict).items():
        for word in words:
            layers.setdefault(word, []).append(layer)
    ranked = sorted(layers.items(), key=lambda item: (-len(item[1]), item[0]))
    return [{"word": word, "layers": where, "everywhere": len(where) == len(found.layers)} for word, where in ranked]


def _row(word: str, by_layer: dict[str, WordChange], found: Difference, most: float) -> dict[str, Any]:
    cells = []
    for layer in found.layers:
        one = by_layer.get(layer)
        cells.append(
            None
            if one is None
            else {
                "a": one.told_a,
                "b": one.told_b,
                "share_a": 100 * one.told_a / most,
                "share_b": 100 * one.told_b / most,
                "q": one.q,
                "verdict": one.verdict,
                "tint": tint(one.told_b - one.told_a) if one.verdict else None,
            }
        )
    return {"word": word, "cells": cells, "changed": any(one.verdict for one in by_layer.values())}


def _example(one: Example, image: Image.Image | None) -> dict[str, Any]:
    return {
        "image": one.image,
        "source": None if image is None else data_uri(scaled(image.convert("RGB"), PICTURE)),
        "change": one.change,
        "a": tinted(one.words_a),
        "b": tinted(one.words_b),
        "more_a": one.more_a,
        "more_b": one.more_b,
    }


__all__ = ["distinct_names", "write_difference"]
