"""What the rows of `devil report page` add up to, and the page that shows them.

Over all images: how many nats a sentence owes to all layers together, to each alone, and how many are lost without it; the same
sentence with the features of other images (control) and with none (0 by definition); and every word by what it owes to the
features, layer by layer. Words are counted without case and punctuation; one that is said of a single image is not ranked.
"""

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from devil_hf.evaluation.results import Evaluation
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.report.colours import DIVERGING, tint
from devil_hf.report.html import TEMPLATES, tinted
from devil_hf.report.templates import render
from devil_hf.statistics import Ratio, bootstrap_draws, interval, sign_flip

ALL = "all"
RANKED, SHORT = 20, 8  # words to a list of the page, and of the terminal
EMERGING, CARRIED, EXAMPLES = 24, 10, 2  # rows of the table of depths, words and sentences of a layer
LEAST_IMAGES = 2  # of a word that is ranked
CHANCE_LEVEL = 0.05


def add_up(rows: Sequence[Mapping[str, Any]], layers: Sequence[str], seed: int = 0) -> Evaluation:
    """Means over images with 95 % intervals, the control, and the words, most evidence first.

    Args:
        rows: as `Page.rows` makes them, one per image that could be read.
        layers: those that were asked, in the order of their figures in the rows.
        seed: of the bootstrap over images.
    """
    draws = bootstrap_draws(len(rows), seed=seed)
    scores: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, Any]] = {}

    def mean(row: str, metric: str, values: np.ndarray) -> None:
        ratio = Ratio.mean(values)
        scores.setdefault(row, {})[metric] = ratio.value
        intervals.setdefault(row, {})[metric] = ratio.interval(draws)

    own = _of_sentences(rows, lambda word: word["evidence"])
    mean(ALL, "evidence", own)
    for at, layer in enumerate(layers):
        mean(layer, "alone", _of_sentences(rows, lambda word, at=at: word["alone"][at]))
        mean(layer, "lost", _of_sentences(rows, lambda word, at=at: word["lost"][at]))
    controls = {"null": {"evidence": 0.0}}
    details: dict[str, Any] = {"intervals": intervals, "words": word_table(rows, draws)}
    judged = np.array([row.get("elsewhere", np.nan) for row in rows], dtype=float)
    if known := int((~np.isnan(judged)).sum()):
        controls = {"shuffled": {"evidence": Ratio.mean(judged).value}} | controls
        differences = (own - judged)[~np.isnan(own - judged)]
        details["p_value"] = sign_flip(differences, seed=seed) if known > 1 else None
        sharp = [row["p"] for row in rows if "p" in row and 1 / (1 + row["permutations"]) <= CHANCE_LEVEL]
        used = [row["permutations"] for row in rows if "permutations" in row]
        details["permutations"] = sorted({min(used), max(used)}) if used else None
        details["told_apart"] = float(np.mean([p <= CHANCE_LEVEL for p in sharp])) if sharp else None
    return Evaluation("Sentences and where their words come from", scores, controls, details=details)


def _of_sentences(rows: Sequence[Mapping[str, Any]], value: Any) -> np.ndarray:
    """The sum of a figure over the words of each sentence (N,); NaN where nothing was said."""
    return np.array([sum(map(value, row["words"])) if row["words"] else np.nan for row in rows], dtype=float)


def plain(word: str) -> str:
    """A word as it is counted."""
    return word.lower().strip(string.punctuation) or word


def word_table(rows: Sequence[Mapping[str, Any]], draws: np.ndarray) -> list[dict[str, Any]]:
    """Every word of the sentences: in how many images, mean evidence with its interval, by layer alone and lost; most first."""
    by_word: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for image, row in enumerate(rows):
        for word in row["words"]:
            by_word.setdefault(plain(word["text"]), []).append((image, word))
    found = []
    for text, said in by_word.items():
        images = [image for image, _ in said]
        times = np.bincount(images, minlength=len(rows)).astype(float)
        ratio = Ratio(np.bincount(images, [word["evidence"] for _, word in said], len(rows)), times)
        row = {"word": text, "images": int(np.count_nonzero(times)), "said": len(said), "evidence": ratio.value}
        row["interval"] = interval(ratio.over(draws)) if row["images"] >= LEAST_IMAGES else None
        row |= {name: np.mean([word[name] for _, word in said], axis=0).tolist() for name in ("alone", "lost")}
        found.append(row)
    return sorted(found, key=lambda row: (-row["evidence"], row["word"]))


def ranked(words: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The words that are said of several images; all where none is."""
    return [word for word in words if word["images"] >= LEAST_IMAGES] or list(words)


def both_ends(words: Sequence[Any], wanted: int) -> tuple[list[Any], list[Any]]:
    """The first and, from the end on, the last of ranked words, no word in both."""
    middle = (len(words) + 1) // 2
    return list(words[:middle][:wanted]), list(words[middle:][::-1][:wanted])


def page_text(evaluation: Evaluation, table: str) -> str:
    """For the terminal: the table, the words of most and of least evidence, and the control in a sentence."""
    words = ranked(evaluation.details["words"])
    most, least = (", ".join(f"{one['word']} {one['evidence']:+.1f}" for one in part) for part in both_ends(words, SHORT))
    lines = [
        f"{evaluation.dataset['name']}, {evaluation.dataset['size']} images; nats per sentence over the null prefix",
        "",
        table,
    ]
    lines += ["", f"most evidence: {most}", f"least evidence: {least}"]
    if evaluation.details.get("p_value") is not None:
        lines.append(f"own features against those of other images: p = {evaluation.details['p_value']:.4f}")
    if evaluation.details.get("told_apart") is not None:
        lines.append(
            f"images whose sentence depends on its own image, p <= {CHANCE_LEVEL}: {evaluation.details['told_apart']:.0%}"
        )
    return "\n".join(lines)


def page_html(model: DevilModel, evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> str:
    """The page, whole."""
    words = ranked(evaluation.details["words"])
    most, least = ([{**one, "tint": tint(one["evidence"])} for one in part] for part in both_ends(words, RANKED))
    return render(
        f"{TEMPLATES}/page.html",
        title=(model.config.name_or_path or "").rstrip("/").rpartition("/")[2] or "a checkpoint",
        scope=model.config.scope or "",
        evaluation=evaluation,
        all_scores=evaluation.scores[ALL]["evidence"],
        layers=[_layer(rows, words, evaluation, at, layer) for at, layer in enumerate(layers)],
        names=list(layers),
        widest=max((abs(value) for row in evaluation.scores.values() for value in row.values()), default=1.0) or 1.0,
        most=most,
        least=least,
        emerging=[_emergence(one) for one in _emerging(words)],
        level=CHANCE_LEVEL,
        data={"rows": rows, "layers": list(layers), "anchors": DIVERGING},
    )


def _layer(rows, words: Sequence[Mapping[str, Any]], evaluation: Evaluation, at: int, layer: str) -> dict[str, Any]:
    """What a layer knows: its nats, the words that it carries, and what it says most often by itself."""
    carried = sorted(words, key=lambda word: -word["alone"][at])[:CARRIED]
    own = Counter(" ".join(word for word, _ in one["words"]) for row in rows for one in row["layers"] if one["layer"] == layer)
    said = [text for text, _ in own.most_common(EXAMPLES) if text]
    examples = [
        next(one for row in rows for one in row["layers"] if " ".join(w for w, _ in one["words"]) == text) for text in said
    ]
    return {
        "name": layer,
        **evaluation.scores[layer],
        "intervals": evaluation.details["intervals"][layer],
        "carried": tinted([(word["word"], word["alone"][at]) for word in carried if word["alone"][at] > 0]),
        "says": [{"words": tinted(one["words"]), "times": own[text]} for one, text in zip(examples, said, strict=True)],
        "kinds": len(own),
    }


def _emerging(words: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The words of most evidence in all their sentences together, those that are readable at the shallowest layer first."""
    chosen = sorted(words, key=lambda word: -word["evidence"] * word["said"])[:EMERGING]
    return sorted(
        (word for word in chosen if word["interval"] and word["interval"][0] > 0),
        key=lambda word: (_half(word), -word["evidence"]),
    )


def _half(word: Mapping[str, Any]) -> int:
    """The shallowest layer that alone carries half of a word's evidence; the number of layers where none does."""
    deep = [at for at, nats in enumerate(word["alone"]) if nats >= word["evidence"] / 2]
    return deep[0] if deep else len(word["alone"])


def _emergence(word: Mapping[str, Any]) -> dict[str, Any]:
    cells = [{"nats": nats, "tint": tint(nats)} for nats in word["alone"]]
    return {**word, "tint": tint(word["evidence"]), "half": _half(word), "cells": cells}


__all__ = ["add_up", "page_html", "page_text", "plain", "ranked", "word_table"]
