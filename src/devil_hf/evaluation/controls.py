"""Controls: is it the features that speak, or the language model?

Each control takes the features away in another way, and everything is measured again, on the same images, greedily, with all
layers together:

* `backbone_randomised`: random weights in the backbone, from the deepest stage down to all of them (`randomise.py`); only the
  last step has to fail, since shallower features that are left may still speak;
* `shuffled`: the features of another image;
* `null`: the null prefix, every layer hidden; its evidence is 0 by definition, its maps are flat;
* `constant`: one text for every image, of the 20 most frequent descriptions and captions the one with the best CIDEr, chosen
  with the captions in hand; its evidence is that of this text under each image's own features;
* `untrained`: a translator of the same shape with random weights, measured against its own null prefix.

Metrics, all with 95 % intervals of a bootstrap over images: CIDEr-D and ROUGE-L of descriptions, in
the shapes world the F1 of colour, texture and shape words; the evidence of the true captions in nats per token over the null
prefix; and the rank correlation (Spearman) of attribution maps with those of the intact model, per image, layer and phrase that
is true of the image. BLEU is a ratio of the whole corpus and comes without interval.

The explainer may be trusted if, for every control, the paired difference of intact and control in CIDEr (in the shapes world of
word F1, too) and in evidence lies above the margin with its whole interval (`MARGINS`), and the maps' correlation with the
intact ones lies below `MAP_CORRELATION_LIMIT` with its whole interval. A description that does not owe its words to the
features cannot pass; one that does, passes whatever its quality.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from devil_hf.data.captioned import CaptionedImages
from devil_hf.data.shapes import ATTRIBUTE_WORDS
from devil_hf.evaluation.milan import null_label
from devil_hf.evaluation.randomise import randomised_backbone, untrained_translator, weight_stages
from devil_hf.evaluation.records import Records
from devil_hf.evaluation.results import CONTROLS, fingerprint
from devil_hf.evaluation.statistics import Ratio, bootstrap_draws, interval
from devil_hf.evaluation.text.metrics import BLEU
from devil_hf.evaluation.text.ngrams import CiderD, bleu, rouge_l
from devil_hf.evaluation.text.tokens import ptb_tokens
from devil_hf.evaluation.text.words import CARRIER, words_of
from devil_hf.model.backbone_devil import weights_hash
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.model.processing_devil import DevilProcessor

INTACT = "all"  # as results name all layers together
MARGINS = {"cider": 0.01, "word_f1": 0.05, "evidence": 0.02}
MAP_CORRELATION_LIMIT = 0.5
FLAT = 1e-3  # nats per token: a map that differs by less from place to place says nothing
STATISTICS_BATCH = 32  # images at once when the statistics of random batch norms are estimated
MAP_PLACES = 256  # layers with more locations are left out of the maps unless asked for
WORDS = {word for words in ATTRIBUTE_WORDS.values() for word in words}
CONSTANTS = 20
UNTRUSTED = 3  # exit code; 1 is an error, 2 a wrong command line
# Too frequent in English captions to point at anything.
STOP_WORDS = words_of(
    "a an the and or of in on at to with from by for is are was be been being it its his her their he she they this that there "
    "as into onto over up down out off through while who which one two three some other another each near next front"
)


@dataclass
class Measured:
    """What one condition gave: a text, an evidence in nats per token and a mean map correlation per image, NaN if there is none.

    `by_layer` has the mean map correlation of each layer.
    """

    texts: list[str]
    evidence: np.ndarray
    correlation: np.ndarray
    by_layer: dict[str, float] = field(default_factory=dict)


def run_controls(
    model: DevilModel,
    processor: DevilProcessor,
    data: CaptionedImages,
    output_dir: str | PathLike,
    *,
    phrases: Sequence[str] | None = None,
    layers: Sequence[str | int] | None = None,
    map_images: int = 50,
    max_new_tokens: int = 30,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the intact model and every control, and judge.

    Texts and evidence go to `output_dir/controls.jsonl` as they come, maps to `output_dir/maps/`, the result to
    `output_dir/controls.json`; a run that was stopped goes on.

    Args:
        phrases: words to map; default: the attributes of the shapes world, else the twelve nouns and adjectives (any words
            but the commonest) that the captions of most images have. Each is mapped on the images whose captions have it.
        layers: layers to map; default: those with at most 256 locations.
        map_images: how many of the images are mapped, from the first on (all of them where there are fewer, and more images can
            then not be added to the same folder).
        seed: of the random weights, the shuffling and the bootstrap.

    Returns:
        In the layout of `evaluation/results.py`: `scores`, `controls`, `verdict` with its `comparisons`; `intervals` as row ->
        metric -> [low, high]; `map_correlation_by_layer` as row -> layer -> mean.

    Raises:
        ValueError: for a layer that is not there, and when `output_dir` holds results of something else.
    """
    run = _Run(model, processor, data, Path(output_dir), phrases, layers, map_images, max_new_tokens, batch_size, seed)
    measured = run.measure()
    result = judge(measured, data, seed) | {"settings": run.shown_settings}
    dataset: dict[str, Any] = {"name": data.name, "size": len(data)}
    dataset |= {"split": data.split} if data.split else {}
    result = {"title": "Controls", "dataset": dataset} | result | {"weights": fingerprint(model)}
    (Path(output_dir) / "controls.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def frequent_words(captions: Sequence[Sequence[str]], count: int = 12) -> list[str]:
    """The words that most images' captions have, without those of more than half the images and the commonest of English."""
    images = Counter(word for texts in captions for word in {word for text in texts for word in words_of(text)})
    known = [
        (word, n)
        for word, n in images.items()
        if n <= max(len(captions) / 2, 1) and word not in STOP_WORDS and len(word) > 2
    ]
    return [word for word, _ in sorted(known, key=lambda item: (-item[1], item[0]))[:count]]


class _Run:
    """One evaluation: the conditions, and what is on disk of them."""

    def __init__(
        self, model, processor, data, folder, phrases, layers, map_images, max_new_tokens, batch_size, seed
    ) -> None:
        self.model, self.processor, self.data, self.folder = model, processor, data, folder
        self.max_new_tokens, self.batch_size, self.seed = max_new_tokens, batch_size, seed
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.mapped = min(map_images, len(data))
        if self.mapped < 2:
            raise ValueError(f"map_images {map_images}: at least 2 images are needed")
        if not phrases:
            phrases = sorted(WORDS) if data.scenes else frequent_words(data.captions[: self.mapped])
        self.phrases = list(phrases)
        self.true_phrases = [self._true_phrases(at) for at in range(self.mapped)]
        if not any(self.true_phrases):
            raise ValueError(
                f"none of the phrases {self.phrases} is true of one of the {self.mapped} mapped images: name others (--phrases)"
            )
        first = self.pixel_values([0])
        with torch.no_grad():
            grids = [cast(Tensor, maps).shape[-2:] for maps in model.extract_features(first)]
        places = [rows * columns for rows, columns in grids]
        chosen = resolve_layers(layers, model.layer_names) if layers else []
        chosen = chosen or [at for at, count in enumerate(places) if 1 < count <= MAP_PLACES]
        self.layers = sorted(chosen or [places.index(min(places))])
        self.stages = weight_stages(model.backbone, first.to(next(model.backbone.parameters())))
        settings = {
            "weights": weights_hash(model),
            "data": [data.source, data.split],
            "phrases": self.phrases,
            "layers": [model.layer_names[at] for at in self.layers],
            "map_images": self.mapped,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }
        self.records = Records(folder / "controls.jsonl", settings)
        # Maps of other settings, whose records were removed, must not be taken for these.
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.map_folder = folder / "maps" / digest
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data), generator=generator)
        self.partner = order.roll(1)[order.argsort()].tolist()
        self.shown_settings = {
            "decoding": "greedy",
            "mapped images": self.mapped,
            "mapped layers": ", ".join(settings["layers"]),
            "seed": seed,
        }

    def _true_phrases(self, at: int) -> list[int]:
        """Positions of the phrases that are true of an image."""
        if self.data.scenes:
            said = {word for words in self.data.scenes[at].words.values() for word in words}
        else:
            said = {word for text in self.data.captions[at] for word in words_of(text)}
        return [at for at, phrase in enumerate(self.phrases) if words_of(phrase) - STOP_WORDS <= said]

    def measure(self) -> dict[str, Measured]:
        """Every condition, the intact one first."""
        measured = {}
        conditions = self.conditions()
        bar = tqdm(total=(len(conditions) + 3) * len(self.data), desc="controls", unit="image")
        for name, (context, reached) in conditions.items():
            bar.set_postfix_str(name)
            with context:
                measured[name] = self.measure_condition(name, bar, reached)
        intact = measured[INTACT]
        bar.set_postfix_str("shuffled")
        measured["shuffled"] = self.shuffled(intact, bar)
        silent = np.zeros(len(self.data))
        flat = np.where(np.isnan(intact.correlation), np.nan, 0.0)
        text = null_label(self.model, self.processor, self.max_new_tokens)
        measured["null"] = Measured([text] * len(self.data), silent, flat)
        bar.update(len(self.data))
        bar.set_postfix_str("constant")
        text = best_constant(intact.texts, self.data.captions)
        evidence = self.evidence("constant " + text, bar, [[text]] * len(self.data))
        measured["constant"] = Measured([text] * len(self.data), evidence, np.full(len(self.data), np.nan))
        bar.close()
        return {INTACT: intact} | {name: measured[name] for name in measured if name != INTACT}

    def conditions(self) -> dict[str, tuple[Any, int]]:
        """Name -> the context in which the model is measured, and the shallowest layer that it changes."""
        names = self.model.layer_names
        found: dict[str, tuple[Any, int]] = {INTACT: (nullcontext(), 0)}
        for at in reversed(range(len(self.stages))):
            layer = self.stages[at][0]
            name = f"backbone randomised from {names[layer]} up" if at else "backbone_randomised"
            found[name] = (self.randomised(self.stages[at:]), layer)
        found["untrained"] = (untrained_translator(self.model, self.seed), 0)
        return found

    @contextmanager
    def randomised(self, stages) -> Iterator[None]:
        begins = range(0, self.mapped, STATISTICS_BATCH)
        batches = [range(begin, min(begin + STATISTICS_BATCH, self.mapped)) for begin in begins]
        if len(batches) > 1 and len(batches[-1]) == 1:  # one image alone may have no variance to normalise by
            batches.pop()
        like = next(self.model.backbone.parameters())
        pixel_values = [self.pixel_values(batch).to(like) for batch in batches]
        with randomised_backbone(self.model, stages, pixel_values, self.seed):
            yield

    def pixel_values(self, positions: Sequence[int]) -> Tensor:
        return self.processor(images=[self.data.load(at) for at in positions], return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def measure_condition(self, name: str, bar, reached: int) -> Measured:
        """Describe and score all images, and map the first of them, as the model is now."""
        missing = [at for at in range(len(self.data)) if f"{name} {self.data.keys[at]}" not in self.records]
        bar.update(len(self.data) - len(missing))
        for begin in range(0, len(missing), self.batch_size):
            batch = missing[begin : begin + self.batch_size]
            prefix = self.model.ask(self.pixel_values(batch))
            ids = self.model.decode(prefix, max_new_tokens=self.max_new_tokens)
            texts = self.processor.batch_decode(ids, skip_special_tokens=True)
            scored = self.score(prefix, [self.data.captions[at] for at in batch])
            for at, text, values in zip(batch, texts, scored, strict=True):
                row = {"text": text.strip(), "evidence": values}
                self.records.add(f"{name} {self.data.keys[at]}", row)
            bar.update(len(batch))
        rows = [self.records[f"{name} {key}"] for key in self.data.keys]
        correlation, by_layer = self.correlate(self.maps(name, reached), range(self.mapped))
        evidence = np.array([np.mean(row["evidence"]) for row in rows])
        return Measured([row["text"] for row in rows], evidence, correlation, by_layer)

    def score(self, prefix: Tensor, captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """Evidence of each caption of each row in nats per token, EOS included."""
        counts = [len(texts) for texts in captions]
        config = self.model.config
        texts = [text for several in captions for text in several]
        tokens = self.processor(text=texts, max_length=config.max_caption_tokens)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if config.eos_token_id is not None:
            ends = mask.sum(dim=1, keepdim=True)
            ids = F.pad(ids, (0, 1), value=self.model.padding_token_id).scatter(1, ends, config.eos_token_id)
            mask = F.pad(mask, (1, 0), value=1)
        rows = prefix.repeat_interleave(torch.tensor(counts, device=prefix.device), dim=0)
        given, null = self.model.sequence_log_probs(rows, ids.to(prefix.device))
        mask = mask.to(given)
        values = ((given - null) * mask).sum(dim=1) / mask.sum(dim=1)
        return [part.tolist() for part in values.split(counts)]

    @torch.no_grad()
    def evidence(
        self, name: str, bar, captions: Sequence[Sequence[str]], images: Sequence[int] | None = None
    ) -> np.ndarray:
        """Mean evidence (N,) of other captions, or under the features of other images."""
        images = range(len(self.data)) if images is None else images
        keys = [f"{name} {self.data.keys[at]} {self.data.keys[image]}" for at, image in enumerate(images)]
        missing = [at for at, key in enumerate(keys) if key not in self.records]
        bar.update(len(keys) - len(missing))
        for begin in range(0, len(missing), self.batch_size):
            batch = missing[begin : begin + self.batch_size]
            prefix = self.model.ask(self.pixel_values([images[at] for at in batch]))
            for at, values in zip(batch, self.score(prefix, [captions[at] for at in batch]), strict=True):
                self.records.add(keys[at], {"evidence": values})
            bar.update(len(batch))
        return np.array([np.mean(self.records[key]["evidence"]) for key in keys])

    def shuffled(self, intact: Measured, bar) -> Measured:
        evidence = self.evidence("shuffled", bar, self.data.captions, self.partner)
        # Only mapped images have maps to deal out.
        order = torch.randperm(self.mapped, generator=torch.Generator().manual_seed(self.seed))
        partner = order.roll(1)[order.argsort()].tolist()
        correlation, by_layer = self.correlate(self.maps(INTACT, 0), partner)
        return Measured([intact.texts[at] for at in self.partner], evidence, correlation, by_layer)

    def maps(self, name: str, reached: int) -> dict[str, Tensor]:
        """Maps of the first images by layer, (images, K, H, W), from disk if they are there."""
        path = self.map_folder / f"{name}.safetensors"
        if path.exists():
            return load_file(path)
        names = [self.model.layer_names[at] for at in self.layers]
        # What lies below the change has not changed.
        kept = {} if name == INTACT else self.maps(INTACT, 0)
        maps = {layer: kept[layer] for at, layer in zip(self.layers, names, strict=True) if at < reached}
        asked = [layer for layer in names if layer not in maps]
        phrases = self.processor(text=self.phrases, carrier=CARRIER, return_tensors="pt")
        parts: dict[str, list[Tensor]] = {layer: [] for layer in asked}
        begins = range(0, self.mapped, self.batch_size) if asked else ()
        for begin in tqdm(begins, desc=f"maps, {name}", unit="batch", leave=False):
            pixel_values = self.pixel_values(range(begin, min(begin + self.batch_size, self.mapped)))
            for layer, values in self.model.attribute(pixel_values, phrases, asked).maps.items():
                parts[layer].append(values.float().cpu())
        maps |= {layer: torch.cat(values) for layer, values in parts.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file({layer: maps[layer].contiguous() for layer in names}, unfinished)
        unfinished.replace(path)
        return maps

    def correlate(self, maps: Mapping[str, Tensor], images: Sequence[int]) -> tuple[np.ndarray, dict[str, float]]:
        """Mean rank correlation (N,) with the intact maps, over layers and the phrases true of each image; and by layer.

        Image `images[i]` of `maps` is compared with image i of the intact ones.
        """
        intact = self.maps(INTACT, 0)
        found = np.full((len(self.data), len(intact)), np.nan)
        for at, image in enumerate(images):
            for column, (layer, values) in enumerate(intact.items()):
                pairs = [
                    spearman(values[at, k].flatten(), maps[layer][image, k].flatten())
                    for k in self.true_phrases[at]
                    if float(values[at, k].max() - values[at, k].min()) >= FLAT
                ]
                if pairs:
                    found[at, column] = np.mean(pairs)
        known = ~np.isnan(found)
        each = Ratio.mean(found.ravel())
        sums, counts = (part.reshape(found.shape) for part in (each.numerator, each.denominator))
        means = np.divide(sums.sum(1), counts.sum(1), out=np.full(len(found), np.nan), where=known.any(1))
        by_layer = {
            layer: float(found[known[:, column], column].mean())
            for column, layer in enumerate(intact)
            if known[:, column].any()
        }
        return means, by_layer


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two maps (P,), ties at their mean rank; 0 where either is flat."""
    if min(float(values.max() - values.min()) for values in (one, other)) < FLAT:
        return 0.0
    ranks = [_ranks(values) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Tensor) -> np.ndarray:
    _, inverse, counts = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


# ---------------------------------------------------------------------------------------------------------- captions


class _CaptionScores:
    """BLEU of the corpus, CIDEr-D and ROUGE-L of each image, against fixed captions."""

    def __init__(self, captions: Sequence[Sequence[str]]):
        self.references = [[ptb_tokens(text) for text in texts] for texts in captions]
        self.cider = CiderD(self.references)

    def of_images(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Metric -> (N,); CIDEr takes its document frequencies from the captions of all images."""
        tokens = [ptb_tokens(text) for text in texts]
        return {"cider": np.array(self.cider(tokens)), "rouge_l": np.array(rouge_l(tokens, self.references))}

    def of_corpus(self, texts: Sequence[str]) -> dict[str, float]:
        return dict(zip(BLEU, bleu([ptb_tokens(text) for text in texts], self.references), strict=True))


def best_constant(texts: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    """The one text that scores the best mean CIDEr when given to every image, of the most frequent ones."""
    said, captions = Counter(texts), Counter(text for several in references for text in several)
    candidates = {
        text
        for counts in (said, captions)
        for text in sorted(counts, key=lambda t: (-counts[t], t))[:CONSTANTS]
        if text
    }
    scores = _CaptionScores(references)
    return max(sorted(candidates), key=lambda text: np.mean(scores.cider([ptb_tokens(text)] * len(references))))


def _word_f1(texts: Sequence[str], data: CaptionedImages) -> Ratio:
    hits, total = [], []
    for text, scene in zip(texts, data.scenes, strict=True):
        said, true = words_of(text) & WORDS, {word for words in scene.words.values() for word in words}
        hits.append(2.0 * len(said & true))
        total.append(float(len(said) + len(true)))
    return Ratio(np.array(hits), np.array(total))


# ----------------------------------------------------------------------------------------------------------- judgement


def judge(measured: Mapping[str, Measured], data: CaptionedImages, seed: int = 0) -> dict[str, Any]:
    """Scores, intervals and the verdict of what was measured; the intact model is `measured["all"]`."""
    draws = bootstrap_draws(len(data), seed=seed)
    scores = _CaptionScores(data.captions)
    statistics = {name: _statistics(one, data, scores) for name, one in measured.items()}
    statistics[INTACT].pop("map_correlation", None)  # with itself
    over = {name: {m: ratio.over(draws) for m, ratio in row.items()} for name, row in statistics.items()}
    rows = {name: {metric: ratio.value for metric, ratio in row.items()} for name, row in statistics.items()}
    for name, one in measured.items():
        rows[name] |= scores.of_corpus(one.texts)
    return {
        "scores": {INTACT: rows[INTACT]},
        "controls": {name: row for name, row in rows.items() if name != INTACT},
        "intervals": {name: {m: interval(values) for m, values in row.items()} for name, row in over.items()},
        "map_correlation_by_layer": {
            name: one.by_layer for name, one in measured.items() if one.by_layer and name != INTACT
        },
        "texts": {name: measured[name].texts[0] for name in ("null", "constant")},
        "verdict": _verdict(rows, over, bool(np.isfinite(measured[INTACT].correlation).any())),
    }


def _statistics(one: Measured, data: CaptionedImages, scores: _CaptionScores) -> dict[str, Ratio]:
    found = {metric: Ratio.mean(values) for metric, values in scores.of_images(one.texts).items()}
    if data.scenes:
        found["word_f1"] = _word_f1(one.texts, data)
    found["evidence"] = Ratio.mean(one.evidence)
    if np.isfinite(one.correlation).any():
        found["map_correlation"] = Ratio.mean(one.correlation)
    return found


def _verdict(
    rows: Mapping[str, Mapping[str, float]], over: Mapping[str, Mapping[str, np.ndarray]], mapped: bool
) -> dict:
    comparisons = []
    for control in CONTROLS:
        for metric, margin in MARGINS.items():
            if metric not in rows[INTACT]:
                continue
            low, high = interval(over[INTACT][metric] - over[control][metric])
            difference = rows[INTACT][metric] - rows[control][metric]
            comparisons.append(
                {
                    "control": control,
                    "metric": metric,
                    "rule": f"intact - control > {margin}",
                    "value": difference,
                    "interval": [low, high],
                    "passed": low > margin,
                }
            )
        if "map_correlation" in rows[control]:
            low, high = interval(over[control]["map_correlation"])
            comparisons.append(
                {
                    "control": control,
                    "metric": "map_correlation",
                    "rule": f"correlation with the intact maps < {MAP_CORRELATION_LIMIT}",
                    "value": rows[control]["map_correlation"],
                    "interval": [low, high],
                    "passed": high < MAP_CORRELATION_LIMIT,
                }
            )
    failed = [comparison for comparison in comparisons if not comparison["passed"]]
    passed = mapped and not failed
    return {"passed": passed, "reason": _reason(rows, comparisons, failed, mapped), "comparisons": comparisons}


def _reason(rows, comparisons, failed, mapped: bool) -> str:
    if not mapped:
        return "the maps of the intact model are flat: no phrase is likelier at one place than at another"
    if failed:
        said = [
            f"{CONTROLS[one['control']]}: {one['metric']} {one['value']:.3f} [{one['interval'][0]:.3f}, "
            f"{one['interval'][1]:.3f}] violates '{one['rule']}'"
            for one in failed
        ]
        return f"{len(failed)} of {len(comparisons)} comparisons fail: " + "; ".join(said)
    parts = []
    for metric in MARGINS:
        if metric in rows[INTACT]:
            best = max(CONTROLS, key=lambda name: rows[name][metric])
            parts.append(f"{metric} {rows[INTACT][metric]:.3f}, at most {rows[best][metric]:.3f} ({CONTROLS[best]})")
    most = max((one for one in comparisons if one["metric"] == "map_correlation"), key=lambda one: one["value"])
    parts.append(f"maps correlate with the intact ones by at most {most['value']:.2f} ({CONTROLS[most['control']]})")
    return f"all {len(comparisons)} comparisons hold: " + "; ".join(parts)


def control_table(result: Mapping[str, Any]) -> str:
    """The result as text: a row per condition with intervals, the rules, and the verdict."""
    metrics = [m for m in ("word_f1", "cider", "rouge_l", "evidence", "map_correlation") if m in _metrics(result)]
    rows = result["scores"] | result["controls"]
    width = max(len(CONTROLS.get(name, name)) for name in rows) + 2
    lines = [f"{'':{width}}" + "".join(f"{metric:>24}" for metric in metrics)]
    for name, row in rows.items():
        cells = []
        for metric in metrics:
            low, high = result["intervals"][name].get(metric, (0, 0))
            cells.append(f"{row[metric]:.3f} [{low:.3f}, {high:.3f}]" if metric in row else "")
        shown = "intact, all layers" if name == INTACT else CONTROLS.get(name, name)
        lines.append(f"{shown:{width}}" + "".join(f"{cell:>24}" for cell in cells))
    verdict = result["verdict"]
    lines += ["", "intervals: 95 %, bootstrap over images; evidence in nats per token over the null prefix"]
    margins = ", ".join(f"{metric} {margin}" for metric, margin in MARGINS.items() if metric in metrics)
    lines += [
        f"rules: the paired difference intact - control lies above a margin ({margins}) with its whole interval,",
        f"       the maps' rank correlation with the intact ones below {MAP_CORRELATION_LIMIT}",
        f"verdict: {'TRUSTED' if verdict['passed'] else 'NOT TRUSTED'}: {verdict['reason']}",
    ]
    return "\n".join(lines)


def _metrics(result: Mapping[str, Any]) -> set[str]:
    return {metric for row in (*result["scores"].values(), *result["controls"].values()) for metric in row}
