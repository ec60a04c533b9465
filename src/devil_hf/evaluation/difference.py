"""Differences between networks of which it is known what they are: an attribute that was unlearned, or nothing.

* `colour`, `texture`, `shape`: a copy of the backbone is fine-tuned for some seconds to give, for a scene, the features that the
  backbone has of the same scene with that attribute of every object drawn anew. It learns their mean, which is all but the
  attribute. `recall` is the share of the attribute's words, at all layers together and at each alone, that are reported as lost;
  `precision` the share of what is reported as lost that are such words.
* `copy`: the network and an exact copy of it. `views`: the network twice, each side with a random crop of its own of every scene,
  and at random which is A. `noise`: two copies whose weights are each disturbed anew. `quiet` is the share of splits where
  nothing is reported, lost or gained, at any layer; `certain` the same without regard to the size of changes. A split is a random
  half of the scenes.

Copies are equal, and views are exchangeable scene by scene: there the test itself holds its level. Two disturbed networks differ,
if by little, and enough scenes make that certain; that it is not reported is due to the least size of a change.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from devil_hf.build.models import with_backbone
from devil_hf.data.rendering import SceneObject
from devil_hf.data.shapes import ATTRIBUTE_WORDS, COLOURS, Scene, sample_scene
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import Evaluation
from devil_hf.model.backbone_devil import FeatureBackbone
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.questions.difference import (
    GAINED,
    LEVEL,
    LOST,
    changed_words,
    compare_networks,
    compared_layers,
    describe_images,
    evidence_of_words,
    read_images,
    said_words,
)
from devil_hf.settings import option

NULLS = ("copy", "views", "noise")
CROP = 120  # pixels of 128 that a view keeps
NOISE = 1e-3  # of the standard deviation of each weight
PAIRS = 4  # of disturbed networks


@dataclass(kw_only=True)
class DifferenceSettings(EvaluationSettings):
    """What `devil evaluate difference` asks."""

    limit: int | None = option("scenes, from the first on", 200)
    seed: int = option("of the world; 1 is held out in everything that this package trains", HELD_OUT_WORLD)
    attributes: list[str] = option("to unlearn, each in a copy of its own", ["colour"], choices=lambda: tuple(ATTRIBUTE_WORDS))
    steps: int = option("of fine-tuning", 60, least=1)
    splits: int = option("of the scenes, for each pair of equal networks", 100, least=0)
    batch_size: int = option("rows between two records", 10)
    output_dir: Path = option("rows, where a stopped run goes on, and scores.json", Path("devil-difference"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if self.limit is None or self.limit < 40:
            raise ValueError(f"--limit {self.limit}: at least 40 scenes are needed, of which a split has half")
        if len(set(self.attributes)) < len(self.attributes):
            raise ValueError(f"--attributes {' '.join(self.attributes)} name one twice: leave it out")


def redrawn(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """The scene with one attribute of every object drawn anew."""
    words = ATTRIBUTE_WORDS[attribute]
    return dataclasses.replace(
        scene, objects=tuple(_with(item, attribute, words[rng.integers(len(words))]) for item in scene.objects)
    )


def _with(item: SceneObject, attribute: str, word: str) -> SceneObject:
    red, green, blue = map(float, COLOURS[word]) if attribute == "colour" else item.rgb
    changed: dict[str, Any] = {attribute: word, "rgb": (red, green, blue)}
    return dataclasses.replace(item, **changed)


def unlearn(model: DevilModel, processor: Any, attribute: str, steps: int, scenes: int = 6, seed: int = 0) -> FeatureBackbone:
    """A copy of the backbone whose features no longer tell an attribute, fine-tuned on scenes that no evaluation sees."""
    teacher, student = model.backbone, copy.deepcopy(model.backbone).requires_grad_(True)
    rng = np.random.default_rng((seed, 2))
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"unlearning {attribute}", unit="step"):
        drawn = [sample_scene(rng) for _ in range(scenes)]
        pictures = [Image.fromarray(one.image) for one in (*drawn, *(redrawn(scene, attribute, rng) for scene in drawn))]
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(model.device)
        with torch.no_grad():
            wanted = [torch.cat(maps.chunk(2)[::-1]) for maps in teacher(pixels)]
        loss = torch.stack([_distance(*pair) for pair in zip(student(pixels), wanted, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.requires_grad_(False)


def _distance(maps: Tensor, wanted: Tensor) -> Tensor:
    """Of maps (B, C, H, W), and of their means over places, as shares of the variance of what is wanted."""
    pooled, mean = maps.mean(dim=(2, 3)), wanted.mean(dim=(2, 3))
    of_means = (pooled - mean).square().sum() / (mean - mean.mean(dim=0)).square().sum()
    return of_means + (maps - wanted).square().mean() / wanted.var()


def disturbed(backbone: FeatureBackbone, generator: torch.Generator) -> FeatureBackbone:
    """A copy with noise on every weight."""
    twin = copy.deepcopy(backbone)
    for weights in twin.parameters():
        if weights.numel() > 1:
            noise = torch.randn(weights.shape, generator=generator).to(weights)
            weights.add_(noise * weights.std(), alpha=NOISE)
    return twin


@EVALUATORS.register("difference")
class DifferenceEvaluator(Evaluator):
    """What is reported of networks that lack an attribute, and of equal ones."""

    name = "difference"
    summary = "check what is reported of networks that lost an attribute, and of equal ones"
    example = "devil evaluate difference CHECKPOINT --attributes colour"
    Settings = DifferenceSettings
    parallel = False
    unit = "comparison"

    def open(self) -> list[str]:
        """Attributes, and splits of equal networks."""
        self.world = World(self.settings.limit, self.settings.seed)
        self.tables: dict[str, tuple[np.ndarray, np.ndarray, list[str]]] = {}
        return [*self.settings.attributes, *(f"{null}:{split}" for null in NULLS for split in range(self.settings.splits))]

    def decides(self) -> dict[str, Any]:
        """The world, and how attributes are unlearned."""
        return {"world": self.world.name, "steps": self.settings.steps, "splits": self.settings.splits}

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """What is reported: words by verdict and layer of a network that lost an attribute; how many of equal ones."""
        return [self._split(key) if ":" in key else self._unlearned(key) for key in keys]

    def _unlearned(self, attribute: str) -> dict[str, Any]:
        own = (self.model, self.processor)
        with torch.enable_grad():
            student = unlearn(*own, attribute, self.settings.steps)
        scenes = [(str(number), Image.fromarray(scene.image)) for number, scene in enumerate(self.world.scenes())]
        found = compare_networks(own, with_backbone(*own, student), scenes, examples=0)
        return {LOST: found.found(LOST), GAINED: found.found(GAINED), "words": [dataclasses.asdict(one) for one in found.words]}

    def _split(self, key: str) -> dict[str, Any]:
        null, _, number = key.partition(":")
        name = null if null != "noise" else f"noise:{int(number) % PAIRS}"
        if name not in self.tables:
            self.tables[name] = self._tables(name)
        first, second, words = self.tables[name]
        rng = np.random.default_rng((self.settings.seed, NULLS.index(null), int(number)))
        half = rng.permutation(self.settings.limit)[: self.settings.limit // 2]
        one, other = first[:, half], second[:, half]
        kept = rng.random(len(half))[None, :, None] < (0.5 if null == "views" else 1)
        pair = np.where(kept, one, other), np.where(kept, other, one)
        layers = compared_layers(self.model, self.model)
        changes = changed_words(*pair, words=words, layers=layers, seed=int(number))
        return {"reported": sum(row.verdict is not None for row in changes), "certain": sum(row.q <= LEVEL for row in changes)}

    def _tables(self, name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Evidence (layers, scenes, words) by two equal networks, of the words that they say."""
        null, _, pair = name.partition(":")
        networks, views = [(self.model, self.processor)] * 2, [self._pictures(), self._pictures()]
        if null == "views":
            views = [self._pictures(np.random.default_rng((self.settings.seed, 3, side))) for side in range(2)]
        if null == "noise":
            generator = torch.Generator().manual_seed(int(pair))
            networks = [with_backbone(*network, disturbed(network[0].backbone, generator)) for network in networks]
        readings = [read_images([network], view)[0][0] for network, view in zip(networks, views, strict=True)]
        for reading in readings:
            describe_images(reading)
        words = said_words([text for reading in readings for text in reading.texts])
        first, second = (evidence_of_words(one, words, compared_layers(self.model, self.model)) for one in readings)
        return first, second, words

    def _pictures(self, rng: np.random.Generator | None = None) -> list[tuple[str, Image.Image]]:
        """Every scene, or a random crop of each."""
        pictures = []
        for number, scene in enumerate(self.world.scenes()):
            picture = Image.fromarray(scene.image)
            if rng is not None:
                left, top = rng.integers(0, picture.width - CROP + 1, 2).tolist()
                picture = picture.crop((left, top, left + CROP, top + CROP))
            pictures.append((str(number), picture))
        return pictures

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See the module's docstring."""
        scores: dict[str, dict[str, float]] = {}
        layers = len(compared_layers(self.model, self.model))
        for attribute in (key for key in rows if ":" not in key):
            lost = [word for words in rows[attribute][LOST].values() for word in words]
            hits = sum(word in ATTRIBUTE_WORDS[attribute] for word in lost)
            recall = hits / (layers * len(ATTRIBUTE_WORDS[attribute]))
            scores[attribute] = {"recall": recall} | ({"precision": hits / len(lost)} if lost else {})
        for null in NULLS:
            splits = [row for key, row in rows.items() if key.startswith(f"{null}:")]
            if splits:
                scores[null] = {
                    "quiet": float(np.mean([row["reported"] == 0 for row in splits])),
                    "certain": float(np.mean([row["certain"] == 0 for row in splits])),
                }
        return Evaluation(
            title="Differences between networks",
            scores=scores,
            dataset={"name": self.world.label, "size": self.settings.limit},
            settings={"steps": self.settings.steps, "splits": self.settings.splits, "level": LEVEL, "seed": self.settings.seed},
            details={"reported": {key: {one: row[one] for one in (LOST, GAINED)} for key, row in rows.items() if LOST in row}},
        )

    def text(self, evaluation: Evaluation) -> str:
        """The table, and the words that were reported."""
        lines = [f"{evaluation.dataset['name']}, {evaluation.dataset['size']} scenes", "", super().text(evaluation)]
        for attribute, found in evaluation.details["reported"].items():
            for verdict, by_layer in found.items():
                told = "; ".join(f"{layer}: {' '.join(sorted(words))}" for layer, words in by_layer.items() if words)
                lines += ["", f"without {attribute}, {verdict}: {told or 'nothing'}"]
        return "\n".join(lines)


__all__ = ["DifferenceEvaluator", "DifferenceSettings", "disturbed", "redrawn", "unlearn"]
