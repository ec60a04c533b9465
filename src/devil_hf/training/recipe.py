"""A recipe: everything that a training run is, in one dataclass and one YAML file of the same fields.

Any field can be given on the command line over the file. The resolved recipe is written beside the checkpoint, and can be
trained again from there.
"""

import argparse
import dataclasses
import json
import typing
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from datasets import concatenate_datasets
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoTokenizer
from transformers import EarlyStoppingCallback
from transformers import TrainingArguments
from transformers import set_seed
from transformers.utils import logging

from devil_hf.configuration_devil import DevilConfig
from devil_hf.data.captions import load_caption_folder
from devil_hf.image_processing_devil import DevilImageProcessor
from devil_hf.modeling_devil import DevilModel
from devil_hf.processing_devil import DevilProcessor
from devil_hf.training.features import PooledCaptions
from devil_hf.training.features import pooled_feature_draws
from devil_hf.training.trainer import DevilTrainer

logger = logging.get_logger(__name__)

RECIPE_FILE = "recipe.yaml"
CHECKPOINT_FOLDER = "checkpoint"


def _option(help: str, default: Any = dataclasses.MISSING) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """A training run of one translator on captioned images, with the backbone's features computed once."""

    output_dir: str = _option("folder of the run; the model ends up in its `checkpoint` folder", "runs/devil")
    backbone: str = _option("timm or transformers id, or local directory, of the backbone", "")
    language_model: str = _option("id or local directory of the language model and its tokenizer", "")
    folders: list = _option("caption folders: images with a captions.jsonl or metadata.jsonl", [])
    backbone_kwargs: dict = _option("further arguments of the backbone's architecture", {})
    layers: list | None = _option("names or indices of layers; default: the backbone's stages", None)
    class_tokens: bool = _option("also read class tokens, as layers of their own", False)
    resize: str = _option("`backbone`: its own evaluation preprocessing; `paper`: short side to the crop", "backbone")
    train_split: str = _option("split to train on", "train")
    validation_split: str = _option("split whose loss chooses the checkpoint; never the test split", "val")
    model: dict = _option("fields of DevilConfig: translator sizes, dropouts, null_probability", {})
    views: int = _option("views of each training image: itself, then mirrored random crops", 1)
    smallest_crop: float = _option("smallest share of the image that a random crop keeps", 0.6)
    draws: int = _option("location draws of each view", 8)
    max_steps: int = _option("optimiser steps", 2_000)
    batch_size: int = _option("captions per step", 64)
    learning_rate: float = _option("peak learning rate of AdamW, cosine decay to zero", 1e-3)
    weight_decay: float = _option("of matrices; none on biases and norms", 1e-6)
    warmup_steps: int = _option("steps of linear warm-up", 100)
    evaluation_steps: int = _option("steps between two validations", 100)
    patience: int = _option("validations without gain after which training stops", 10)
    bf16: bool = _option("compute in bfloat16 by autocast; weights stay in fp32", False)
    seed: int = _option("of initialisation, views, draws and order", 0)

    def validate(self) -> None:
        """Raise a clear error for what can be seen to be wrong before anything is loaded."""
        for name in ("backbone", "language_model", "folders"):
            if not getattr(self, name):
                raise ValueError(f"the recipe names no {name}: set it in the YAML file or by --{name}")
        for name in ("views", "draws", "max_steps", "batch_size", "evaluation_steps", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop={self.smallest_crop} must be a share of the image, above 0 and up to 1")
        if self.resize not in ("backbone", "paper"):
            raise ValueError(f"resize={self.resize!r} is neither 'backbone' nor 'paper'")
        known = {f.name for f in dataclasses.fields(DevilConfig)}
        unknown = sorted(set(self.model) - known)
        if unknown:
            raise ValueError(f"model has fields {unknown} that DevilConfig does not have")

    def save(self, folder: Path) -> None:
        """Write the recipe as YAML into `folder`."""
        (folder / RECIPE_FILE).write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


def parse_recipe(arguments: list[str] | None = None, description: str = "") -> Recipe:
    """A recipe from `--config FILE` and one option per field; lists and dictionaries are given as JSON."""
    parser = argparse.ArgumentParser(description=description)
    add_recipe_options(parser)
    return recipe_of(parser.parse_args(arguments))


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and one option per field of `Recipe`."""
    parser.add_argument("--config", type=Path, help="YAML file of these fields")
    hints = typing.get_type_hints(Recipe)
    for option in dataclasses.fields(Recipe):
        plain = hints[option.name] in (str, int, float)
        kind = hints[option.name] if plain else json.loads
        default = getattr(Recipe, option.name, None)  # lists and dictionaries have a factory, and are empty
        note = option.metadata["help"] + ("" if default in ("", None) else f" (default: {default})")
        parser.add_argument(f"--{option.name}", type=kind, default=argparse.SUPPRESS, help=note)


def recipe_of(namespace: argparse.Namespace) -> Recipe:
    """The recipe of parsed options: the file's fields, and over them those given on the command line."""
    names = {option.name for option in dataclasses.fields(Recipe)}
    values: dict[str, Any] = {}
    if namespace.config is not None:
        values = yaml.safe_load(namespace.config.read_text()) or {}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"{namespace.config} has fields {unknown} that no recipe has; fields are {sorted(names)}")
    values |= {name: value for name, value in vars(namespace).items() if name in names}
    hints = typing.get_type_hints(Recipe)
    for name, value in values.items():
        if hints[name] in (int, float):  # YAML reads 1e-3 as text
            try:
                values[name] = hints[name](value)
            except ValueError as error:
                raise ValueError(f"{name}={value!r} is not a number") from error
    recipe = Recipe(**values)
    recipe.validate()
    return recipe


def train(recipe: Recipe) -> Path:
    """Train a translator by a recipe.

    Returns:
        The folder of the best checkpoint by validation loss, with its processor and the recipe.
    """
    recipe.validate()
    set_seed(recipe.seed)
    training, validation = (_open(recipe.folders, split) for split in (recipe.train_split, recipe.validation_split))
    arguments = TrainingArguments(
        output_dir=recipe.output_dir,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        eval_strategy="steps",
        eval_steps=recipe.evaluation_steps,
        save_strategy="steps",
        save_steps=recipe.evaluation_steps,
        save_total_limit=2,
        logging_steps=recipe.evaluation_steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        bf16=recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),  # asked for by bf16 where there is no accelerator
        seed=recipe.seed,
        report_to=[],
    )
    tokenizer = AutoTokenizer.from_pretrained(recipe.language_model)
    model = DevilModel.from_backbone_and_language_model(
        recipe.backbone,
        recipe.language_model,
        recipe.layers,
        tokenizer=tokenizer,
        class_tokens=recipe.class_tokens,
        backbone_kwargs=recipe.backbone_kwargs,
        **recipe.model,
    )
    data_config = model.config.backbone_config["data_config"]
    processor = DevilProcessor(DevilImageProcessor.from_data_config(data_config, resize=recipe.resize), tokenizer)
    model.to(arguments.device)
    trainer = DevilTrainer(
        model,
        arguments,
        processor,
        train_dataset=cached_captions(model, processor, training, recipe),
        eval_dataset=cached_captions(model, processor, validation, None),
        callbacks=[EarlyStoppingCallback(recipe.patience)],
    )
    trainer.train()
    checkpoint = Path(recipe.output_dir) / CHECKPOINT_FOLDER
    trainer.save_model(str(checkpoint))
    if trainer.is_world_process_zero():
        recipe.save(checkpoint)
    return checkpoint


def cached_captions(
    model: DevilModel, processor: DevilProcessor, dataset: Dataset, recipe: Recipe | None, batch_size: int = 32
) -> PooledCaptions:
    """Pooled features of captioned images: views and draws as the recipe says, or (None) each image whole, for validation."""
    views = 1 if recipe is None else recipe.views
    per_view = []
    for view in range(views):

        def batches(view: int = view):
            for start in range(0, len(dataset), batch_size):
                images = dataset[start : start + batch_size]["image"]
                if view > 0 and recipe is not None:
                    images = [random_view(image, recipe.smallest_crop) for image in images]
                yield processor(images=images, return_tensors="pt")["pixel_values"]

        name = "validation features" if recipe is None else f"training features, view {view + 1} of {views}"
        draws = None if recipe is None else recipe.draws
        per_view.append(pooled_feature_draws(model, batches(), draws, name, -(-len(dataset) // batch_size)))
    features = [torch.cat(layers, dim=1) for layers in zip(*per_view, strict=True)]
    return PooledCaptions(features, dataset["captions"][:], every_caption=recipe is None)


def random_view(image: Image.Image, smallest_crop: float) -> Image.Image:
    """A random crop of at least `smallest_crop` of the image's area, mirrored half of the time."""
    image = image.convert("RGB")
    top, left, height, width = v2.RandomResizedCrop.get_params(image, [smallest_crop, 1.0], [0.75, 4 / 3])
    crop = image.crop((left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else crop


def _open(folders: list[str], split: str) -> Dataset:
    return concatenate_datasets([load_caption_folder(folder, split) for folder in folders])
