"""Word evidence on the shapes world, where the object of every word is known.

Each scene is described by all layers together, greedily, and every colour, texture and shape word of that sentence is explained
in its context. A word belongs to the noun phrase that ends with the next shape word; the phrase is true of an object that has all
of its words, and is left out (and counted) where no object, or more than one, has them.

* `auroc`: how well evidence tells true words from false ones, area under the ROC curve: a word of the sentence that some object
  has, against the words of its class in its place that no object has.
* `pointing`: is the maximum of the word's map on the object that its phrase is about (half a cell of tolerance).
* `swapped`: evidence of the sentence, in nats, and what is left of it with the features of the next scene; the p-value is of the
  paired permutation test over scenes that takes the sign of each difference at random.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devil_hf.data.shapes import ATTRIBUTE_WORDS, Scene
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.maps.pointing import chance_pointing, pointing
from devil_hf.evaluation.results import CHANCE, Evaluation
from devil_hf.model.explaining_devil import INFORMED
from devil_hf.questions.word_evidence import SentenceEvidence, explain_words
from devil_hf.settings import option
from devil_hf.statistics import Ratio, bootstrap_draws, interval, roc_area, sign_flip

KINDS = {word: kind for kind, words in ATTRIBUTE_WORDS.items() for word in words}
ALL = "all"


@dataclass(kw_only=True)
class WordsSettings(EvaluationSettings):
    """What `devil evaluate words` asks."""

    limit: int | None = option("scenes, from the first on", 200)
    seed: int = option("of the world; 1 is held out in everything that this package trains", HELD_OUT_WORLD)
    batch_size: int = option("scenes between two records, per process", 4)
    output_dir: Path = option("rows, where a stopped run goes on, and scores.json", Path("devil-words"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if self.limit is None or self.limit < 2:
            raise ValueError(f"--limit {self.limit}: at least 2 scenes are needed, to swap their features")


@dataclass(frozen=True)
class Mention:
    """An attribute word of a sentence.

    Args:
        at: its number among the sentence's words.
        text, kind: the word and its class.
        object: of the scene that its noun phrase is about; None where none, or more than one, fits.
    """

    at: int
    text: str
    kind: str
    object: int | None


def mentions(words: Sequence[str], scene: Scene) -> list[Mention]:
    """The attribute words of a sentence, with the objects that they are about."""
    found: list[Mention] = []
    phrase: list[int] = []
    for at, word in enumerate(words):
        if word in KINDS:
            phrase.append(at)
        if KINDS.get(word) == "shape":
            wanted = {KINDS[words[one]]: words[one] for one in phrase}
            fitting = [n for n, item in enumerate(scene.objects) if wanted.items() <= item.attributes.items()]
            about = fitting[0] if len(fitting) == 1 else None
            found += [Mention(one, words[one], KINDS[words[one]], about) for one in phrase]
            phrase = []
    return found


@EVALUATORS.register("words")
class WordsEvaluator(Evaluator):
    """Evidence, layers and places of the words of generated sentences."""

    name = "words"
    summary = "score the evidence and the places of the words of sentences about shapes"
    example = "devil evaluate words CHECKPOINT --limit 200"
    Settings = WordsSettings
    unit = "scene"

    def open(self) -> list[str]:
        """Scenes of the world."""
        self.world = World(self.settings.limit, self.settings.seed)
        return [str(index) for index in range(self.settings.limit)]

    def decides(self) -> dict[str, Any]:
        """The world, and how maps are combined."""
        return {"world": self.world.name, "seed": self.settings.seed, "informed": INFORMED}

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Per scene its words, their evidence beside false ones, their hits, and the sentence with other features."""
        scenes = [self.world.scene(int(key)) for key in keys]
        nexts = [self.world.scene((int(key) + 1) % self.settings.limit) for key in keys]
        features, others = (self._features(one) for one in (scenes, nexts))
        explained = explain_words(self.model, self.processor, feature_maps=features)
        rows = []
        for index, (scene, found) in enumerate(zip(scenes, explained, strict=True)):
            own = [maps[index : index + 1] for maps in features]
            other = self.model.ask(feature_maps=[maps[index : index + 1] for maps in others])
            sentence = self.processor(text=[found.text], return_tensors="pt")
            given, null = self.model.score_prefix(torch.cat([other, self.model.null_prefix()]), sentence).sum(dim=(1, 2)).tolist()
            about = mentions([word.text for word in found.words], scene)
            row = {"text": found.text, "evidence": found.evidence, "swapped": given - null}
            rows.append(row | {"words": self._words(found, about, scene, own)})
        return rows

    def _features(self, scenes: Sequence[Scene]) -> list[Tensor]:
        pixels = self.processor(images=[scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
        return [maps for maps in self.model.extract_features(pixels) if maps is not None]

    def _words(self, found: SentenceEvidence, about: Sequence[Mention], scene: Scene, own: list[Tensor]) -> list[dict[str, Any]]:
        maps = {name: one[0] for name, one in found.maps.maps.items()} | found.by_layer
        rows = []
        for mention in about:
            row: dict[str, Any] = {"text": mention.text, "kind": mention.kind, "object": mention.object}
            row["evidence"] = self._against_false(found, mention, scene, own)
            if mention.object is not None and (mask := scene.masks[mention.object]).any():
                row["hits"] = {name: pointing(one[mention.at].numpy(), mask) for name, one in maps.items()}
                row["chance"] = {name: chance_pointing((one.shape[-2], one.shape[-1]), mask) for name, one in maps.items()}
            rows.append(row)
        return rows

    def _against_false(self, found: SentenceEvidence, mention: Mention, scene: Scene, own: list[Tensor]) -> dict[str, Any]:
        """By layer: [evidence of the word, where the scene has it; evidence of the words of its class that it has not]."""
        before = " ".join(word.text for word in found.words[: mention.at])
        false = [word for word in ATTRIBUTE_WORDS[mention.kind] if word not in scene.words[mention.kind]]
        asked = [mention.text, *false]
        phrases = self.processor(text=asked, carrier=before or None, return_tensors="pt")
        prefixes = [self.model.null_prefix(), self.model.ask(feature_maps=own)]
        prefixes += [self.model.ask(feature_maps=own, layers=name) for name in self.model.layer_names]
        scores = self.model.score_prefix(torch.cat(prefixes), phrases).sum(dim=-1).cpu()
        evidence = (scores[1:] - scores[0]).tolist()
        true = mention.text in scene.words[mention.kind]
        names = (ALL, *self.model.layer_names)
        return {name: {"true": one[:1] if true else [], "false": one[1:]} for name, one in zip(names, evidence, strict=True)}

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See the module's docstring."""
        words = [(scene, word) for scene, row in enumerate(rows.values()) for word in row["words"]]
        draws = bootstrap_draws(len(rows), seed=0)
        scores: dict[str, dict[str, float]] = {}
        chance: dict[str, float] = {}
        intervals: dict[str, dict[str, Any]] = {}
        for kind in ATTRIBUTE_WORDS:
            chosen = [(scene, word) for scene, word in words if word["kind"] == kind]
            for name in chosen[0][1]["evidence"] if chosen else ():
                values = [(v, truth) for _, w in chosen for truth in ("true", "false") for v in w["evidence"][name][truth]]
                area = roc_area([value for value, _ in values], [truth == "true" for _, truth in values])
                if area == area:  # of true and false words, both
                    scores.setdefault(name, {})[f"auroc_{kind}"] = area
            placed = [(scene, word) for scene, word in chosen if "hits" in word]
            for name in placed[0][1]["hits"] if placed else ():
                hits = [(scene, word["hits"][name]) for scene, word in placed]
                mean = _by_scene(hits, len(rows))
                scores.setdefault(name, {})[f"pointing_{kind}"] = mean.value
                intervals.setdefault(name, {})[f"pointing_{kind}"] = interval(mean.over(draws))
            if placed:
                chance[f"pointing_{kind}"] = _by_scene([(s, w["chance"]["shown"]) for s, w in placed], len(rows)).value
        own, swapped = (np.array([row[name] for row in rows.values()]) for name in ("evidence", "swapped"))
        scores.setdefault(ALL, {}).update(evidence=float(own.mean()), swapped=float(swapped.mean()))
        return Evaluation(
            title="Words of sentences",
            scores=scores,
            controls={CHANCE: chance},
            dataset={"name": self.world.label, "size": len(rows)},
            settings={"decoding": "greedy", "seed": self.settings.seed, "tolerance": "half a cell of a map's own grid"},
            details={
                "intervals": intervals,
                "p_value": sign_flip(own - swapped, seed=0),
                "words": len(words),
                "left_out": sum(word["object"] is None for _, word in words),
            },
        )

    def text(self, evaluation: Evaluation) -> str:
        """The table, and what stands beside it."""
        details = evaluation.details
        return (
            f"{evaluation.dataset['name']}, {evaluation.dataset['size']} scenes, {details['words']} words; "
            f"{details['left_out']} of phrases that fit no object alone\n\n{super().text(evaluation)}\n\n"
            f"evidence of a sentence with its own features against the next scene's: p = {details['p_value']:.4f}"
        )


def _by_scene(values: Sequence[tuple[int, float]], scenes: int) -> Ratio:
    """The mean over words of (scene, value), with scenes as the unit of its interval."""
    at = np.array([scene for scene, _ in values])
    return Ratio(np.bincount(at, [value for _, value in values], scenes), np.bincount(at, minlength=scenes).astype(float))


__all__ = ["Mention", "WordsEvaluator", "WordsSettings", "mentions"]
