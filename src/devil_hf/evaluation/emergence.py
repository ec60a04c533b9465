"""At which depth phrases become readable, over images of which it is known what they are true of.

In the shapes world, where nothing else is asked, there are five classes of phrases: the words of colour, texture and shape, those
that the scene has against the others of their class; size and relation, noun phrases of the scene's objects with the true word
against the same with a false one. Of labelled images a phrase is true where it is the name of something in the image, with or
without article; where there are captions, where one of them has the phrase, though people do not tell all that is in an image.

What is compared, and how it is judged, says `devil_hf.questions.emergence`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from devil_hf.data.decoding import BadImage
from devil_hf.data.identity import combined
from devil_hf.data.labels import LabelledImages, open_labelled
from devil_hf.data.shapes import ATTRIBUTE_WORDS, RELATIONS, SHAPES, SIZES, VOCABULARY, Scene
from devil_hf.data.worlds import World, parse_world
from devil_hf.evaluation.evaluator import EVALUATORS, Evaluator
from devil_hf.evaluation.knowledge import choices, relations_hold
from devil_hf.evaluation.results import CHANCE, Evaluation
from devil_hf.evaluation.sources import ObjectSettings
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.text.words import CARRIER, word_list
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.questions.emergence import Emergence, Statement, ask_statements, check_statements, summarise
from devil_hf.questions.phrases import known_phrases
from devil_hf.settings import option, read_layers

ARTICLES = ("a", "an", "the")
ATTRIBUTES = {word for words in (*ATTRIBUTE_WORDS.values(), tuple(SIZES)) for word in words}
EXPECTED = (("colour", "shape"), ("shape", "relation"))  # which classes of the shapes world are compared with which
OTHERS = "others"  # a control: what is true of other images
NAMES = "names"  # the group of every name, where no phrases are given


@dataclass(kw_only=True)
class EmergenceSettings(ObjectSettings):
    """What `devil evaluate emergence` asks, of which images."""

    source: str = option(
        "shapes:COUNT[:SEED]; a folder of folders of classes; COCO, VOC or YOLO; a caption folder or sources", "shapes"
    )
    phrases: list[str] = option(
        "each by itself, or several as NAME=PHRASE,PHRASE (default: every name, or the classes of the shapes world)", []
    )
    split: str | None = option("of a caption folder", None)
    carrier: str | None = option('a neutral word read before each of these phrases, such as "the"', None)
    layers: list[str] | None = option("names or indices of layers (default: every one)", None)
    limit: int | None = option("images, from the first on; of folders of classes one of each in turn", 200)
    batch_size: int = option("images at once, per process", 16)
    seed: int = option("of intervals and permutations", 0)
    output_dir: Path = option("rows, where a stopped run goes on, the picture, and scores.json", Path("devil-emergence"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        read_groups(self.phrases)
        if self.limit is None:
            raise ValueError("--limit is needed: how many images are read")
        if parse_world(self.source, self.limit) is not None and (self.images or self.names or self.split):
            raise ValueError(
                f"--images, --names and --split are of labelled images, and {self.source} draws its own: leave them out"
            )
        if self.carrier and not self.phrases:
            raise ValueError(f"--carrier {self.carrier} is read before --phrases: give some")


def read_groups(typed: Sequence[str]) -> dict[str, list[str]]:
    """Phrases by group: PHRASE is a group by itself, NAME=PHRASE,PHRASE one of several.

    Raises:
        ValueError: for empty phrases, and what is given twice.
    """
    groups: dict[str, list[str]] = {}
    for text in typed:
        name, equals, rest = text.partition("=")
        phrases = [phrase.strip() for phrase in rest.split(",")] if equals else [text.strip()]
        if not name.strip() or not all(phrases):
            raise ValueError(f"{text!r} is no PHRASE, and no NAME=PHRASE,PHRASE with a word in each of them")
        if name.strip() in groups or len(set(phrases)) < len(phrases):
            raise ValueError(f"{text!r} says something twice: leave that out")
        groups[name.strip()] = phrases
    return groups


# --------------------------------------------------------------------------------------------------------------- truth


def statements_of_scene(number: int, scene: Scene) -> list[Statement]:
    """The classes of phrases of the shapes world, see the module's docstring."""
    found = [
        Statement(number, word, kind, word in scene.words[kind], CARRIER)
        for kind, words in ATTRIBUTE_WORDS.items()
        for word in words
    ]
    return found + [
        Statement(number, text, kind, at == 0, drawn=True)
        for kind, options in choices(scene).items()
        for at, text in enumerate(options)
    ]


def true_of_scene(phrase: str, scene: Scene) -> bool:
    """Whether one object has all that a phrase says, or a relation that it states holds.

    Raises:
        ValueError: for words that the world does not have, and for several objects without a relation between them.
    """
    words = word_list(phrase)
    if unknown := [word for word in words if word not in VOCABULARY]:
        raise ValueError(f"{phrase!r}: the shapes world has no {unknown}; its words are {', '.join(sorted(ATTRIBUTES))}")
    wanted = ATTRIBUTES.intersection(words)
    if not wanted:
        raise ValueError(f"{phrase!r} names no colour, texture, shape or size: it is neither true nor false of a scene")
    if any(f" {relation} " in f" {' '.join(words)} " for relation in RELATIONS):
        held = relations_hold(" ".join(words), scene)
        return bool(held) and all(held)
    if sum(word in SHAPES for word in words) > 1:
        raise ValueError(f"{phrase!r} names several objects: state one of {', '.join(RELATIONS)} between them, or ask one by one")
    return any(wanted <= {*item.attributes.values(), item.size} for item in scene.objects)


def true_of_texts(phrase: str, texts: Sequence[str], named: bool) -> bool:
    """Whether a phrase, its article aside, is one of these names, or stands in one of these captions."""
    words = _content(phrase)
    if named:
        return any(words == _content(text) for text in texts)
    return any(f" {' '.join(words)} " in f" {' '.join(word_list(text))} " for text in texts)


def _content(text: str) -> list[str]:
    words = word_list(text.replace("_", " "))
    return words[1:] if words[:1] and words[0] in ARTICLES and len(words) > 1 else words


def statements_of_labels(data: LabelledImages, groups: Mapping[str, Sequence[str]], carrier: str | None) -> list[list[Statement]]:
    """What is said of each labelled image.

    Raises:
        ValueError: for a phrase that is true of no image, with the names that there are; and for captions without phrases.
    """
    names = list(dict.fromkeys(text for texts in data.texts for text in texts))
    if not groups and not data.named:
        raise ValueError(f"{data.name} has captions and no names: say with --phrases what is asked")
    groups = groups or {NAMES: names}
    found: list[list[Statement]] = [[] for _ in data.keys]
    for group, phrases in groups.items():
        for phrase in phrases:
            truth = [true_of_texts(phrase, texts, data.named) for texts in data.texts]
            if not any(truth):
                known = f"; its names are {', '.join(sorted(names)):.500}" if data.named else " as it is written"
                raise ValueError(f"{phrase!r} is true of none of the {len(truth)} images of {data.name}{known}")
            for number, (own, true) in enumerate(zip(found, truth, strict=True)):
                own.append(Statement(number, phrase, group, true, carrier))
    return found


# ----------------------------------------------------------------------------------------------------------- evaluator


@EVALUATORS.register("emergence")
class EmergenceEvaluator(Evaluator):
    """Evidence of true and of false phrases, layer by layer."""

    name = "emergence"
    summary = "find the first layer at which true phrases are told from false ones"
    example = "devil evaluate emergence shapes --limit 200"
    Settings = EmergenceSettings

    def open(self) -> list[str]:
        """The images, and what is said of each."""
        settings, groups = self.settings, read_groups(self.settings.phrases)
        self.world = parse_world(settings.source, settings.limit)
        if self.world is not None:
            self.world = self.world.first(settings.limit)
            self.statements = [self._of_scene(number, groups) for number in range(len(self.world))]
            keys, self.dataset = [str(number) for number in range(len(self.world))], self.world.label
        else:
            self.data = open_labelled(settings.source, settings.split, settings.limit, settings.images, settings.names)
            self.statements = statements_of_labels(self.data, groups, settings.carrier)
            keys, self.dataset = self.data.keys, self.data.name
        self.positions = {key: at for at, key in enumerate(keys)}
        check_statements([one for own in self.statements for one in own], 1)
        return keys

    def _of_scene(self, number: int, groups: Mapping[str, Sequence[str]]) -> list[Statement]:
        scene, carrier = self._world().scene(number), self.settings.carrier
        if not groups:
            return statements_of_scene(number, scene)
        return [
            Statement(number, phrase, group, true_of_scene(phrase, scene), carrier)
            for group, phrases in groups.items()
            for phrase in phrases
        ]

    def _world(self) -> World:
        assert self.world is not None
        return self.world

    def prepare(self) -> None:
        """Layers and phrases, which must be the model's, and enough images to judge all of them."""
        self.layers = read_layers(self.settings.layers, self.model.layer_names)
        asked = resolve_layers(self.layers, self.model.layer_names)
        every = [one for own in self.statements for one in own]
        check_statements(every, len(asked) + (len(asked) > 1))
        for carrier in dict.fromkeys(one.carrier for one in every):
            known_phrases(self.model, self.processor, list({o.phrase: None for o in every if o.carrier == carrier}), carrier)

    def decides(self) -> dict[str, Any]:
        """The data and the layers."""
        layers = [self.model.layer_names[at] for at in resolve_layers(self.layers, self.model.layer_names)]
        return {"source": self.settings.source, "seed": self.world.seed if self.world else None, "layers": layers}

    def identity(self, key: str) -> str | None:
        """Of the image, and of what is said of it."""
        at = self.positions[key]
        said = json.dumps([[one.phrase, one.group, one.true, one.carrier] for one in self.statements[at]])
        return combined([said] if self.world else [self.data.identity(at), said])

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Per image the `evidence` of its statements by layer, or the `problem` of one that cannot be read."""
        found: list[dict[str, Any]] = [{} for _ in keys]
        images = []
        for row, key in zip(found, keys, strict=True):
            try:
                at = self.positions[key]
                images.append(self.world.scene(at).image if self.world else self.data.load(at))
            except BadImage as error:
                row["problem"] = str(error)
        readable = [(row, self.statements[self.positions[key]]) for row, key in zip(found, keys, strict=True) if not row]
        if readable:
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.model.device)
            asked = ask_statements(self.model, self.processor, pixels, [own for _, own in readable], self.layers)
            for (row, _), evidence in zip(readable, asked, strict=True):
                row["evidence"] = evidence
        return found

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See `devil_hf.questions.emergence`."""
        usable = [(self.statements[self.positions[key]], row["evidence"]) for key, row in rows.items() if "evidence" in row]
        statements = [one for own, _ in usable for one in own]
        layers = list(usable[0][1]) if usable else []
        check_statements(statements, max(len(layers), 1))
        values = {layer: torch.tensor([v for _, row in usable for v in row[layer]]).numpy() for layer in layers}
        found = summarise(values, statements, self.settings.seed)
        groups = list(found.depths)
        named = self.world is not None and not self.settings.phrases
        pairs = [pair for pair in EXPECTED if set(pair) <= set(groups)] if named else list(pairwise(groups))
        return Evaluation(
            title="Depth at which phrases become readable",
            scores={layer: {f"auroc_{group}": found.depths[group][layer].auroc for group in groups} for layer in layers},
            controls={OTHERS: _of_others(found, layers[-1]), CHANCE: {f"auroc_{group}": 0.5 for group in groups}},
            dataset={"name": self.dataset, "size": len(usable)},
            settings={"carrier": self.settings.carrier, "phrases": self.settings.phrases, "seed": self.settings.seed},
            details=as_details(found, pairs) | {"bad_images": len(rows) - len(usable)},
        )

    def text(self, evaluation: Evaluation) -> str:
        """The tables, and the first layers."""
        return emergence_text(evaluation)


def _of_others(found: Emergence, layer: str) -> dict[str, float]:
    """The control at a layer, of the groups that have it."""
    controls = {group: by_layer[layer].control for group, by_layer in found.depths.items()}
    return {f"auroc_{group}": value for group, value in controls.items() if value is not None}


def as_details(found: Emergence, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """An `Emergence` as JSON; of some pairs of groups, by how much the first is ahead of the second at each layer."""
    leads = {f"{one} - {other}": {layer: found.lead(one, other, layer) for layer in found.layers} for one, other in pairs}
    return {
        "first": {group: found.first(group) for group in found.depths},
        "leads": {pair: {layer: {"value": v, "interval": i} for layer, (v, i) in by.items()} for pair, by in leads.items()},
        "depths": {group: {layer: asdict(depth) for layer, depth in by.items()} for group, by in found.depths.items()},
        "within": found.within,
        "statements": found.statements,
        "images": found.images,
    }


def emergence_text(evaluation: Evaluation) -> str:
    """AUROC with intervals by layer, the first layer above chance, and who is ahead of whom."""
    details = evaluation.details
    lines = [f"{evaluation.dataset['name']}, {evaluation.dataset['size']} images; AUROC of true against false phrases [95 %]", ""]
    deepest, others = list(evaluation.scores)[-1], evaluation.controls[OTHERS]
    every = evaluation.scores | ({f"{deepest}, what is true of other images": others} if others else {})
    rows = {layer: {name.removeprefix("auroc_"): v for name, v in row.items()} for layer, row in every.items()}
    intervals = {layer: {g: by[layer]["auroc_interval"] for g, by in details["depths"].items()} for layer in evaluation.scores}
    lines += [table(rows, list(details["depths"]), intervals=intervals), ""]
    for group, layer in details["first"].items():
        true, false = details["statements"][group]
        where = "within" if details["within"][group] else "between"
        counted = f"{true} true and {false} false statements, {where} {details['images'][group]} images"
        if layer is None:
            lines.append(f"{group}: above chance at no layer ({counted})")
        else:
            lines.append(
                f"{group}: first above chance at {layer}, p = {details['depths'][group][layer]['p_value']:.4f} ({counted})"
            )
    if details["leads"]:
        leads = {pair: {layer: one["value"] for layer, one in by.items()} for pair, by in details["leads"].items()}
        intervals = {pair: {layer: one["interval"] for layer, one in by.items()} for pair, by in details["leads"].items()}
        lines += [
            "",
            "difference of AUROC, of the same images",
            "",
            table(leads, list(next(iter(leads.values()))), "{:+.3f}".format, intervals),
        ]
    lines += ["", "p-values are adjusted for all groups and layers (Holm)"]
    return "\n".join(lines)


__all__ = [
    "EmergenceEvaluator",
    "EmergenceSettings",
    "as_details",
    "emergence_text",
    "read_groups",
    "statements_of_labels",
    "statements_of_scene",
    "true_of_scene",
    "true_of_texts",
]
