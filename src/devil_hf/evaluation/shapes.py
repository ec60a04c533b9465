"""What each layer knows of the shapes world, where every word and every map has an exact answer.

Four questions are asked of held-out scenes:

* `described`: what the greedy description of the whole image says. Precision and recall of colour, texture, shape and size words;
  `count`, the share of descriptions that name as many objects as there are; `relation`, the share of stated relations that hold
  between two objects that fit the words around them (`stated_relations` counts them; most descriptions state none).
* `chosen`: which answer has the most evidence, of those to choose from. Colour, texture, shape: the words of the class after
  "the", right if any object has it. Size: three noun phrases of the first object that differ in this word. Relation: two objects
  as they stand and with the opposite relation.
* `places`: the same at one place of the layer, the cell that holds most of an object: precision and recall of the words of its
  description against this object alone, and the choice by evidence; and of a place without any object, how often an attribute is
  named all the same.
* `pointing`: is the maximum of a word's map on the one object of several that has it (half a cell of tolerance).

Beside them a constant answer, the best that knows the frequencies and no image; descriptions dealt to other scenes; and chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from devil_hf.data.rendering import SceneObject
from devil_hf.data.shapes import ATTRIBUTE_WORDS, RELATIONS, SHAPES, SIZES, Scene
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.maps.pointing import chance_pointing, pointing
from devil_hf.evaluation.results import CHANCE, Evaluation
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.text.words import CARRIER, WordCounts, word_list
from devil_hf.model.explaining_devil import combine_maps, map_combinations
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.settings import option

QUESTIONS = ("described", "chosen", "places", "pointing")
CLASSES = {**ATTRIBUTE_WORDS, "size": tuple(SIZES)}
VOCABULARY = [word for words in ATTRIBUTE_WORDS.values() for word in words]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MAX_NEW_TOKENS = 40
FLAT = {"described": "f1", "chosen": "chosen", "places_chosen": "place", "pointing": "pointing"}  # part -> prefix
BESIDE = ("constant", "shuffled", CHANCE)  # rows that are no layer
Texts = dict[str, str]
Rows = list[dict[str, Any]]


@dataclass(kw_only=True)
class ShapesSettings(EvaluationSettings):
    """What `devil evaluate shapes` asks."""

    limit: int | None = option("scenes, from the first on", 300)
    seed: int = option("of the world; 1 is held out in everything that this package trains", HELD_OUT_WORLD)
    batch_size: int = option("scenes at once, per process", 25)
    questions: list[Literal["described", "chosen", "places", "pointing"]] = option("which questions", list(QUESTIONS))
    pointing_limit: int | None = option(
        "only this many of the scenes for the pointing game, which asks every place", None
    )
    output_dir: Path = option("scores, answers and the figure; a stopped run goes on from there", Path("devil-shapes"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if self.limit is None or self.limit < 2:
            raise ValueError(f"--limit {self.limit}: at least 2 scenes are needed, to deal descriptions to others")
        if unknown := sorted(set(self.questions) - set(QUESTIONS)) or not self.questions:
            raise ValueError(f"questions {unknown or 'of none'}: choose from {', '.join(QUESTIONS)}")


@EVALUATORS.register("shapes")
class ShapesEvaluator(Evaluator):
    """What each layer knows of the shapes world."""

    name = "shapes"
    summary = "measure what each layer knows of the shapes world, where every answer is known exactly"
    example = "devil evaluate shapes CHECKPOINT --output-dir devil-shapes"
    Settings = ShapesSettings
    records_file = "shapes.jsonl"
    unit = "scene"

    def open(self) -> list[str]:
        """The positions of the scenes in their world."""
        self.world = World(self.settings.limit, self.settings.seed)
        return [str(index) for index in range(len(self.world))]

    def decides(self) -> dict[str, Any]:
        """The world, the layers, and the questions where they are not all."""
        settings = self.settings
        asked = [name for name in QUESTIONS if name in settings.questions]
        decided = {"seed": settings.seed, "layers": self.model.layer_names, "questions": asked}
        if "pointing" in asked and settings.pointing_limit is not None:
            decided["pointing_limit"] = settings.pointing_limit
        return decided

    def rows(self, keys: Sequence[str]) -> Rows:
        """Every answer about each scene."""
        indices = [int(key) for key in keys]
        scenes = [self.world.scene(index) for index in indices]
        return scene_rows(
            self.model, self.processor, scenes, indices, self.settings.questions, self.settings.pointing_limit
        )

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See `summary`."""
        scenes = [self.world.scene(int(key)) for key in rows]
        result = summary(list(rows.values()), scenes)
        return Evaluation(
            title="What each layer knows",
            scores=result.pop("scores"),
            controls=result.pop("controls"),
            dataset={"name": self.world.label, "size": len(scenes)},
            settings={"decoding": "greedy", "seed": self.settings.seed},
            details=result,
        )

    def text(self, evaluation: Evaluation) -> str:
        """All scores, a table per question."""
        return f"{evaluation.dataset['name']}, {evaluation.dataset['size']} scenes\n\n{knowledge_table(evaluation.details)}"


# ------------------------------------------------------------------------------------------------------------ answers


@torch.no_grad()
def scene_rows(
    model: DevilModel,
    processor: DevilProcessor,
    scenes: Sequence[Scene],
    indices: Sequence[int],
    questions: Sequence[str] = QUESTIONS,
    pointing_limit: int | None = None,
) -> Rows:
    """The answers about each scene, as JSON, by question.

    Args:
        indices: positions of the scenes in their world.
        questions: some of `QUESTIONS`.
        pointing_limit: scenes from this position on are not asked for the pointing game.
    """
    features = model.extract_features(pixel_values(processor, scenes))
    rows: Rows = [{} for _ in scenes]
    if "described" in questions:
        for row, said in zip(rows, describe_scenes(model, processor, features), strict=True):
            row["said"] = said
    maps: dict[str, Tensor] = {}
    if "places" in questions:
        maps = word_maps(model, processor, features)
        for row, places in zip(rows, _answer_places(model, processor, features, maps, scenes), strict=True):
            row["places"] = places
    if "pointing" in questions:
        play = [at for at, i in enumerate(indices) if i < (pointing_limit or i + 1) and scenes[at].unique_phrases()]
        for row in rows:
            row["pointing"] = []
        if play:
            asked = [cast(Tensor, one)[play] for one in features]
            own = {n: one[play] for n, one in maps.items()} if maps else word_maps(model, processor, asked)
            for at, played in zip(play, play_pointing(own, [scenes[at] for at in play]), strict=True):
                rows[at]["pointing"] = played
    if "chosen" in questions:
        for row, chosen in zip(rows, _choose(model, processor, features, scenes, indices), strict=True):
            row["chosen"] = chosen
    return rows


def pixel_values(processor: DevilProcessor, scenes: Sequence[Scene]) -> Tensor:
    return processor(images=[scene.image for scene in scenes], return_tensors="pt")["pixel_values"]


def describe_scenes(model: DevilModel, processor: DevilProcessor, features: Sequence[Tensor | None]) -> list[Texts]:
    """Description by layer, and by "all" of them together, for each image of `features`."""
    output = model.describe(feature_maps=features, max_new_tokens=MAX_NEW_TOKENS)
    texts: list[Texts] = [{} for _ in range(int(output.image_index.max()) + 1)]
    for row, text in enumerate(processor.batch_decode(output.sequences, skip_special_tokens=True)):
        texts[int(output.image_index[row])][output.layer_of(row)] = text.strip()
    return texts


def word_maps(model: DevilModel, processor: DevilProcessor, features: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Maps of every attribute word, (images, `VOCABULARY`, rows, columns), by layer and by combination of the layers."""
    phrases = processor(text=VOCABULARY, carrier=CARRIER, return_tensors="pt")
    maps = model.attribute(phrases=phrases, feature_maps=features).maps
    whole = model.layer_evidence(features, phrases)
    maps = maps | {rule: combine_maps(maps, rule, whole) for rule in map_combinations()}
    return {name: one.cpu() for name, one in maps.items()}


def play_pointing(maps: Mapping[str, Tensor], scenes: Sequence[Scene]) -> list[list[dict[str, Any]]]:
    """The pointing game for every word that one object of several has: `hit` and `chance` by layer."""
    played: list[list[dict[str, Any]]] = []
    for image, scene in enumerate(scenes):
        played.append([])
        for phrase in scene.unique_phrases():
            mask, column = scene.masks[phrase.object_index], VOCABULARY.index(phrase.text)
            games = {
                name: [
                    pointing(values[image, column].numpy(), mask),
                    chance_pointing((values.shape[-2], values.shape[-1]), mask),
                ]
                for name, values in maps.items()
            }
            played[-1].append({"attribute": phrase.attribute, "text": phrase.text, "games": games})
    return played


def _answer_places(model, processor, features, maps, scenes: Sequence[Scene]) -> list[dict[str, list[dict]]]:
    """By layer, what one place of each object says and which words it holds likeliest, and what an empty place says."""
    answers: list[dict[str, list[dict]]] = [{} for _ in scenes]
    for layer, name in enumerate(model.layer_names):
        found = features[layer]
        grid = (found.shape[-2], found.shape[-1])
        asked = [(image, *place) for image, scene in enumerate(scenes) for place in object_places(scene, grid)]
        vectors = torch.stack([found[image, :, row, column] for image, _, row, column in asked])
        prefix = model.translate([vectors if at == layer else None for at in range(len(features))])
        ids = model.decode(prefix, max_new_tokens=MAX_NEW_TOKENS)
        texts = processor.batch_decode(ids, skip_special_tokens=True)
        for (image, item, row, column), text in zip(asked, texts, strict=True):
            evidence = maps[name][image, :, row, column]
            answers[image].setdefault(name, []).append(
                {"object": item, "place": [row, column], "text": text.strip(), "likeliest": _likeliest(evidence)}
            )
    return answers


def object_places(scene: Scene, grid: tuple[int, int]) -> list[tuple[int | None, int, int]]:
    """(object, row, column): for each visible object the cell that holds most of it, and for None a cell that holds none."""
    columns = grid[1]
    masks = torch.from_numpy(scene.masks).float()[:, None]
    shares = torch.nn.functional.adaptive_avg_pool2d(masks, grid)[:, 0].flatten(1)  # (objects, cells)
    places: list[tuple[int | None, int, int]] = [
        (item, *divmod(int(share.argmax()), columns)) for item, share in enumerate(shares) if share.max() > 0
    ]
    empty = torch.nonzero(shares.sum(dim=0) == 0)[:, 0]
    # In the middle of the list, which is neither a corner nor chosen by what the model says.
    return places + [(None, *divmod(int(cell), columns)) for cell in empty[len(empty) // 2 :][:1]]


def _likeliest(evidence: Tensor) -> dict[str, str]:
    """The word of each class with the most evidence (`VOCABULARY`,)."""
    values = dict(zip(VOCABULARY, evidence.tolist(), strict=True))
    return {name: max(words, key=lambda word: values[word]) for name, words in ATTRIBUTE_WORDS.items()}


def _choose(
    model, processor, features, scenes: Sequence[Scene], indices: Sequence[int]
) -> list[dict[str, dict[str, Any]]]:
    """By layer, the choices by evidence about each whole image: class -> chosen text."""
    names = ["all", *model.layer_names]
    chosen: list[dict[str, dict[str, Any]]] = [{name: {} for name in names} for _ in scenes]
    words = processor(text=VOCABULARY, carrier=CARRIER, return_tensors="pt")
    prefixes = {name: model.ask(layers=None if name == "all" else name, feature_maps=features) for name in names}
    null = model.score_prefix(model.null_prefix(), model.check_phrases(words)).sum(dim=-1)[0]
    for name, prefix in prefixes.items():
        evidence = model.score_prefix(prefix, model.check_phrases(words)).sum(dim=-1) - null
        for row, values in zip(chosen, (evidence / words["scored_mask"].sum(dim=1).to(evidence)).cpu(), strict=True):
            row[name] |= _likeliest(values)
    for image, scene in enumerate(scenes):
        rows = torch.stack([prefix[image] for prefix in prefixes.values()])
        for name, options in choices(scene).items():
            # Of equals the first is chosen: the true one is not always the first.
            turn = indices[image] % len(options)
            options = options[turn:] + options[:turn]
            phrases = model.check_phrases(processor(text=options, return_tensors="pt"))
            given, null = (model.score_prefix(p, phrases).sum(dim=-1) for p in (rows, model.null_prefix()))
            evidence = (given - null).round(decimals=3)  # what is less is rounding of the sums
            for layer, best in zip(names, evidence.argmax(dim=1).tolist(), strict=True):
                chosen[image][layer][name] = options[best]
    return chosen


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


# ------------------------------------------------------------------------------------------------------------- scores


def summary(rows: Rows, scenes: Sequence[Scene]) -> dict[str, Any]:
    """The scores of recorded answers, for the questions that were asked.

    Returns:
        `described`, `places`: row -> class -> {precision, recall, f1}, with `count` and `relation` of `described` as shares;
        `chosen`, `places_chosen`, `pointing`: row -> class -> share; `empty_places`: layer -> share that name an attribute all
        the same; `stated_relations`: row -> how many. Rows are layers, "all", combinations of maps, "constant", "shuffled" and
        "chance". `scores` and `controls` hold them as one table, in the layout of `evaluation/results.py`.
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
        parts["chance_pointing"] = float(np.mean(chances)) if chances else 0.0
        parts["pointing_phrases"] = {
            name: sum(phrase["attribute"] == name for phrase in played) for name in ATTRIBUTE_WORDS
        }
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
    """Precision, recall and F1 of the words of each class that the truths have."""
    found = {}
    for name in truths[0]:
        counts = WordCounts(CLASSES[name])
        for text, truth in zip(texts, truths, strict=True):
            counts.add(text, truth[name])
        found[name] = {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1}
    return found


def constant_scores(truths: Sequence[Mapping[str, set[str]]]) -> dict[str, Any]:
    """The scores of the constant answer with the best F1: the most frequent words of each class, as many as pay."""
    best: dict[str, Any] = {}
    for name in truths[0]:
        often = sorted(CLASSES[name], key=lambda word: -sum(word in truth[name] for truth in truths))
        answers = [" ".join(often[:n]) for n in range(1, len(often) + 1)]
        scores = [
            word_scores([text] * len(truths), [{name: truth[name]} for truth in truths])[name] for text in answers
        ]
        best[name] = max(scores, key=lambda score: score["f1"])
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
            name: _share(one[name] in truth[name] for one, truth in zip(found, truths, strict=True))
            for name in ATTRIBUTE_WORDS
        }
        for name in ("size", "relation"):
            right = [one[name] == given[name][0] for one, given in zip(found, options, strict=True) if name in given]
            if right:
                scores[layer][name] = _share(right)
    scores["constant"] = {
        name: max(_share(word in truth[name] for truth in truths) for word in words)
        for name, words in ATTRIBUTE_WORDS.items()
    }
    first = [scene.objects[0].size for scene in scenes]
    scores["constant"]["size"] = max(first.count(size) for size in SIZES) / len(first)
    given = [scene.relations[0][1] for scene in scenes if scene.relations]
    if given:  # the best fixed word of each pair of opposites
        scores["constant"]["relation"] = sum(
            max(given.count(one), given.count(OPPOSITE[one])) for one in ("left of", "above")
        ) / len(given)
    scores["chance"] = {
        name: float(np.mean([len(truth[name]) / len(words) for truth in truths]))
        for name, words in ATTRIBUTE_WORDS.items()
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
            name: _share(one["likeliest"][name] == item.attributes[name] for one, item in of_objects)
            for name in ATTRIBUTE_WORDS
        }
        nothing = [set(word_list(one["text"])) & set(VOCABULARY) for one, _ in answers if one["object"] is None]
        if nothing:
            empty[layer] = _share(bool(words) for words in nothing)
    described["constant"] = constant_scores(truths)
    chosen["constant"] = {
        name: max(_share(word in truth[name] for truth in truths) for word in words)
        for name, words in ATTRIBUTE_WORDS.items()
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
        ("pointing game, words that one object of several has", "pointing", tuple(ATTRIBUTE_WORDS)),
    ):
        if parts.get(part):
            lines += [title, table(parts[part], classes, _cell), ""]
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
        "one place on an object: which word has the most evidence?": {
            layer: result["places_chosen"][layer] for layer in layers
        },
        "where is it? the maximum of the word's map (all: of the combined map)": pointing,
    }
    bases = zip(panels, (chance, result["places_chosen"]["chance"], result["pointing"].get("chance", {})), strict=True)
    return {heading: table for heading, table in panels.items() if table}, dict(bases)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['precision']:.3f} / {value['recall']:.3f}"
    return f"{value:.3f}"
