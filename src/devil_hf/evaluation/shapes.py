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

import torch
from torch import Tensor

from devil_hf.data.shapes import ATTRIBUTE_WORDS, Scene
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.knowledge import VOCABULARY, Rows, choices, knowledge_table, summary
from devil_hf.evaluation.maps.combining import combine_maps, layer_evidence, map_combinations
from devil_hf.evaluation.maps.pointing import chance_pointing, pointing
from devil_hf.evaluation.results import Evaluation
from devil_hf.evaluation.text.words import CARRIER
from devil_hf.model.explaining_devil import INFORMED
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.settings import option

QUESTIONS = ("described", "chosen", "places", "pointing")
MAX_NEW_TOKENS = 40
Texts = dict[str, str]


@dataclass(kw_only=True)
class ShapesSettings(EvaluationSettings):
    """What `devil evaluate shapes` asks."""

    limit: int | None = option("scenes, from the first on", 300)
    seed: int = option("of the world; 1 is held out in everything that this package trains", HELD_OUT_WORLD)
    batch_size: int = option("scenes at once, per process", 25)
    questions: list[Literal["described", "chosen", "places", "pointing"]] = option("which questions", list(QUESTIONS))
    pointing_limit: int | None = option("only so many of the scenes for the pointing game, which asks every place", None, least=1)
    output_dir: Path = option("scores, answers and the figure; a stopped run goes on from there", Path("devil-shapes"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if self.limit is None or self.limit < 2:
            raise ValueError(f"--limit {self.limit}: at least 2 scenes are needed, to deal descriptions to others")
        if not self.questions:
            raise ValueError(f"there are no questions: choose from {', '.join(QUESTIONS)}")
        if self.pointing_limit is not None and self.pointing_limit < 1:
            raise ValueError(f"--pointing-limit {self.pointing_limit} must be at least 1, or leave pointing out of --questions")


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
        """The world, the layers, the questions, and how maps are combined where they are asked for."""
        settings = self.settings
        asked = [name for name in QUESTIONS if name in settings.questions]
        decided: dict[str, Any] = {"seed": settings.seed, "layers": self.model.layer_names, "questions": asked}
        if "pointing" in asked:
            decided["informed"] = INFORMED
            if settings.pointing_limit is not None:
                decided["pointing_limit"] = settings.pointing_limit
        return decided

    def rows(self, keys: Sequence[str]) -> Rows:
        """Every answer about each scene."""
        indices = [int(key) for key in keys]
        scenes = [self.world.scene(index) for index in indices]
        return scene_rows(self.model, self.processor, scenes, indices, self.settings.questions, self.settings.pointing_limit)

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
        last = float("inf") if pointing_limit is None else pointing_limit
        play = [at for at, index in enumerate(indices) if index < last and scenes[at].unique_phrases()]
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


def new_tokens(model: DevilModel) -> int:
    """Tokens that a description may have: what a scene needs, or what the language model's context has room for."""
    context = model.config.context_length
    return MAX_NEW_TOKENS if context is None else min(MAX_NEW_TOKENS, context - model.config.prefix_length - 1)


def describe_scenes(model: DevilModel, processor: DevilProcessor, features: Sequence[Tensor | None]) -> list[Texts]:
    """Description by layer, and by "all" of them together, for each image of `features`."""
    output = model.describe(feature_maps=features, max_new_tokens=new_tokens(model))
    texts: list[Texts] = [{} for _ in range(int(output.image_index.max()) + 1)]
    for row, text in enumerate(processor.batch_decode(output.sequences, skip_special_tokens=True)):
        texts[int(output.image_index[row])][output.layer_of(row)] = text.strip()
    return texts


def word_maps(model: DevilModel, processor: DevilProcessor, features: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Maps of every attribute word, (images, `VOCABULARY`, rows, columns), by layer and by combination of the layers."""
    phrases = processor(text=VOCABULARY, carrier=CARRIER, return_tensors="pt")
    maps = model.attribute(phrases=phrases, feature_maps=features).maps
    whole = layer_evidence(model, features, phrases)
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
                name: [pointing(values[image, column].numpy(), mask), chance_pointing((values.shape[-2], values.shape[-1]), mask)]
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
        ids = model.decode(prefix, max_new_tokens=new_tokens(model))
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


def _choose(model, processor, features, scenes: Sequence[Scene], indices: Sequence[int]) -> list[dict[str, dict[str, Any]]]:
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
