"""`devil evaluate regions`: what is said of a region of an image, against what people call it.

Each region is described by all layers together and by each alone: features are read once per image, and all regions of a batch of
images are decoded together. Beside them stand the description of the whole image, taken for that of each of its regions, the
language model alone (the null prefix), and the descriptions of regions of other images.

* `head_word`: the head word of the description is that of any phrase of the region (`text/head_words.py` has the rule);
* `cider`, `rouge_l`, `bleu_N`: against the phrases, as the field computes them for captions. Phrases are two or three words long:
  BLEU-3 and BLEU-4 say little, and rarities among the phrases of all regions weigh most in CIDEr.

Intervals are of images drawn with replacement, 95 %; differences to what stands beside are paired.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from devil_hf.data.captioned import longest_description
from devil_hf.data.decoding import BadImage, read_picture
from devil_hf.data.identity import combined, image_identity, region_identity
from devil_hf.data.objects import open_localised
from devil_hf.data.objects.masks import draw_region
from devil_hf.data.worlds import parse_world
from devil_hf.evaluation.captions import ONE_IMAGE
from devil_hf.evaluation.evaluator import EVALUATORS, Evaluator
from devil_hf.evaluation.results import CONTROLS, Evaluation, metric_name
from devil_hf.evaluation.sources import ObjectSettings
from devil_hf.evaluation.tables import SIGNED, table, with_interval
from devil_hf.evaluation.text.head_words import head_word
from devil_hf.evaluation.text.ngrams import CiderD, bleu_counts, bleu_of, rouge_l
from devil_hf.evaluation.text.standard import NO_CIDER
from devil_hf.evaluation.text.tokens import ptb_tokens
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.settings import option, read_layers
from devil_hf.statistics import Ratio, bootstrap_draws, interval

logger = logging.get_logger(f"transformers.{__name__}")

ALL, WHOLE = "all", "whole image"
EVERY = "all regions"
HEAD_WORD = "head_word"
SHOWN = (HEAD_WORD, "cider", "rouge_l", "bleu_1", "bleu_4")  # to people
COLUMNS = (HEAD_WORD, "cider", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4")


@dataclass(kw_only=True)
class RegionsSettings(ObjectSettings):
    """Regions with names, and how they are described."""

    layers: list[str] | None = option("names or indices of layers that are asked alone (default: every one)", None)
    num_beams: int = option("1 is greedy", 1, least=1)
    max_new_tokens: int = option("at most so many tokens", 20, least=1)
    batch_size: int = option("images at once, per process", 16)
    seed: int = option("of the shuffled control and of intervals", 0)
    output_dir: Path = option("descriptions, where a stopped run goes on, and scores.json", Path("devil-regions"))


@EVALUATORS.register("regions")
class RegionsEvaluator(Evaluator):
    """Descriptions of regions against their phrases."""

    name = "regions"
    summary = "score descriptions of regions against what people call them"
    example = "devil evaluate regions CHECKPOINT flickr8k:val --limit 100"
    Settings = RegionsSettings
    records_file = "descriptions.jsonl"

    def open(self) -> list[str]:
        """The keys of the images."""
        settings = self.settings
        examples = open_localised(settings.source, settings.images, settings.names)[: settings.limit]
        self.by_key = {one.key: one for one in examples}
        return list(self.by_key)

    def prepare(self) -> None:
        """Layers, which must be the model's, and what the language model says alone."""
        settings, known = self.settings, self.model.layer_names
        asked = read_layers(settings.layers, known) or None
        self.layers = [known[index] for index in resolve_layers(asked, list(known))]
        tokens = longest_description(self.model, settings.max_new_tokens)
        self.generation = {"num_beams": settings.num_beams, "max_new_tokens": tokens}
        self.alone = self._said(self.model.null_prefix())[0]

    def decides(self) -> dict[str, Any]:
        """The data by name, the layers, and how is decoded."""
        settings = self.settings
        named = {name: str(value) for name in ("images", "names") if (value := getattr(settings, name))}
        return {"source": settings.source, **named, "layers": self.layers, "generation": self.generation}

    def identity(self, key: str) -> str | None:
        """Of the image, its phrases, and where they are; scenes are known by their names."""
        if parse_world(self.settings.source):
            return None
        one, masks = self.by_key[key], dict[str, str]()
        shown = [[each.phrases, each.group, region_identity(one.place(each.parts), masks)] for each in one.regions]
        return combined([image_identity(one.read()), json.dumps(shown)])

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Per image its `regions` in the crop, each with `phrases`, `group` and what is `said` by row, and what is said of the
        `whole`; the number `out_of_sight`; for an image that cannot be used, its `problem`."""
        found: list[dict[str, Any]] = []
        pictures, masks = [], []
        for key in keys:
            row: dict[str, Any] = {"regions": [], "whole": "", "out_of_sight": 0}
            found.append(row)
            try:
                picture, drawn = self._read(key)
            except (OSError, ValueError) as error:
                what = "broken image" if isinstance(error, BadImage) else "broken region"
                row["problem"] = f"{what} ({' '.join(str(error).split()):.300})"
                logger.warning(f"{key} is left out: {row['problem']}")
                continue
            seen = [(each, mask) for each, mask in zip(self.by_key[key].regions, drawn, strict=True) if (mask >= 0.5).any()]
            row["out_of_sight"] = len(drawn) - len(seen)
            if seen:
                row["regions"] = [{"phrases": list(each.phrases), "group": each.group} for each, _ in seen]
                pictures.append(picture)
                masks.append(torch.stack([mask for _, mask in seen]))
        if pictures:
            self._describe([row for row in found if row["regions"]], pictures, masks)
        return found

    def _read(self, key: str) -> tuple[Any, Tensor]:
        """The picture, and the masks of all of its regions in the crop, (R, H, W)."""
        example = self.by_key[key]
        picture = read_picture(example.read)
        size = (picture.height, picture.width)
        drawn = [draw_region(example.place(one.parts), size) for one in example.regions]
        return picture, self.processor.masks_to_regions([np.stack(drawn)])[0]

    def _describe(self, rows: Sequence[dict[str, Any]], pictures: Sequence[Any], masks: Sequence[Tensor]) -> None:
        """Write into rows what is said of their regions; every image is read once, and everything is decoded together."""
        model = self.model
        features = model.extract_features(self.processor(images=list(pictures), return_tensors="pt")["pixel_values"])
        regions = torch.nn.utils.rnn.pad_sequence(list(masks), batch_first=True)  # (B, R, H, W): empty ones behind
        asked = torch.cat([torch.arange(regions.shape[1]) < len(one) for one in masks])
        names = {ALL: None, **{name: name for name in self.layers}}
        prefixes = [model.ask(layers=layers, regions=regions, feature_maps=features) for layers in names.values()]
        of_regions = [prefix[asked.to(prefix.device)] for prefix in prefixes]
        texts = iter(self._said(torch.cat([*of_regions, model.ask(feature_maps=features)])))
        flat = [one for row in rows for one in row["regions"]]
        for name in names:
            for one in flat:
                one.setdefault("said", {})[name] = next(texts)
        for row in rows:
            row["whole"] = next(texts)

    def _said(self, prefix: Tensor) -> list[str]:
        ids = self.model.decode(prefix, **self.generation)
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See the module's docstring."""
        settings, used = self.settings, [row for row in rows.values() if row["regions"]]
        bad = [row["problem"] for row in rows.values() if "problem" in row]
        if not used:
            raise ValueError(f"no region of {len(rows)} images can be described{f'; the first: {bad[0]}' if bad else ''}")
        said, missing = _texts(used, self.alone, settings.seed)
        judged = RegionScores(used, said, settings.seed)
        self.judged = judged
        scores = {name: judged.values(EVERY, name) for name in (ALL, *self.layers)}
        for name, row in scores.items():
            row |= {f"{HEAD_WORD}_{group}": judged.values(group, name)[HEAD_WORD] for group in judged.groups[1:]}
        world = parse_world(settings.source)
        left_out = {"out_of_sight": sum(row["out_of_sight"] for row in rows.values()), "bad_images": len(bad)}
        return Evaluation(
            title="Descriptions of regions",
            scores=scores,
            controls={name: judged.values(EVERY, name) for name in ("shuffled", "null") if name in said},
            dataset={"name": world.label if world else settings.source, "size": len(used)},
            settings={"seed": settings.seed, "regions": len(judged.references), **left_out, **self.generation},
            missing=missing | ({} if judged.cider.defined else {"cider": NO_CIDER}),
            details={
                "baselines": {WHOLE: judged.values(EVERY, WHOLE)},
                "groups": {group: {name: judged.values(group, name) for name in said} for group in judged.groups},
                "intervals": {group: {name: judged.intervals(group, name) for name in said} for group in judged.groups},
                "counts": {group: int(judged.members[group].sum()) for group in judged.groups},
                "lead": {name: judged.lead(name) for name in said if name not in scores},
                "texts": {"null": self.alone},
            },
        )

    def text(self, evaluation: Evaluation) -> str:
        """A table per group of regions, then how far all layers are ahead of what stands beside them."""
        details, lines = evaluation.details, []
        for group, rows in details["groups"].items():
            lines += [f"{group}: {details['counts'][group]}"]
            lines += [table(rows, SHOWN, intervals=details["intervals"][group], names=CONTROLS), ""]
        for name, lead in details["lead"].items():
            ahead = [f"{metric_name(m)} {with_interval(value, span, SIGNED)}" for m, (value, *span) in lead.items()]
            lines += [f"all layers of the region over {CONTROLS.get(name, name)}: {', '.join(ahead)}"] if ahead else []
        noted = [f"{evaluation.settings[name]} {name.replace('_', ' ')}" for name in ("out_of_sight", "bad_images")]
        return "\n".join([*lines, f"language model alone: {self.alone!r}; left out: {', '.join(noted)}"])


def _texts(rows: Sequence[dict[str, Any]], alone: str, seed: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Row -> what it says of every region; and what is missing, with the reason."""
    regions = [one["said"] for row in rows for one in row["regions"]]
    said = {name: [one[name] for one in regions] for name in regions[0]}
    said[WHOLE] = [row["whole"] for row in rows for _ in row["regions"]]
    missing = {}
    if len(rows) > 1:
        order = np.random.default_rng(seed).permutation(len(rows))
        partner = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
        others = [rows[partner[at]]["regions"] for at in range(len(rows))]
        pairs = zip(rows, others, strict=True)
        said["shuffled"] = [other[at % len(other)]["said"][ALL] for row, other in pairs for at in range(len(row["regions"]))]
    else:
        missing["shuffled"] = ONE_IMAGE
    return said | {"null": [alone] * len(regions)}, missing


class RegionScores:
    """Scores of what several rows say of the same regions, by group of regions, with intervals from one set of draws.

    Args:
        rows: of images with regions.
        said: row of the table -> a text for each region.
        seed: of the draws.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], said: Mapping[str, Sequence[str]], seed: int = 0):
        regions = [one for row in rows for one in row["regions"]]
        self.image = np.repeat(np.arange(len(rows)), [len(row["regions"]) for row in rows])
        self.draws = bootstrap_draws(len(rows), seed=seed)
        groups = [one["group"] for one in regions]
        by_size = sorted(set(groups), key=lambda group: (-groups.count(group), group))
        by_size = by_size if len(by_size) > 1 else []  # one alone is all of them
        self.groups = [EVERY, *by_size]
        self.members = {EVERY: np.ones(len(regions))} | {group: np.array([g == group for g in groups]) * 1.0 for group in by_size}
        self.references = [[ptb_tokens(phrase) for phrase in one["phrases"]] for one in regions]
        self.heads = [{head_word(phrase) for phrase in one["phrases"]} - {None} for one in regions]
        self.cider = CiderD(self.references)
        self.each = {name: self._of_regions(texts) for name, texts in said.items()}

    @cached_property
    def _images(self) -> np.ndarray:
        """(images, regions), which region is of which image."""
        return (np.arange(self.draws.shape[1])[:, None] == self.image) * 1.0

    def _of_regions(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Metric -> (regions,), or (regions, 10) counts of BLEU."""
        tokens = [ptb_tokens(text) for text in texts]
        found = {
            HEAD_WORD: np.array([head_word(text) in heads for text, heads in zip(texts, self.heads, strict=True)], dtype=float),
            "rouge_l": np.array(rouge_l(tokens, self.references)),
            "bleu": bleu_counts(tokens, self.references),
        }
        return found | ({"cider": np.array(self.cider(tokens))} if self.cider.defined else {})

    def _ratio(self, group: str, name: str, metric: str) -> Ratio:
        members = self.members[group]
        return Ratio(self._images @ (self.each[name][metric] * members), self._images @ members)

    def _means(self, name: str) -> list[str]:
        return [metric for metric in COLUMNS if metric in self.each[name]]

    def _bleu_sums(self, group: str, name: str) -> np.ndarray:
        return self._images @ (self.each[name]["bleu"] * self.members[group][:, None])

    def values(self, group: str, name: str) -> dict[str, float]:
        """Metric -> value of a row of the table, over the regions of a group."""
        means = {metric: self._ratio(group, name, metric).value for metric in self._means(name)}
        bleu = bleu_of(self._bleu_sums(group, name).sum(axis=0)).tolist()
        return means | {f"bleu_{n}": value for n, value in enumerate(bleu, 1)}

    def intervals(self, group: str, name: str) -> dict[str, tuple[float, float] | None]:
        """The same with (low, high); None where fewer than two images have such regions."""
        spans = {metric: self._ratio(group, name, metric).interval(self.draws) for metric in self._means(name)}
        sums = self._bleu_sums(group, name)
        several = np.count_nonzero(sums[:, -1]) > 1
        drawn = bleu_of(self.draws @ sums)
        return spans | {f"bleu_{n}": interval(drawn[:, n - 1]) if several else None for n in range(1, drawn.shape[1] + 1)}

    def lead(self, name: str) -> dict[str, tuple[float, float, float]]:
        """Metric -> what all layers have over another row, and the paired interval; of means, and where it is defined."""
        found = {}
        for metric in self._means(name):
            own, other = (self._ratio(EVERY, one, metric) for one in (ALL, name))
            if span := own.interval(self.draws, less=other):
                found[metric] = (own.value - other.value, *span)
        return found


__all__ = ["RegionScores", "RegionsEvaluator", "RegionsSettings"]
