"""`devil evaluate pairs`: does the image choose the true statement?

Of a true caption and a false one that differs little (SugarCrepe and its kind), the one with the higher score is chosen:
`accuracy`, chance .5, a tie is half right. Statements on their own (VSR and its kind) are ranked by their score: `auroc`, the
area under the ROC curve of the true ones, chance .5. By type of the false caption, or by relation.

Scores are sums over the tokens of a text. "all" and each layer alone have the evidence: log p(text | image) - log p(text |
nothing). "all, log p" is the first of the two without the second, and the control "null" the second alone: what the language
model prefers without any image. False captions are often less fluent, and their authors know it as the weakness of such sets; a
score that is not above this row knows nothing of the image. Texts are read as they stand; what the context has no room for is
cut. Intervals are of images drawn with replacement, 95 %.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from devil_hf.data.captioned import longest_description
from devil_hf.data.decoding import BadImage, read_picture
from devil_hf.data.identity import combined, image_identity
from devil_hf.data.statements import StatedImage, read_statements
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import CHANCE, CONTROLS, Evaluation
from devil_hf.evaluation.tables import SIGNED, table, with_interval
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.questions.phrases import unknown_phrases
from devil_hf.settings import option, read_layers
from devil_hf.statistics import Ratio, bootstrap_draws, interval, roc_area, roc_areas

logger = logging.get_logger(f"transformers.{__name__}")

ALL, PLAIN, NULL = "all", "all, log p", "null"
LONGEST = 512  # tokens of a text, where the language model's context has no end
ONE_KIND = "all statements are true, or all are false: there is nothing to tell apart"
FEWEST = 10  # pairs or statements of a type that is reported on its own


@dataclass(kw_only=True)
class PairsSettings(EvaluationSettings):
    """Statements, and of which images."""

    checkpoint: str = option("directory, Hub id, or name of a shipped one", positional=True)  # type: ignore[assignment]
    file: Path = option("JSON lines of pairs or statements, see devil_hf.data.statements", positional=True)
    images: Path | None = option("folder that the names of images are relative to (default: the file's)", None)
    split: str | None = option("only lines of this image_split, or split", None)
    layers: list[str] | None = option("names or indices of layers that are asked alone (default: every one)", None)
    seed: int = option("of intervals", 0)
    output_dir: Path = option("log-probabilities, where a stopped run goes on, and scores.json", Path("devil-pairs"))


@EVALUATORS.register("pairs")
class PairsEvaluator(Evaluator):
    """True and false statements about images."""

    name = "pairs"
    summary = "choose between true and false statements about images"
    example = "devil evaluate pairs CHECKPOINT sugarcrepe.jsonl --images coco --split val"
    Settings = PairsSettings

    def open(self) -> list[str]:
        """The names of the images."""
        settings = self.settings
        images = read_statements(settings.file, settings.images, settings.split)[: settings.limit]
        self.by_key = {one.key: one for one in images}
        self.paired = images[0].said[0].against is not None
        if not self.paired and len({said.true for one in images for said in one.said}) < 2:
            raise ValueError(f"{settings.file}: {ONE_KIND}")
        return list(self.by_key)

    def prepare(self) -> None:
        """Layers, which must be the model's."""
        known = self.model.layer_names
        asked = read_layers(self.settings.layers, known) or None
        self.layers = [known[index] for index in resolve_layers(asked, list(known))]

    def decides(self) -> dict[str, Any]:
        """The file by name, and the layers."""
        settings = self.settings
        named = {name: str(value) for name in ("images", "split") if (value := getattr(settings, name))}
        return {"file": str(settings.file), **named, "layers": self.layers}

    def identity(self, key: str) -> str | None:
        """Of the image, and of what is said of it."""
        one = self.by_key[key]
        return combined([image_identity(one.path), json.dumps([asdict(said) for said in one.said])])

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Per image what is `said` of it, each with `group`, `true` and, by row, the log-probabilities of its one or two texts in
        nats (NULL: without the image); for an image that cannot be used, its `problem`."""
        images, found = [self.by_key[key] for key in keys], dict[str, dict[str, Any]]()
        pictures: dict[str, Any] = {}
        for one in images:
            try:
                pictures[one.key] = read_picture(lambda path=one.path: path)  # type: ignore[misc]
            except BadImage as error:
                found[one.key] = _problem(one, f"broken image ({error})")
        if pictures:
            pixels = self.processor(images=list(pictures.values()), return_tensors="pt")["pixel_values"]
            features = self.model.extract_features(pixels)
            asked = [self.model.ask(feature_maps=features, layers=layers) for layers in (None, *self.layers)]
            null = self.model.null_prefix()
            for at, key in enumerate(pictures):
                prefixes = torch.cat([null, *(prefix[at : at + 1].to(null) for prefix in asked)])
                found[key] = self._scored(self.by_key[key], prefixes)
        return [found[key] for key in keys]

    def _scored(self, image: StatedImage, prefixes: torch.Tensor) -> dict[str, Any]:
        known = [said for said in image.said if not unknown_phrases(self.processor, (said.text, said.against or said.text))]
        left_out = {"unknown": len(image.said) - len(known)} if len(known) < len(image.said) else {}
        if not known:
            return {"said": [], **left_out}
        texts = [text for said in known for text in (said.text, said.against) if text is not None]
        room = longest_description(self.model, LONGEST)
        try:
            tokens = self.processor(text=texts, max_length=room, return_tensors="pt")
            scores = self.model.score_prefix(prefixes, tokens).sum(dim=-1).cpu()
        except ValueError as error:
            return _problem(image, f"texts that the language model does not read ({error})")
        each = iter(scores.T.tolist())  # by text, then by prefix
        rows = []
        for said in known:
            values = [next(each) for text in (said.text, said.against) if text is not None]
            by_row = dict(zip((NULL, ALL, *self.layers), map(list, zip(*values, strict=True)), strict=True))
            rows.append({"group": said.group, "true": said.true, "log_probs": by_row})
        return {"said": rows, **left_out}

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See the module's docstring."""
        settings, bad = self.settings, [row["problem"] for row in rows.values() if "problem" in row]
        used = [row["said"] for row in rows.values() if row["said"]]
        if not used:
            why = bad[0] if bad else "their texts hold words that this checkpoint's language model does not know"
            raise ValueError(f"none of {len(rows)} images can be used; the first: {why}")
        judged = (PairScores if self.paired else StatementScores)(used, settings.seed)
        names = (ALL, PLAIN, *self.layers)
        lines, unknown = sum(map(len, used)), sum(row.get("unknown", 0) for row in rows.values())
        return Evaluation(
            title="Pairs of statements" if self.paired else "True and false statements",
            scores={name: judged.values(name) for name in names},
            controls={NULL: judged.values(NULL), CHANCE: dict.fromkeys(judged.values(NULL), 0.5)},
            dataset={"name": settings.file.stem, "split": settings.split, "size": len(used)},
            settings={
                "seed": settings.seed,
                "pairs" if self.paired else "statements": lines,
                "bad_images": len(bad),
                "unknown": unknown,
            },
            details={
                "intervals": {name: judged.intervals(name) for name in (*names, NULL)},
                "counts": judged.counts,
                "lead": {name: judged.lead(name) for name in (PLAIN, NULL)},
            },
        )

    def text(self, evaluation: Evaluation) -> str:
        """Scores of every type, a row each; then what they are of."""
        details, kept = evaluation.details, evaluation.scores | evaluation.controls
        turned = {metric: {name: row[metric] for name, row in kept.items() if metric in row} for metric in evaluation.metrics}
        spans = {metric: {name: row.get(metric) for name, row in details["intervals"].items()} for metric in turned}
        named = {metric: f"{metric.replace('_', ' ')} ({details['counts'][metric]})" for metric in turned}
        shown = {metric: {CONTROLS.get(name, name): value for name, value in row.items()} for metric, row in turned.items()}
        spans = {metric: {CONTROLS.get(name, name): span for name, span in row.items()} for metric, row in spans.items()}
        lines = [table(shown, list(next(iter(shown.values()))), intervals=spans, names=named)]
        for name, lead in details["lead"].items():
            if lead is not None:
                value, *span = lead
                lines.append(f"evidence over {CONTROLS.get(name, name)}: {with_interval(value, span, SIGNED)}")
        if bad := evaluation.settings["bad_images"]:
            lines.append(f"{bad} images could not be used and are left out; {self.records_file} names them")
        if unknown := evaluation.settings["unknown"]:
            lines.append(f"{unknown} lines hold words that the language model does not know, and are left out")
        return "\n".join(lines)


def _problem(image: StatedImage, problem: str) -> dict[str, Any]:
    logger.warning(f"{image.key} is left out: {problem}")
    return {"said": [], "problem": problem}


class PairScores:
    """How often the true one of two texts is chosen, by row of the table and type of the false one.

    Args:
        images: what is said of each, see `PairsEvaluator.rows`.
        seed: of the draws.
    """

    metric = "accuracy"

    def __init__(self, images: Sequence[Sequence[Mapping[str, Any]]], seed: int = 0):
        self.said = [one for said in images for one in said]
        self.image = np.repeat(np.arange(len(images)), [len(said) for said in images])
        self.draws = bootstrap_draws(len(images), seed=seed)
        groups = np.array([one["group"] for one in self.said])
        every = {self.metric: np.ones(len(groups), dtype=bool)}
        named = {f"{self.metric}_{group.replace(' ', '_')}": groups == group for group in sorted({*groups.tolist()} - {""})}
        self.members = every | {name: own for name, own in named.items() if own.sum() >= FEWEST}

    @property
    def counts(self) -> dict[str, int]:
        """Metric -> how many it is of."""
        return {name: int(own.sum()) for name, own in self.members.items()}

    def scored(self, name: str) -> np.ndarray:
        """The scores of the texts (N, 2) or (N, 1) under a row of the table."""
        own = np.array([one["log_probs"][ALL if name == PLAIN else name] for one in self.said])
        if name in (PLAIN, NULL):
            return own
        return own - np.array([one["log_probs"][NULL] for one in self.said])

    def values(self, name: str) -> dict[str, float]:
        """Metric -> value of a row."""
        return {metric: self._ratio(name, own).value for metric, own in self.members.items()}

    def intervals(self, name: str) -> dict[str, tuple[float, float] | None]:
        """Metric -> (low, high)."""
        return {metric: self._ratio(name, own).interval(self.draws) for metric, own in self.members.items()}

    def lead(self, name: str) -> tuple[float, float, float] | None:
        """What the evidence of all layers has over another row, of everything, with its paired interval."""
        own, other = (self._ratio(one, self.members[self.metric]) for one in (ALL, name))
        span = own.interval(self.draws, less=other)
        return span and (own.value - other.value, *span)

    def _ratio(self, name: str, own: np.ndarray) -> Ratio:
        true, false = self.scored(name).T
        right = np.where(true == false, 0.5, true > false)
        images = self.draws.shape[1]
        return Ratio(np.bincount(self.image, right * own, images), np.bincount(self.image, own, images))


class StatementScores(PairScores):
    """How well scores tell true statements from false ones, by row of the table and relation; of the relations that have both."""

    metric = "auroc"

    def __init__(self, images: Sequence[Sequence[Mapping[str, Any]]], seed: int = 0):
        super().__init__(images, seed)
        self.true = np.array([one["true"] for one in self.said])
        self.members = {name: own for name, own in self.members.items() if len({*self.true[own].tolist()}) == 2}
        if not self.members:
            raise ValueError(ONE_KIND)

    def values(self, name: str) -> dict[str, float]:
        """Metric -> value of a row."""
        scored = self.scored(name)[:, 0]
        return {metric: roc_area(scored[own], self.true[own]) for metric, own in self.members.items()}

    def intervals(self, name: str) -> dict[str, tuple[float, float] | None]:
        """Metric -> (low, high)."""
        return {metric: interval(self._drawn(name, own)) for metric, own in self.members.items()}

    def lead(self, name: str) -> tuple[float, float, float] | None:
        """What the evidence of all layers has over another row, of everything, with its paired interval."""
        everything = self.members[self.metric]
        span = interval(self._drawn(ALL, everything) - self._drawn(name, everything))
        return span and (self.values(ALL)[self.metric] - self.values(name)[self.metric], *span)

    def _drawn(self, name: str, own: np.ndarray) -> np.ndarray:
        return roc_areas(self.scored(name)[own, 0], self.true[own], self.draws[:, self.image[own]])


__all__ = ["PairScores", "PairsEvaluator", "PairsSettings", "StatementScores"]
