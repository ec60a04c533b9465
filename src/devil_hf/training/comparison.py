"""Translators beside each other, trained on the same data with several seeds and scored on the same images.

A comparison is a YAML file: a recipe that all share, what each translator changes in it, the images that are scored, and what
else is evaluated. A run that is finished is kept and never repeated; one that was stopped goes on.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from devil_hf.checkpoints.identity import network_identity, preprocessing_of
from devil_hf.checkpoints.loading import load
from devil_hf.data.captioned import longest_description
from devil_hf.data.decoding import BadSamples, PairDecoder
from devil_hf.data.identity import PairIdentities, combined
from devil_hf.data.pairs import REGION_KINDS, open_pairs
from devil_hf.evaluation.evaluator import EVALUATORS, evaluate
from devil_hf.evaluation.results import metric_name
from devil_hf.evaluation.tables import table, with_interval
from devil_hf.evaluation.text.metrics import caption_scores
from devil_hf.extras import needs
from devil_hf.folders import claimed, write_json
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import pool, region_weights
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.grounding import CANDIDATES, PLACES_TO_A_SIDE, choose_grounded, tile_regions
from devil_hf.settings import make, option, read_yaml
from devil_hf.text_files import read_json
from devil_hf.training.features import as_stored
from devil_hf.training.recipe import CHECKPOINT_FOLDER, Recipe
from devil_hf.training.run import DATA_FILE, check_data, data_hashes, train
from devil_hf.training.tokens import CaptionTokens

logger = logging.get_logger(f"transformers.{__name__}")

METRICS = ("bleu", "rouge_l", "cider")
NEW_TOKENS = 40
ALL_LAYERS = "all"
LOSS = "validation loss"
# Of a checkpoint: its configuration, which has the hash of the weights that loading checks, and what its processor reads.
DECIDING_FILES = ("*config.json", "tokenizer.json", "vocab.*", "merges.txt", "*_tokens*.json", "*.model", "*.jinja")


@dataclass
class ComparisonFile:
    """What a comparison file says."""

    recipe: str = option("recipe file as seen from this one, or the name of one that comes with the package")
    translators: dict = option("by name, the fields of the recipe that each changes; `model` is merged field by field")
    evaluation_data: list = option("sources of the captioned images that are scored")
    decodings: dict = option("arguments of `generate` by the name of a column", {"greedy": {}})
    evaluations: dict = option("by the heading of their lines, the fields of `AskedEvaluation`", {})


@dataclass
class AskedEvaluation:
    """An evaluation of every translator, beside the descriptions of whole images."""

    evaluator: str = option("as `devil evaluate` knows it")
    settings: dict = option("its settings; of `layers`, a translator is asked those that it reads")
    show: list = option("of the scores of its row, those that become lines of the table")
    row: str = option("row of its scores that stands for a translator", ALL_LAYERS)

    def of(self, layers: Sequence[str] | None, checkpoint: Path, output_dir: Path) -> Any:
        """Settings for one checkpoint; `layers` are those that it reads, None where nobody knows them yet."""
        given = self.settings | {"checkpoint": str(checkpoint), "output_dir": str(output_dir)}
        if layers is not None and given.get("layers"):
            given["layers"] = [name for name in given["layers"] if name in layers]
            if not given["layers"]:
                raise ValueError(f"{self.evaluator} is asked of layers {self.settings['layers']}, but there are {list(layers)}")
        return make(EVALUATORS[self.evaluator].Settings, given, f"settings of the evaluation {self.evaluator!r}")

    def identity(self, recipes: Iterable[Recipe]) -> str:
        """Hash of what is asked, and of what, by content.

        Raises:
            ValueError, OSError: for what can be seen to be wrong before anything is trained.
        """
        run = EVALUATORS[self.evaluator](self.of(None, Path(CHECKPOINT_FOLDER), Path()))
        if PartialState().num_processes > 1 and not run.parallel:
            raise ValueError(f"the evaluation {self.evaluator!r} cannot be shared: compare on one process")
        read = [recipe.layers for recipe in recipes]
        known = {name for layers in read for name in layers or ()}
        unread = [name for name in self.settings.get("layers") or () if name not in known]
        if unread and None not in read:
            raise ValueError(
                f"the evaluation {self.evaluator!r} asks for layers {unread}, which no translator reads: {sorted(known)}"
            )
        keys = run.open()
        rows = (
            [f"{key} {run.identity(key)}" for key in keys] if isinstance(keys, Sequence) else []
        )  # a stream is known by its name
        return combined([self.evaluator, json.dumps(self.settings, sort_keys=True), *rows])


@dataclass
class Comparison:
    """What is compared, and on what.

    Args:
        recipes: the recipe of each translator, by the name of its row.
        evaluation_data: sources of the captioned images that are described and scored; no training reads them.
        decodings: arguments of `generate` by the name of a column; besides, `guidance`, and `grounding` for the strength of
            `choose_grounded`.
        evaluations: what else is evaluated, by the heading of its lines.
    """

    recipes: dict[str, Recipe]
    evaluation_data: list[dict]
    decodings: dict[str, dict]
    evaluations: dict[str, AskedEvaluation] = field(default_factory=dict)


def read_comparison(path: Path, recipe: Path | None = None, fields: Mapping[str, Any] | None = None) -> Comparison:
    """Read a comparison file, which has the fields of `ComparisonFile`.

    Args:
        recipe: another recipe than the file's.
        fields: fields of the recipe that are changed for all translators, over everything else.

    Raises:
        FileNotFoundError: when the file or its recipe is not there.
        ValueError: for a file with other parts, and for whatever is wrong with a recipe.
    """
    file = make(ComparisonFile, read_yaml(ComparisonFile, path), str(path))
    beside = path.parent / file.recipe
    shared = read_yaml(Recipe, recipe or (beside if beside.exists() else Path(file.recipe)))
    recipes = {}
    for name, own in file.translators.items():
        changed = _merged(_merged(shared, own or {}), fields or {})
        recipes[name] = make(Recipe, changed, f"translator {name!r} of {path}")
    evaluations = {name: make(AskedEvaluation, asked, f"evaluation {name!r}") for name, asked in file.evaluations.items()}
    if unfit := [name for name in evaluations if not re.fullmatch(r"\w[\w -]*", str(name))]:
        raise ValueError(f"{path} has evaluations {unfit}: folders are named by them, so use letters, digits, spaces and - alone")
    return Comparison(recipes, file.evaluation_data, file.decodings, evaluations)


def _merged(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {**fields, **over, "model": {**fields.get("model", {}), **over.get("model", {})}}


def compare(comparison: Comparison, seeds: Sequence[int], output_dir: Path) -> list[dict[str, Any]]:
    """Train and score every translator with every seed, seed by seed.

    Args:
        output_dir: gets a folder NAME/seed_N for every run, with its checkpoint, and scores and descriptions in a JSON file for
            each evaluation.

    Returns:
        The content of these files.

    Raises:
        ValueError: when a folder holds a run of another recipe, or of data that have changed since; for an evaluation that there
            is not, or that cannot be asked so.
        FolderInUse: when another run works in a folder.
    """
    identities = {name: asked.identity(comparison.recipes.values()) for name, asked in comparison.evaluations.items()}
    runs = [
        (name, dataclasses.replace(recipe, seed=seed, output_dir=str(output_dir / name / f"seed_{seed}"), resume=True))
        for seed, (name, recipe) in itertools.product(seeds, comparison.recipes.items())
    ]
    hashes: dict[str, dict[str, str]] = {}
    for _, recipe in runs:
        _check_same_run(recipe, hashes)
    images = EvaluationImages(comparison.evaluation_data)
    return [run(name, recipe, images, comparison, identities) for name, recipe in runs]


def _check_same_run(recipe: Recipe, hashes: dict[str, dict[str, str]]) -> None:
    """Raise a ValueError when a folder holds another run; `hashes` keeps those of data, for the recipes that share them."""
    folder = Path(recipe.output_dir)
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if newest is not None and (changed := recipe.differences(read_yaml(Recipe, Path(newest)))):
        raise ValueError(f"{folder} holds a run with other values of {changed}: name another --output-dir, or delete it")
    if newest is not None and (Path(newest) / DATA_FILE).is_file():
        data = json.dumps([recipe.train_data, recipe.validation_data, recipe.validation_images], sort_keys=True, default=str)
        with contextlib.suppress(OSError):  # data that are not there any more have not changed: what is finished stays
            if data not in hashes:
                hashes[data] = data_hashes(recipe)
            check_data(recipe, hashes[data], Path(newest))


def run(
    name: str, recipe: Recipe, images: "EvaluationImages", comparison: Comparison, identities: Mapping[str, str]
) -> dict[str, Any]:
    """One run, trained and scored as far as that is not done yet; `identities` are those of the comparison's evaluations.

    Scores of another checkpoint than lies beside them by now are made again; without one, those that are finished stay, and so
    do those of before, which do not say of which checkpoint they are.
    """
    folder, state = Path(recipe.output_dir), PartialState()
    evaluation = {"data": images.sources, "decodings": comparison.decodings, "max_new_tokens": NEW_TOKENS}
    evaluation["data_sha256"] = images.identity
    evaluation |= {"evaluations": dict(identities)} if identities else {}
    digest = hashlib.sha256(json.dumps(evaluation, sort_keys=True).encode()).hexdigest()
    file, checkpoint = folder / f"scores_{digest[:8]}.json", folder / CHECKPOINT_FOLDER
    if file.is_file():
        result = read_json(file)
        if "checkpoint" not in result or not checkpoint.is_dir() or result["checkpoint"] == _checkpoint_identity(checkpoint):
            return result
        logger.warning(f"{file} is not of the model and processor that {checkpoint} holds: they are scored again")
    with claimed(folder, "a comparison of translators", state.is_main_process):
        result = _run(name, recipe, images, comparison, evaluation)
        if state.is_main_process:  # the others do not have the scores of evaluations
            write_json(file, result)
        state.wait_for_everyone()
    return read_json(file)


def _run(
    name: str,
    recipe: Recipe,
    images: "EvaluationImages",
    comparison: Comparison,
    evaluation: dict[str, Any],
) -> dict[str, Any]:
    folder = Path(recipe.output_dir)
    checkpoint = folder / CHECKPOINT_FOLDER
    if not checkpoint.is_dir():
        logger.warning(f"training {name}, seed {recipe.seed}")
        train(recipe)
    model, processor = load(checkpoint)
    known = _checkpoint_identity(checkpoint)
    texts = {column: images.describe(model, processor, options) for column, options in comparison.decodings.items()}
    references = images.captions
    return {
        "name": name,
        "seed": recipe.seed,
        "checkpoint": known,
        "trained_parameters": sum(tensor.numel() for tensor in model.trainable_state_dict().values()),
        "evaluation": evaluation,
        **_training_record(folder),
        "scores": {
            column: {row: caption_scores(rows, references, METRICS) for row, rows in by_row.items()}
            for column, by_row in texts.items()
        },
        "evaluations": {
            heading: _evaluated(asked, model, processor, checkpoint, folder / f"{heading}_{_short(heading, known, evaluation)}")
            for heading, asked in comparison.evaluations.items()
        },
        "images": images.keys,
        "descriptions": texts,
    }


def _checkpoint_identity(checkpoint: Path) -> str:
    """Hash of a checkpoint by the whole content of its `DECIDING_FILES`, so that a copy is the same."""
    files = sorted({file for pattern in DECIDING_FILES for file in checkpoint.glob(pattern)})
    return combined([*(file.name for file in files), *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)])


def _short(heading: str, known: str, evaluation: Mapping[str, Any]) -> str:
    """What is in the name of the folder where an evaluation of a checkpoint records its rows."""
    return combined([evaluation["evaluations"][heading], known])[:8]


def _evaluated(
    asked: AskedEvaluation, model: DevilModel, processor: DevilProcessor, checkpoint: Path, folder: Path
) -> dict[str, dict[str, float]]:
    """The scores of one evaluation, which records its rows in `folder` and goes on from them."""
    found = evaluate(asked.evaluator, asked.of(model.layer_names, checkpoint, folder), model, processor)
    return {} if found is None else found.scores  # on processes other than the main one


def _training_record(folder: Path) -> dict[str, Any]:
    """The best validation loss and its step, where there are validation data."""
    state = read_json(Path(str(get_last_checkpoint(str(folder)))) / "trainer_state.json")
    return {"validation_loss": state["best_metric"], "best_step": state["best_global_step"]}


class EvaluationImages:
    """The captioned images that all translators are scored on; their features are computed once for each choice of layers.

    Args:
        sources: as in a recipe.
    """

    def __init__(self, sources: Sequence[dict]):
        if any(source.get("kind") in REGION_KINDS for source in sources):
            raise ValueError(f"evaluation_data {list(sources)} name regions, but whole images are described: leave them out")
        self.sources = list(sources)
        self.keys: list[str] = []
        self.captions: list[list[str]] = []
        self._features: dict[str, list[Tensor]] = {}  # per layer (images, 1 + places, C_l)
        self._pairs = open_pairs(self.sources, seed=0, shuffle=False)  # a missing file is an error before the training

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the images and captions."""
        return PairIdentities(self.sources, self._pairs).all()

    @torch.no_grad()
    def describe(
        self, model: DevilModel, processor: DevilProcessor, options: Mapping[str, Any], batch_size: int = 64
    ) -> dict[str, list[str]]:
        """Descriptions of every image, by all layers together and, of several, by the deepest."""
        features = self.features(model, processor)
        settings = {"max_new_tokens": NEW_TOKENS} | dict(options)
        settings["max_new_tokens"] = longest_description(model, settings["max_new_tokens"])
        guidance, grounding = settings.pop("guidance", 1.0), settings.pop("grounding", None)
        candidates = CANDIDATES if grounding is None else settings.pop("num_beams", CANDIDATES)
        deepest = torch.ones(1, len(features), dtype=torch.bool)
        deepest[:, -1] = False
        rows = {ALL_LAYERS: None} | ({model.layer_names[-1]: deepest} if len(features) > 1 else {})
        texts: dict[str, list[str]] = {row: [] for row in rows}
        for start in range(0, len(self.keys), batch_size):
            pooled = [layer[start : start + batch_size].to(model.device).float() for layer in features]
            images, views = pooled[0].shape[:2]
            for row, mask in rows.items():
                flat = [layer.flatten(0, 1) for layer in pooled]
                prefix = model.translate(flat, None if mask is None else mask.to(model.device).expand(len(flat[0]), -1))
                prefix = prefix.unflatten(0, (images, views))
                if grounding is not None:
                    whole, places = prefix[:, 0], prefix[:, 1:]
                    chosen = choose_grounded(
                        model, processor, whole, places, candidates, grounding, guidance=guidance, **settings
                    )
                    texts[row] += [description.text for description in chosen]
                    continue
                sequences = model.decode(prefix[:, 0], guidance, **settings)
                texts[row] += [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]
        return texts

    def features(self, model: DevilModel, processor: DevilProcessor) -> list[Tensor]:
        """Features of the whole images and of their places (`grounding.tile_regions`), (images, 1 + places, C_l) per layer."""
        backbone = model.config.backbone_config
        key = json.dumps([backbone["sha256"], network_identity(backbone), preprocessing_of(processor.image_processor)])
        if key not in self._features:
            self.keys, self.captions = [], []
            batches = [self._pool(model, pixel_values) for pixel_values in self._batches(processor)]
            self._features[key] = [torch.cat(layer) for layer in zip(*batches, strict=True)]
        return self._features[key]

    @staticmethod
    @torch.no_grad()
    def _pool(model: DevilModel, pixel_values: Tensor) -> list[Tensor]:
        layers = []
        for name, maps in zip(model.layer_names, cast(list[Tensor], model.extract_features(pixel_values)), strict=True):
            tiles = region_weights(tile_regions(PLACES_TO_A_SIDE)[None], (maps.shape[-2], maps.shape[-1]))[0][0]
            views = torch.cat([torch.full_like(tiles[:1], 1.0 / tiles[0].numel()), tiles])
            layers.append(as_stored(pool(maps, views.to(maps)).unflatten(0, (len(maps), -1)), name))
        return layers

    def _batches(self, processor: DevilProcessor, size: int = 32) -> Iterator[Tensor]:
        bad_samples = BadSamples(0.0)  # rows of a table must be of the same images
        decoder = PairDecoder(bad_samples, read=CaptionTokens(processor).read)
        rows = iter(self._pairs)
        while chunk := list(itertools.islice(rows, size)):
            samples = [sample for sample in map(decoder, chunk) if sample is not None]
            bad_samples.judge()
            self.keys += [sample["key"] for sample in samples]
            self.captions += [sample["captions"] for sample in samples]
            yield processor(images=[sample["image"] for sample in samples], return_tensors="pt")["pixel_values"]


# ------------------------------------------------------------------------------------------------------------- the table


def summarise(
    results: Sequence[Mapping[str, Any]], metric: str = "cider", evaluations: Mapping[str, AskedEvaluation] | None = None
) -> list[dict[str, Any]]:
    """One entry for each translator and row of it: mean and standard deviation over seeds; of the metric, times 100 as papers
    print it. Evaluations stand with all layers."""
    summary = []
    for name in dict.fromkeys(result["name"] for result in results):
        runs = [result for result in results if result["name"] == name]
        losses = [result["validation_loss"] for result in runs if result["validation_loss"] is not None]
        for row in next(iter(runs[0]["scores"].values())):
            columns = {
                column: _mean_and_spread([100 * result["scores"][column][row][metric] for result in runs])
                for column in runs[0]["scores"]
            }
            summary.append(
                {
                    "name": name,
                    "layers": row,
                    "seeds": [result["seed"] for result in runs],
                    "trained_parameters": runs[0]["trained_parameters"],
                    "validation_loss": _mean_and_spread(losses) if losses else None,
                    metric: columns,
                    "evaluations": _means(runs, evaluations or {}) if row == ALL_LAYERS else {},
                }
            )
    return summary


def _means(runs: Sequence[Mapping[str, Any]], evaluations: Mapping[str, AskedEvaluation]) -> dict[str, dict[str, Any] | None]:
    """Heading and score, as a figure is called -> mean and spread over the runs of one translator; None where a run lacks it."""
    found = {}
    for heading, asked in evaluations.items():
        for score in asked.show:
            values = [run["evaluations"][heading].get(asked.row, {}).get(score) for run in runs]
            found[f"{heading}: {metric_name(score)}"] = None if None in values else _mean_and_spread(values)
    return found


def _mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": spread, "values": list(values)}


def comparison_table(summary: Sequence[Mapping[str, Any]], metric: str = "cider") -> str:
    """A summary as text: a line for each figure, a column for each translator and row of it, with standard deviations over seeds.

    Of several seeds, a second table has the first translator's difference to each other (of a loss, below zero is better), with
    the 95 % interval by Welch.
    """
    figures = {f"{entry['name']}, {entry['layers']}": _figures(entry, metric) for entry in summary}
    names = dict.fromkeys(name for figure in figures.values() for name in figure)
    lines = {name: {column: _shown(*figure[name]) for column, figure in figures.items() if name in figure} for name in names}
    sizes = {column: f"{entry['trained_parameters']:,}" for column, entry in zip(figures, summary, strict=True)}
    text = table({"trained parameters": sizes} | lines, list(figures), cell=str)
    seeds = sorted({seed for entry in summary for seed in entry["seeds"]})
    text += f"\nmean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    absent = dict.fromkeys(name for entry in summary for name, value in entry["evaluations"].items() if value is None)
    text += f"\nnot among the scores of every run, or misspelt: {', '.join(absent)}" if absent else ""
    first = summary[0]["name"]
    others = [column for column, entry in zip(figures, summary, strict=True) if entry["name"] != first]
    own = figures[f"{first}, {summary[0]['layers']}"]
    ahead = {
        name: {f"over {column}": _lead(*own[name], figures[column][name][0]) for column in others if name in figures[column]}
        for name in own
    }
    if not others or len(seeds) == 1:
        return text
    return f"{text}\n\n{first}, difference:\n{table(ahead, [f'over {column}' for column in others], cell=str)}"


def _figures(entry: Mapping[str, Any], metric: str) -> dict[str, tuple[Mapping[str, Any], int]]:
    """Name of a figure -> its mean and spread, and how many digits of it are shown."""
    found = (
        {LOSS: (entry["validation_loss"], 3)} if entry["validation_loss"] is not None and entry["layers"] == ALL_LAYERS else {}
    )
    found |= {f"{metric}, {name}": (value, 1) for name, value in entry[metric].items()}
    return found | {name: (value, 3) for name, value in entry["evaluations"].items() if value is not None}


def _shown(value: Mapping[str, Any], digits: int) -> str:
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def _lead(value: Mapping[str, Any], digits: int, other: Mapping[str, Any]) -> str:
    """The difference of two means over seeds, with its interval."""
    needs("scipy", "evaluate")
    from scipy.stats import ttest_ind

    samples = value["values"], other["values"]
    several = min(map(len, samples)) > 1 and any(max(values) > min(values) for values in samples)  # a spread to tell by
    interval = tuple(ttest_ind(*samples, equal_var=False).confidence_interval()) if several else None
    return with_interval(value["mean"] - other["mean"], interval, f"{{:+.{digits}f}}".format)


__all__ = [
    "AskedEvaluation",
    "Comparison",
    "ComparisonFile",
    "EvaluationImages",
    "compare",
    "comparison_table",
    "read_comparison",
    "run",
    "summarise",
]
