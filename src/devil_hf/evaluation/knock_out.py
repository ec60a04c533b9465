"""Knock-outs on the shapes world: do the channels that a word is read from carry the class that the word names?

The network of the shapes world has no head, so linear probes of its deepest layer, one per attribute word, are planted behind
it, fitted on other scenes (is there an object with that word?). For every word and each layer, the channels whose removal
lowers the evidence of "the WORD" most, over those of the other scenes that have it, are removed in the network, and the probe
of the word is read again.

* `fall`: of the logit of the word's probe, mean over the scenes that have it and over words; `fall_of_random`: mean size of the
  change when as many channels are removed at random; `ratio`: one over the other; `fall_of_least`: when the channels with the
  smallest drops, of either sign, are removed; `fall_of_others`: of the other probes.
* `significant`: share of words of which at most one in twenty random removals takes as much.
* `three_times`: share of words of which the logit falls at least three times as far as under random removals.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from devil_hf.data.shapes import ATTRIBUTE_WORDS, Scene
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import Evaluation
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.text.words import CARRIER
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.questions.knock_out import fit_probe, knock_out
from devil_hf.settings import option, read_layers
from devil_hf.statistics import Ratio, bootstrap_draws

KINDS = {word: kind for kind, words in ATTRIBUTE_WORDS.items() for word in words}
LEVEL, TIMES = 0.05, 3.0
CHOOSE = 100  # scenes, of those that there are
BESIDE = ("fall_of_random", "fall_of_least", "fall_of_others")


@dataclass(kw_only=True)
class KnockOutEvaluationSettings(EvaluationSettings):
    """What `devil evaluate knock-out` asks."""

    limit: int | None = option("scenes on which removals are judged, from the first on", 60)
    fit: int = option("scenes after those, on which the probes are fitted", 400, least=50)
    choose: int | None = option("of these, from the first on, those that choose channels (default: 100, or all)", None, least=20)
    others: int = option("scenes after those, whose mean takes the place of what is removed", 100, least=1)
    layers: list[str] | None = option("names or indices of layers in which is removed (default: every one)", None)
    number: int | None = option("channels to remove (default: one in twenty)", None, least=1)
    draws: int = option("random removals", 99, least=19)
    seed: int = option("of the world; 1 is held out in everything that this package trains", HELD_OUT_WORLD)
    batch_size: int = option("layers between two records", 1)
    output_dir: Path = option("rows, where a stopped run goes on, and scores.json", Path("devil-knock-out"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if self.limit is None or self.limit < 20:
            raise ValueError(f"--limit {self.limit}: at least 20 scenes are needed, so that each word is in some")
        if self.choose is not None and self.choose > self.fit:
            raise ValueError(f"--choose {self.choose}: there are {self.fit} scenes (--fit) to choose on; lower it")


@EVALUATORS.register("knock-out")
class KnockOutEvaluator(Evaluator):
    """What probes of words lose with the channels of the words."""

    name = "knock-out"
    summary = "remove the channels of words, and see which classes fall"
    example = "devil evaluate knock-out CHECKPOINT --layers layer3"
    Settings = KnockOutEvaluationSettings
    parallel = False
    unit = "layer"

    def open(self) -> Iterator[str]:
        """The layers, which the model names."""
        settings = self.settings
        self.world = World(settings.limit + settings.fit + settings.others, settings.seed)
        self.choose = min(CHOOSE, settings.fit) if settings.choose is None else settings.choose
        return self._layers()

    def _layers(self) -> Iterator[str]:
        known = self.model.layer_names
        for index in resolve_layers(read_layers(self.settings.layers, known), known):
            yield known[index]

    def decides(self) -> dict[str, Any]:
        """The world, and what is removed."""
        names = ("seed", "limit", "fit", "others", "number", "draws")
        return {"world": self.world.name, "choose": self.choose} | {name: getattr(self.settings, name) for name in names}

    def prepare(self) -> None:
        """Read the scenes, and fit the probes."""
        scenes = list(self.world.scenes())
        judged, fitted = self.settings.limit, self.settings.limit + self.settings.fit
        asked = judged + self.choose
        self.choosing = torch.arange(asked) >= judged
        truth = torch.tensor([[word in scene.words[kind] for word, kind in KINDS.items()] for scene in scenes])
        self.pixels, self.others = self._pixels(scenes[:asked]), self._pixels(scenes[fitted:])
        self.present = truth[:asked]
        self.probe = fit_probe(self.model, self._pixels(scenes[judged:fitted]), truth[judged:fitted])
        told = self.probe(self.model, self.pixels[:judged]).cpu() > 0
        self.right = float((told == self.present[:judged]).float().mean())

    def _pixels(self, scenes: Sequence[Scene]) -> torch.Tensor:
        return self.processor(images=[scene.image for scene in scenes], return_tensors="pt")["pixel_values"].to(self.model.device)

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Per layer and word: the fall, those of random removals, and those of other classes."""
        return [self._layer(layer) for layer in keys]

    def _layer(self, layer: str) -> dict[str, Any]:
        there = self.present[self.choosing].any(dim=0) & self.present[~self.choosing].any(dim=0)
        words = [word for at, word in enumerate(KINDS) if there[at]]
        found = knock_out(
            self.model,
            self.processor,
            self.pixels,
            [f"{CARRIER} {word}" for word in words],
            [list(KINDS).index(word) for word in words],
            self.probe,
            layer,
            self.others,
            number=self.settings.number,
            draws=self.settings.draws,
            present=self.present.T[there],
            choosing=self.choosing,
        )
        kept = ("fall", "least", "others", "p_value", "ratio")
        rows = {word: {name: getattr(one, name) for name in kept} for word, one in zip(words, found, strict=True)}
        for word, one in zip(words, found, strict=True):
            rows[word] |= {"random": float(one.random.abs().mean()), "removed": one.removed.tolist()}
        return rows

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See the module's docstring."""
        scores, intervals, beside = {}, {}, {}
        for layer, words in rows.items():
            found = list(words.values())
            fall, random = (np.array([one[name] for one in found]) for name in ("fall", "random"))
            ratio = Ratio(fall, random)
            scores[layer] = {
                "fall": float(fall.mean()),
                "ratio": ratio.value,
                "three_times": float(np.mean([one["ratio"] >= TIMES for one in found])),
                "significant": float(np.mean([one["p_value"] <= LEVEL for one in found])),
            }
            intervals[layer] = {"ratio": ratio.interval(bootstrap_draws(len(found), seed=0))}
            beside[layer] = {name: float(np.mean([one[name.removeprefix("fall_of_")] for one in found])) for name in BESIDE}
        left_out = {layer: len(KINDS) - len(words) for layer, words in rows.items()}  # in no scene that chooses, or is judged
        return Evaluation(
            title="Knock-outs",
            scores=scores,
            dataset={"name": self.world.label, "size": self.settings.limit},
            settings={"draws": self.settings.draws, "fit": self.settings.fit, "choose": self.choose, "phrase": f"{CARRIER} WORD"},
            details={
                "intervals": intervals,
                "beside": beside,
                "words": dict(rows),
                "left_out": left_out,
                "probes_right": self.right,
            },
        )

    def text(self, evaluation: Evaluation) -> str:
        """The table, and what stands beside it."""
        return (
            f"{evaluation.dataset['name']}, {evaluation.dataset['size']} scenes; probes right in "
            f"{evaluation.details['probes_right']:.3f} of cases\n\n{super().text(evaluation)}\n\n"
            f"{table(evaluation.details['beside'], BESIDE)}"
        )


__all__ = ["KnockOutEvaluationSettings", "KnockOutEvaluator"]
