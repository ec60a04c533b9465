"""A recipe: everything that a training run is, as one settings dataclass, and so one YAML file and one command line.

Any field can be given on the command line over the file. The resolved recipe is written into every checkpoint, and can be trained
again from there.
"""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from devil_hf.build.lora_devil import check_lora
from devil_hf.data.pairs import REGION_KINDS
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.settings import option

RECIPE_FILE = "recipe.yaml"
SHIPPED = Path(__file__).parent / "recipes"  # recipes that come with the package, and are called by their names
CHECKPOINT_FOLDER = "checkpoint"
TRACKERS = ("tensorboard", "trackio", "wandb")
REVISIONS = ("backbone_revision", "language_model_revision", "tokenizer_revision")
# What a run does, not what it is: left out when two recipes are compared.
OF_THE_CALL = ("output_dir", "resume", "report_to", "push_to_hub", "processes", "keep_checkpoints", "workers")


@dataclass
class Recipe:
    """A training run: frozen parts, captioned images, the translator between them, and how it is trained."""

    output_dir: str = option("folder of the run; the model ends up in its `checkpoint` folder", "runs/devil")

    backbone: str = option("timm or transformers id, or local directory, of the backbone", "")
    backbone_revision: str = option("commit, branch or tag of the backbone's Hub repository", "")
    language_model: str = option("id or local directory of the language model and its tokenizer", "")
    language_model_revision: str = option("commit, branch or tag of the language model's Hub repository", "")
    tokenizer_revision: str = option("that of the tokenizer; default: the language model's", "")
    checkpoint: str = option("instead of both: a DeViL checkpoint to go on from; `shapes` is the shipped one", "")
    new_translator: bool = option("with a checkpoint: keep its frozen parts only", False)
    backbone_kwargs: dict = option("further arguments of the backbone's architecture", {})
    layers: list | None = option("names or indices of layers; default: the backbone's stages, or those of the checkpoint", None)
    class_tokens: bool = option("also read class tokens, as layers of their own", False)
    resize: Literal["backbone", "paper"] = option(
        "`backbone`: its own evaluation preprocessing; `paper`: short side to the crop", "backbone"
    )
    model: dict = option("fields of DevilConfig: translator type and sizes, dropouts, null_probability", {})
    lora: dict | None = option("LoRA on the language model: rank, alpha, dropout, target_modules; {} for the defaults", None)

    train_data: list = option("sources of captioned images, each with a `kind`; see devil_hf/data/pairs", [])
    validation_data: list = option("sources whose loss chooses the checkpoint; never the test split", [])
    validation_images: int = option("validate on the first so many images", 2_000)
    bad_samples: float = option("share of broken images or empty captions above which the run stops", 0.05)
    shuffle_buffer: int = option("rows in the shuffle buffer of a stream, per worker", 1_000)
    workers: int = option("processes that decode images, per training process", 0)
    smallest_crop: float = option("smallest share of an image in a random view of it; 1: whole and as it is", 1.0)
    cache_features: str = option("folder of frozen features, computed once; training then reads no pixels", "", metavar="DIR")
    views: int = option("cached views of each image: itself, then random views", 1)
    draws: int = option("cached draws of location dropout of each view", 8)
    cache_seed: int = option("of cached views and draws: runs of several seeds can share one cache", 0)

    max_steps: int = option("optimiser steps", 2_000)
    batch_size: int = option("captions per step and process", 64)
    accumulation: int = option("batches that make one step", 1)
    learning_rate: float = option("peak learning rate of AdamW", 1e-3)
    final_learning_rate: float = option("learning rate at the end", 0.0)
    schedule: Literal["cosine", "linear"] = option(
        "decay of the learning rate after warm-up: `cosine` or `linear` (paper)", "cosine"
    )
    weight_decay: float = option("of matrices; none on biases and norms", 1e-6)
    warmup_steps: int = option("steps of linear warm-up", 100)
    gradient_norm: float = option("gradients are clipped to this norm; 0: never", 1.0)
    precision: Literal["auto", "fp32", "bf16"] = option(
        "`fp32`, `bf16` (autocast; weights stay fp32), or `auto`: bf16 on GPUs that have it", "auto"
    )
    seed: int = option("of initialisation, views, draws and order", 0)

    evaluation_steps: int = option("steps between two validations", 100)
    save_steps: int = option("steps between two checkpoints; 0: evaluation_steps, as it must be with validation_data", 0)
    logging_steps: int = option("steps between two records of loss and throughput", 10)
    keep_checkpoints: int = option("checkpoints that are kept, the best and the newest always among them; 0: all", 2)
    patience: int = option("validations without gain after which training stops; 0: never", 0)
    describe_validation: int = option("validation images per process to describe and score at each validation", 0)
    save: Literal["auto", "slim", "full", "merged"] = option(
        "final checkpoint: `slim`, `full`, `merged` (LoRA), or `auto`: slim where possible", "auto"
    )
    report_to: str = option(
        f"trackers, separated by commas, of {', '.join(TRACKERS)}; `auto`: those installed", "auto", metavar="TRACKERS"
    )
    push_to_hub: str = option("Hub repository that gets the final checkpoint", "", metavar="USER/REPO")
    processes: int = option("stop unless the run has this many processes; 0: any number", 0)
    resume: bool = option("go on from the newest checkpoint of output_dir, if there is one", False)

    @staticmethod
    def locate(place: Path) -> Path:
        """The YAML file of a recipe file, of a checkpoint folder, or of a recipe that comes with the package (`quickstart`)."""
        file = place / RECIPE_FILE if place.is_dir() else place
        shipped = SHIPPED / f"{place.name}.yaml"
        return shipped if not file.is_file() and place == Path(place.name) and shipped.is_file() else file

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers to report to."""
        if self.report_to == "auto":
            return [name for name in TRACKERS if importlib.util.find_spec(name)]
        return [name.strip() for name in self.report_to.split(",") if name.strip() not in ("", "none")]

    @property
    def steps_between_checkpoints(self) -> int:
        """`save_steps`, or by default `evaluation_steps`."""
        return self.save_steps or self.evaluation_steps

    def validate(self) -> None:
        """Raise a ValueError for fields that do not go together, which can be seen before anything is loaded."""
        self._validate_parts()
        self._validate_model()
        self._validate_numbers()
        self._validate_views()
        self._validate_steps()
        self._validate_validation()
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"report_to names {name!r}, which is none of {', '.join(TRACKERS)}")
            if not importlib.util.find_spec(name):
                raise ValueError(f"report_to names {name!r}, which is not installed: pip install {name}")

    def _validate_parts(self) -> None:
        if self.checkpoint:
            own = [name for name in ("backbone", "language_model", *REVISIONS) if getattr(self, name)]
            if own:
                raise ValueError(
                    f"checkpoint={self.checkpoint!r} brings its frozen parts: leave backbone and language_model out ({own})"
                )
        for name in ["train_data"] if self.checkpoint else ["backbone", "language_model", "train_data"]:
            if not getattr(self, name):
                flag = name.replace("_", "-")
                raise ValueError(f"the recipe names no {name}: set it in the YAML file or by --{flag}")

    def _validate_model(self) -> None:
        known = {field.name for field in dataclasses.fields(DevilConfig)}
        if unknown := sorted(set(self.model) - known):
            raise ValueError(f"model has fields {unknown} that DevilConfig does not have")
        if self.checkpoint and not self.new_translator:
            if self.model:
                raise ValueError(
                    f"model has fields {sorted(self.model)}, but the translator is that of {self.checkpoint}: "
                    "set new_translator, or leave them out"
                )
            if self.layers is not None:
                raise ValueError(
                    f"layers={self.layers}, but the translator of {self.checkpoint} reads its own: set new_translator, or "
                    "leave them out"
                )
        if self.lora is not None:
            check_lora(self.lora)
        if self.save == "merged" and self.lora is None and not self.checkpoint:
            raise ValueError("save='merged' merges LoRA adapters, but the recipe has no lora")

    def _validate_numbers(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a finite number")
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
        if not 0 <= self.final_learning_rate < self.learning_rate:
            raise ValueError(f"final_learning_rate={self.final_learning_rate} must be below learning_rate={self.learning_rate}")

    def _validate_views(self) -> None:
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop={self.smallest_crop} must be a share of the image, above 0 and up to 1")
        if self.cache_features and self.views > 1 and self.smallest_crop == 1:
            raise ValueError(f"views={self.views} would be {self.views} times the same: set smallest_crop below 1")
        if self.cache_features and self.views == 1 and self.smallest_crop < 1:
            raise ValueError(
                f"smallest_crop={self.smallest_crop} would change nothing: the only view in the cache is the whole image; set "
                "views above 1, or smallest_crop to 1"
            )

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

    def _validate_validation(self) -> None:
        if any(str(source.get("split")).split("[")[0] == "test" for source in self.validation_data):
            raise ValueError(
                "validation_data names the split 'test': the best checkpoint is chosen on them, so a score on that split would "
                "no longer be held out; name another split"
            )
        if any(source.get("kind") in REGION_KINDS for source in self.validation_data):
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


__all__ = ["CHECKPOINT_FOLDER", "RECIPE_FILE", "Recipe"]
