"""What recorded answers about scenes of the shapes world add up to: scores of each question, and what they are compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from devil_hf.data.rendering import SceneObject
from devil_hf.data.shapes import ATTRIBUTE_WORDS, RELATIONS, SHAPES, SIZES, Scene
from devil_hf.evaluation.maps.combining import map_combinations
from devil_hf.evaluation.results import CHANCE
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.text.words import WordCounts, word_list
from devil_hf.statistics import Ratio, bootstrap_draws

CLASSES = {**ATTRIBUTE_WORDS, "size": tuple(SIZES)}
VOCABULARY = [word for words in ATTRIBUTE_WORDS.values() for word in words]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FLAT = {"described": "f1", "chosen": "chosen", "places_chosen": "place", "pointing": "pointing"}  # part -> prefix
BESIDE = ("constant", "shuffled", CHANCE)  # rows that are no layer
Rows = list[dict[str, Any]]


def choices(scene: Scene) -> dict[str, list[str]]:
    """Texts to choose from that differ in one thing, the true one first."""
    first = scene.objects[0]
    options = {"size": [_noun_phrase(first, size) for size in sorted(SIZES, key=lambda size: size != first.size)]}
    if scene.relations:
        subject, relation, other = scene.relations[0]
        one, two = (_noun_phrase(scene.objects[at]) for at in (subject, other))
        options["relation"] = [f"{one} {word} {two}" for word in (relation, OPPOSITE[relation])]
    return options


def _noun_phrase(item: SceneObject, size: str = "") -> str:
    words = f"{size} {item.texture} {item.colour} {item.shape}".strip()
    return f"a {words}"


def summary(rows: Rows, scenes: Sequence[Scene]) -> dict[str, Any]:
    """The scores of recorded answers, for the questions that were asked.

    Returns:
        `described`, `places`: row -> class -> {precision, recall, f1} (None where nothing was said, or nothing is true), with
        `count` and `relation` of `described` as shares;
        `chosen`, `places_chosen`, `pointing`: row -> class -> share; `empty_places`: layer -> share that name an attribute all
        the same; `stated_relations`: row -> how many. Rows are layers, "all", combinations of maps, "constant", "shuffled" and
        "chance". `scores` and `controls` hold them as one table, in the layout of `evaluation/results.py`, and `intervals` the
        95 % intervals, over scenes drawn with replacement, of the F1 of descriptions and of the pointing game.
    """
    truths = [{name: _true_words(scene, name) for name in CLASSES} for scene in scenes]
    parts: dict[str, Any] = {}
    if "said" in rows[0]:
        parts |= _described_scores(rows, scenes, truths)
    if "chosen" in rows[0]:
        parts["chosen"] = _chosen_scores(rows, scenes, truths)
    if "places" in rows[0]:
        parts |= _place_scores(rows, scenes)
    if "pointing" in rows[0]:
        played = [phrase for row in rows for phrase in row["pointing"]]
        parts["pointing"] = pointing_scores([row["pointing"] for row in rows])
        chances = [chance for phrase in played for _, chance in phrase["games"].values()]
        parts["chance_pointing"] = float(np.mean(chances)) if chances else None
        parts["pointing_phrases"] = {name: sum(phrase["attribute"] == name for phrase in played) for name in ATTRIBUTE_WORDS}
    parts["intervals"] = score_intervals(rows, truths)
    names = dict.fromkeys(name for part in FLAT for name in parts.get(part, {}) if name not in BESIDE)
    flat = {name: _flat(parts, name) for name in (*names, CHANCE)}
    scores = {name: row for name, row in flat.items() if row and name != CHANCE}
    return {"scores": scores, "controls": {CHANCE: flat[CHANCE]} if flat[CHANCE] else {}, **parts}


def _flat(parts: Mapping[str, Any], layer: str) -> dict[str, float]:
    """One row of the layout that model cards show."""
    return {
        f"{prefix}_{name}": value["f1"] if isinstance(value, Mapping) else value
        for part, prefix in FLAT.items()
        for name, value in parts.get(part, {}).get(layer, {}).items()
    }


def _described_scores(rows: Rows, scenes: Sequence[Scene], truths) -> dict[str, Any]:
    texts = {layer: [row["said"][layer] for row in rows] for layer in rows[0]["said"]}
    texts["shuffled"] = [*texts["all"][1:], texts["all"][0]]
    described = {layer: word_scores(said, truths) for layer, said in texts.items()}
    described["constant"] = constant_scores(truths)
    counts = [len(scene.objects) for scene in scenes]
    stated = {}
    for layer, said in texts.items():
        described[layer]["count"] = _share(named_objects(t) == n for t, n in zip(said, counts, strict=True))
        held = [h for text, scene in zip(said, scenes, strict=True) for h in relations_hold(text, scene)]
        stated[layer] = len(held)
        if held:
            described[layer]["relation"] = _share(held)
    described["constant"]["count"] = max(counts.count(n) for n in set(counts)) / len(counts)
    return {"described": described, "stated_relations": stated}


def word_scores(texts: Sequence[str], truths: Sequence[Mapping[str, set[str]]]) -> dict[str, Any]:
    """Precision, recall and F1 of the words of each class that the truths have, None where they are not defined."""
    found = {}
    for name in truths[0]:
        counts = WordCounts(CLASSES[name])
        for text, truth in zip(texts, truths, strict=True):
            counts.add(text, truth[name])
        found[name] = {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1}
    return found


def score_intervals(rows: Rows, truths: Sequence[Mapping[str, set[str]]]) -> dict[str, dict[str, list[float]]]:
    """By layer or combination of maps, the 95 % interval of `f1_CLASS` and `pointing_CLASS`; without those that have none.

    Where no scene differs from another, draws of them say nothing of other scenes: an interval without width is left out.
    """
    draws = bootstrap_draws(len(rows))
    ratios: dict[str, dict[str, Ratio]] = {}
    for layer in rows[0].get("said", ()):
        for name in CLASSES:
            counts = [WordCounts(CLASSES[name]) for _ in rows]
            for count, row, truth in zip(counts, rows, truths, strict=True):
                count.add(row["said"][layer], truth[name])
            hits = np.array([2.0 * count.hits for count in counts])
            words = np.array([float(count.said + count.true) for count in counts])
            ratios.setdefault(layer, {})[f"f1_{name}"] = Ratio(hits, words)
    played = [row.get("pointing", []) for row in rows]
    games: Mapping[str, Any] = next((phrase["games"] for phrases in played for phrase in phrases), {})
    for layer in games:
        for name in ATTRIBUTE_WORDS:
            found = [[p["games"][layer][0] for p in phrases if p["attribute"] == name] for phrases in played]
            hits = np.array([float(sum(one)) for one in found])
            ratios.setdefault(layer, {})[f"pointing_{name}"] = Ratio(hits, np.array([float(len(one)) for one in found]))
    found_intervals = {
        layer: {metric: one.interval(draws) for metric, one in metrics.items()} for layer, metrics in ratios.items()
    }
    wide = {
        layer: {metric: list(one) for metric, one in row.items() if one is not None and one[1] - one[0] > 1e-9}
        for layer, row in found_intervals.items()
    }
    return {layer: row for layer, row in wide.items() if row}


def constant_scores(truths: Sequence[Mapping[str, set[str]]]) -> dict[str, Any]:
    """The scores of the constant answer with the best F1: the most frequent words of each class, as many as pay."""
    best: dict[str, Any] = {}
    for name in truths[0]:
        often = sorted(CLASSES[name], key=lambda word: -sum(word in truth[name] for truth in truths))
        answers = [" ".join(often[:n]) for n in range(1, len(often) + 1)]
        scores = [word_scores([text] * len(truths), [{name: truth[name]} for truth in truths])[name] for text in answers]
        best[name] = max(scores, key=lambda score: score["f1"] or 0.0)
    return best


def pointing_scores(played: Sequence[Sequence[Mapping]]) -> dict[str, dict[str, float]]:
    """Share of hits by layer and attribute, and "chance": the mean over all layers' maps."""
    phrases = [phrase for row in played for phrase in row]
    if not phrases:
        return {}
    names = list(phrases[0]["games"])
    scores = {name: _by_attribute([(p["attribute"], p["games"][name][0]) for p in phrases]) for name in names}
    every = [(p["attribute"], chance) for p in phrases for _, chance in p["games"].values()]
    return scores | {"chance": _by_attribute(every)}


def _by_attribute(values: Sequence[tuple[str, float]]) -> dict[str, float]:
    groups = {name: [value for attribute, value in values if attribute == name] for name in ATTRIBUTE_WORDS}
    return {name: float(np.mean(group)) for name, group in groups.items() if group}


def _chosen_scores(rows: Rows, scenes: Sequence[Scene], truths) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    options = [choices(scene) for scene in scenes]
    for layer in rows[0]["chosen"]:
        found = [row["chosen"][layer] for row in rows]
        scores[layer] = {
            name: _share(one[name] in truth[name] for one, truth in zip(found, truths, strict=True)) for name in ATTRIBUTE_WORDS
        }
        for name in ("size", "relation"):
            right = [one[name] == given[name][0] for one, given in zip(found, options, strict=True) if name in given]
            if right:
                scores[layer][name] = _share(right)
    scores["constant"] = {
        name: max(_share(word in truth[name] for truth in truths) for word in words) for name, words in ATTRIBUTE_WORDS.items()
    }
    first = [scene.objects[0].size for scene in scenes]
    scores["constant"]["size"] = max(first.count(size) for size in SIZES) / len(first)
    given = [scene.relations[0][1] for scene in scenes if scene.relations]
    if given:  # the best fixed word of each pair of opposites
        scores["constant"]["relation"] = sum(
            max(given.count(one), given.count(OPPOSITE[one])) for one in ("left of", "above")
        ) / len(given)
    scores["chance"] = {
        name: float(np.mean([len(truth[name]) / len(words) for truth in truths])) for name, words in ATTRIBUTE_WORDS.items()
    } | {"size": 1 / len(SIZES), "relation": 0.5}
    return scores


def _place_scores(rows: Rows, scenes: Sequence[Scene]) -> dict[str, Any]:
    described, chosen, empty = {}, {}, {}
    for layer in rows[0]["places"]:
        answers = [(answer, scene) for row, scene in zip(rows, scenes, strict=True) for answer in row["places"][layer]]
        of_objects = [(one, scene.objects[one["object"]]) for one, scene in answers if one["object"] is not None]
        truths = [{name: {_attribute(item, name)} for name in CLASSES} for _, item in of_objects]
        described[layer] = word_scores([one["text"] for one, _ in of_objects], truths)
        chosen[layer] = {
            name: _share(one["likeliest"][name] == item.attributes[name] for one, item in of_objects) for name in ATTRIBUTE_WORDS
        }
        nothing = [set(word_list(one["text"])) & set(VOCABULARY) for one, _ in answers if one["object"] is None]
        if nothing:
            empty[layer] = _share(bool(words) for words in nothing)
    described["constant"] = constant_scores(truths)
    chosen["constant"] = {
        name: max(_share(word in truth[name] for truth in truths) for word in words) for name, words in ATTRIBUTE_WORDS.items()
    }
    chosen["chance"] = {name: 1 / len(words) for name, words in ATTRIBUTE_WORDS.items()}
    return {"places": described, "places_chosen": chosen, "empty_places": empty}


def _true_words(scene: Scene, name: str) -> set[str]:
    return {_attribute(item, name) for item in scene.objects}


def _attribute(item: SceneObject, name: str) -> str:
    return item.size if name == "size" else item.attributes[name]


def named_objects(text: str) -> int:
    """How many objects a description names: its shape words, at least one if it says anything."""
    words = word_list(text)
    return max(sum(word in SHAPES for word in words), min(len(words), 1))


def relations_hold(text: str, scene: Scene) -> list[bool]:
    """Whether each relation that a description states holds between two objects that fit the words around it."""
    held = []
    for relation in RELATIONS:
        before, found, after = text.lower().partition(f" {relation} ")
        if not found:
            continue
        left, right = (set(word_list(part)) & set(VOCABULARY) for part in (before, after.partition(" and ")[0]))
        held.append(
            any(
                name == relation
                and left <= set(scene.objects[subject].attributes.values())
                and right <= set(scene.objects[other].attributes.values())
                for subject, name, other in scene.relations
            )
        )
    return held


def _share(values) -> float:
    values = list(values)
    return sum(values) / len(values)


# -------------------------------------------------------------------------------------------------------------- table


def knowledge_table(parts: Mapping[str, Any]) -> str:
    """All scores as text, a row per layer, a table per question that was asked."""
    lines: list[str] = []
    for title, part, classes in (
        ("said of the whole image: precision / recall", "described", (*CLASSES, "count", "relation")),
        ("chosen by evidence, whole image: share right", "chosen", (*CLASSES, "relation")),
        ("said of one place of an object: precision / recall", "places", tuple(CLASSES)),
        ("chosen by evidence at this place: share right", "places_chosen", tuple(ATTRIBUTE_WORDS)),
        ("pointing game, words that one object of several has [95 % intervals over scenes]", "pointing", tuple(ATTRIBUTE_WORDS)),
    ):
        if parts.get(part):
            ranges = _intervals(parts, "pointing_") if part == "pointing" else None
            lines += [title, table(parts[part], classes, _cell, ranges), ""]
        if part == "described" and parts.get(part):
            f1 = {row: {name: said[name]["f1"] for name in ATTRIBUTE_WORDS if name in said} for row, said in parts[part].items()}
            lines += [
                "the same: F1 [95 % intervals over scenes]",
                table(f1, tuple(ATTRIBUTE_WORDS), _cell, _intervals(parts, "f1_")),
                "",
            ]
    if "stated_relations" in parts:
        stated = ", ".join(f"{row} {count}" for row, count in parts["stated_relations"].items())
        lines += [
            "count: share of descriptions that name as many objects as there are; relation: share of stated relations that hold",
            f"relations stated: {stated}",
        ]
    if "empty_places" in parts:
        empty = ", ".join(f"{row} {share:.2f}" for row, share in parts["empty_places"].items())
        lines.append(f"places without any object that name an attribute all the same: {empty}")
    return "\n".join(lines).rstrip()


def knowledge_panels(result: Mapping[str, Any]) -> tuple[dict, dict]:
    """What `report.figures.knowledge_figure` draws: its panels, and the chance of each."""
    layers = [name for name in result["chosen"] if name not in ("all", "constant", "chance")]
    together = "all layers"
    chosen = {layer: dict(result["chosen"][layer]) for layer in (*layers, "all")}
    for layer, row in chosen.items():
        row["count"] = result["described"][layer]["count"]
    chosen[together] = chosen.pop("all")
    chance = {**result["chosen"]["chance"], "count": result["described"]["constant"]["count"]}
    pointing = {layer: result["pointing"][layer] for layer in layers if layer in result["pointing"]}
    if pointing:
        pointing[together] = result["pointing"][map_combinations()[0]]
    panels = {
        "whole image: which answer has the most evidence? (count: as described)": chosen,
        "one place on an object: which word has the most evidence?": {layer: result["places_chosen"][layer] for layer in layers},
        "where is it? the maximum of the word's map (all: of the combined map)": pointing,
    }
    bases = zip(panels, (chance, result["places_chosen"]["chance"], result["pointing"].get("chance", {})), strict=True)
    return {heading: table for heading, table in panels.items() if table}, dict(bases)


def _intervals(parts: Mapping[str, Any], prefix: str) -> dict[str, dict[str, list[float]]]:
    """The intervals of one part, by row and class."""
    found = parts.get("intervals", {}).items()
    return {row: {m.removeprefix(prefix): one for m, one in values.items() if m.startswith(prefix)} for row, values in found}


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return " / ".join("-" if value[name] is None else f"{value[name]:.3f}" for name in ("precision", "recall"))
    return f"{value:.3f}"
