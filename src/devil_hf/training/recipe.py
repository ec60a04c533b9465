"""A recipe: everything that a training run is, in one dataclass and one YAML file of the same fields.

Any field can be given on the command line over the file. The resolved recipe is written into every checkpoint, and can be trained
again from there.
"""

import argparse
import dataclasses
import importlib.util
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from devil_hf.data.sources import REGIONS
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.model.lora_devil import check_lora

RECIPE_FILE = "recipe.yaml"
CHECKPOINT_FOLDER = "checkpoint"
EMBEDDED = "embedded"
TRACKERS = ("tensorboard", "trackio", "wandb")
# What a run does, not what it is: left out when two recipes are compared.
OF_THE_CALL = ("output_dir", "resume", "report_to", "push_to_hub", "processes", "keep_checkpoints", "workers")


def _option(help: str, default: Any = dataclasses.MISSING) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """A training run: frozen parts, captioned images, the translator between them, and how it is trained."""

    output_dir: str = _option("folder of the run; the model ends up in its `checkpoint` folder", "runs/devil")

    backbone: str = _option("timm or transformers id, or local directory, of the backbone", "")
    language_model: str = _option("id or local directory of the language model and its tokenizer", "")
    checkpoint: str = _option("instead of both: a DeViL checkpoint to go on from; `embedded` is the shipped one", "")
    new_translator: bool = _option("with a checkpoint: keep its frozen parts only", False)
    backbone_kwargs: dict = _option("further arguments of the backbone's architecture", {})
    layers: list | None = _option(
        "names or indices of layers; default: the backbone's stages, or those of the checkpoint", None
    )
    class_tokens: bool = _option("also read class tokens, as layers of their own", False)
    resize: str = _option("`backbone`: its own evaluation preprocessing; `paper`: short side to the crop", "backbone")
    model: dict = _option("fields of DevilConfig: translator type and sizes, dropouts, null_probability", {})
    lora: dict | None = _option(
        "LoRA on the language model: rank, alpha, dropout, target_modules; {} for the defaults", None
    )

    train_data: list = _option("sources of captioned images, each with a `kind`; see devil_hf/data/sources.py", [])
    validation_data: list = _option("sources whose loss chooses the checkpoint; never the test split", [])
    validation_images: int = _option("validate on the first so many images", 2_000)
    bad_samples: float = _option("share of broken images or empty captions above which the run stops", 0.05)
    shuffle_buffer: int = _option("rows in the shuffle buffer of a stream, per worker", 1_000)
    workers: int = _option("processes that decode images, per training process", 0)
    smallest_crop: float = _option("smallest share of an image in a random view of it; 1: whole and as it is", 1.0)
    cache_features: str = _option("folder of frozen features, computed once; training then reads no pixels", "")
    views: int = _option("cached views of each image: itself, then random views", 1)
    draws: int = _option("cached draws of location dropout of each view", 8)
    cache_seed: int = _option("of cached views and draws: runs of several seeds can share one cache", 0)

    max_steps: int = _option("optimiser steps", 2_000)
    batch_size: int = _option("captions per step and process", 64)
    accumulation: int = _option("batches that make one step", 1)
    learning_rate: float = _option("peak learning rate of AdamW", 1e-3)
    final_learning_rate: float = _option("learning rate at the end", 0.0)
    schedule: str = _option("decay of the learning rate after warm-up: `cosine` or `linear` (paper)", "cosine")
    weight_decay: float = _option("of matrices; none on biases and norms", 1e-6)
    warmup_steps: int = _option("steps of linear warm-up", 100)
    gradient_norm: float = _option("gradients are clipped to this norm; 0: never", 1.0)
    precision: str = _option(
        "`fp32`, `bf16` (autocast; weights stay fp32), or `auto`: bf16 on GPUs that have it", "auto"
    )
    seed: int = _option("of initialisation, views, draws and order", 0)

    evaluation_steps: int = _option("steps between two validations", 100)
    save_steps: int = _option(
        "steps between two checkpoints; 0: evaluation_steps, as it must be with validation_data", 0
    )
    logging_steps: int = _option("steps between two records of loss and throughput", 10)
    keep_checkpoints: int = _option("checkpoints that are kept, the best and the newest always among them; 0: all", 2)
    patience: int = _option("validations without gain after which training stops; 0: never", 0)
    describe_validation: int = _option("validation images per process to describe and score at each validation", 0)
    save: str = _option("final checkpoint: `slim`, `full`, `merged` (LoRA), or `auto`: slim where possible", "auto")
    report_to: str = _option(
        f"trackers, separated by commas, of {', '.join(TRACKERS)}; `auto`: those installed", "auto"
    )
    push_to_hub: str = _option("Hub repository (user/name) that gets the final checkpoint", "")
    processes: int = _option("stop unless the run has this many processes; 0: any number", 0)
    resume: bool = _option("go on from the newest checkpoint of output_dir, if there is one", False)

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers to report to."""
        if self.report_to == "auto":
            return [name for name in TRACKERS if importlib.util.find_spec(name)]
        return [name.strip() for name in self.report_to.split(",") if name.strip() not in ("", "none")]

    @property
    def steps_between_checkpoints(self) -> int:
        return self.save_steps or self.evaluation_steps

    def validate(self) -> None:
        """Raise a ValueError for what can be seen to be wrong before anything is loaded."""
        if self.checkpoint and (self.backbone or self.language_model):
            raise ValueError(
                f"checkpoint={self.checkpoint!r} brings its frozen parts: leave backbone and language_model out"
            )
        needed = ["train_data"] if self.checkpoint else ["backbone", "language_model", "train_data"]
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"the recipe names no {name}: set it in the YAML file or by --{name}")
        for name in ("views", "draws", "max_steps", "batch_size", "accumulation", "evaluation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("workers", "patience", "save_steps", "warmup_steps", "describe_validation", "gradient_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.keep_checkpoints < 0 or self.keep_checkpoints == 1:
            raise ValueError(
                f"keep_checkpoints={self.keep_checkpoints} must be at least 2, for the best and the newest, or 0 for all"
            )
        self._validate_choices()
        self._validate_steps()
        if not 0 <= self.final_learning_rate < self.learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate} must be below learning_rate={self.learning_rate}"
            )
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop={self.smallest_crop} must be a share of the image, above 0 and up to 1")
        if self.cache_features and self.views > 1 and self.smallest_crop == 1:
            raise ValueError(f"views={self.views} would be {self.views} times the same: set smallest_crop below 1")
        if self.cache_features and self.views == 1 and self.smallest_crop < 1:
            raise ValueError(
                f"smallest_crop={self.smallest_crop} would change nothing: the only view in the cache is the whole image; set "
                "views above 1, or smallest_crop to 1"
            )
        known = {f.name for f in dataclasses.fields(DevilConfig)}
        if unknown := sorted(set(self.model) - known):
            raise ValueError(f"model has fields {unknown} that DevilConfig does not have")
        if self.checkpoint and not self.new_translator and self.model:
            raise ValueError(
                f"model has fields {sorted(self.model)}, but the translator is that of {self.checkpoint}: "
                "set new_translator, or leave them out"
            )
        if self.checkpoint and not self.new_translator and self.layers is not None:
            raise ValueError(
                f"layers={self.layers}, but the translator of {self.checkpoint} reads its own: set new_translator, or leave "
                "them out"
            )
        if self.lora is not None:
            check_lora(self.lora)
        if self.save == "merged" and self.lora is None and not self.checkpoint:
            raise ValueError("save='merged' merges LoRA adapters, but the recipe has no lora")

    def _validate_choices(self) -> None:
        choices = {
            "resize": ("backbone", "paper"),
            "schedule": ("cosine", "linear"),
            "precision": ("auto", "fp32", "bf16"),
            "save": ("auto", "slim", "full", "merged"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"report_to names {name!r}, which is none of {', '.join(TRACKERS)}")
            if not importlib.util.find_spec(name):
                raise ValueError(f"report_to names {name!r}, which is not installed: pip install {name}")

    def _validate_steps(self) -> None:
        saving = self.steps_between_checkpoints
        if self.validation_data and saving != self.evaluation_steps:
            raise ValueError(
                f"save_steps={saving} must equal evaluation_steps={self.evaluation_steps} where there are validation_data: the "
                "best checkpoint is chosen among those that were validated; leave save_steps out"
            )
        if saving % self.logging_steps:
            raise ValueError(
                f"logging_steps={self.logging_steps} must divide the {saving} steps between two checkpoints: a run "
                "that goes on from one could not repeat the loss curve otherwise"
            )
        if any(str(source.get("split")).split("[")[0] == "test" for source in self.validation_data):
            raise ValueError(
                "validation_data names the split 'test': the best checkpoint is chosen on them, so a score on that split would "
                "no longer be held out; name another split"
            )
        if any(source.get("kind") == REGIONS for source in self.validation_data):
            raise ValueError(
                "validation_data names regions, but validation reads whole images: name captioned images, and leave regions to "
                "train_data"
            )
        if not self.validation_data and self.patience:
            raise ValueError("patience needs validation_data: without them nothing says when to stop")

    def to_yaml(self) -> str:
        """The recipe as YAML, as it can be trained again."""
        return yaml.safe_dump(dataclasses.asdict(self) | {"resume": False}, sort_keys=False)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Fields in which another recipe describes another run."""
        mine = dataclasses.asdict(self)
        return [name for name in mine if name not in OF_THE_CALL and name in other and other[name] != mine[name]]


def parse_recipe(arguments: list[str] | None = None, description: str = "") -> Recipe:
    """A recipe from `--config FILE` and one option per field; lists and dictionaries are given as JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_options(parser)
    return recipe_of(parser.parse_args(arguments))


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and one option per field of `Recipe`, with hyphens or underscores."""
    parser.add_argument("--config", type=Path, help="YAML file of these fields, or a checkpoint that holds one")
    hints = typing.get_type_hints(Recipe)
    for option in dataclasses.fields(Recipe):
        hint, name = hints[option.name], option.name
        default = getattr(Recipe, name, None)  # lists and dictionaries have a factory, and are empty
        note = option.metadata["help"] + ("" if default in ("", None, False) else f" (default: {default})")
        names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": note}
        if hint is bool:
            parser.add_argument(*names, type=_json, nargs="?", const=True, metavar="true|false", **settings)
        else:
            kind = hint if hint in (str, int, float) else _json
            parser.add_argument(*names, type=kind, metavar=name.upper() if kind is not _json else "JSON", **settings)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error


def recipe_of(namespace: argparse.Namespace) -> Recipe:
    """The recipe of parsed options: the file's fields, and over them those given on the command line.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for unknown fields, values of a wrong type, and whatever `Recipe.validate` finds.
    """
    values = {} if namespace.config is None else read_recipe(namespace.config)
    return make_recipe(values | given_fields(namespace))


def given_fields(namespace: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields among parsed options."""
    names = {option.name for option in dataclasses.fields(Recipe)}
    return {name: value for name, value in vars(namespace).items() if name in names}


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A checked recipe of fields as a YAML file has them.

    Raises:
        ValueError: for values of a wrong type, and whatever `Recipe.validate` finds.
    """
    hints, values = typing.get_type_hints(Recipe), dict(values)
    for name, value in values.items():
        if hints[name] in (int, float):  # YAML reads 1e-3 as text
            if hints[name] is int and isinstance(value, float) and not value.is_integer():
                raise ValueError(f"{name}={value!r} must be a whole number")
            try:
                values[name] = hints[name](value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}={value!r} is not a number") from error
        elif not isinstance(value, hints[name]):
            raise ValueError(f"{name}={value!r} must be of type {getattr(hints[name], '__name__', hints[name])}")
    recipe = Recipe(**values)
    recipe.validate()
    return recipe


def read_recipe(path: Path) -> dict[str, Any]:
    """Fields of a recipe file, or of the one in a checkpoint folder."""
    file = path / RECIPE_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no recipe {file}")
    values = yaml.safe_load(file.read_text()) or {}
    check_fields(values, str(file))
    return values


def check_fields(values: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError for fields that no recipe has."""
    names = sorted(option.name for option in dataclasses.fields(Recipe))
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{where} has fields {unknown} that no recipe has; fields are {names}")
