"""Build the photographs' checkpoint: `python scripts/build_photos.py --data DATA --backbone WEIGHTS --output-dir runs/photos`.

Stages: `backbone` writes EfficientNet-Lite0's weights as a folder for timm, `language-model` trains a GPT-2 of captions from text
alone, `translator` trains between them on whole images and on the regions of Flickr30k Entities and writes the self-contained
checkpoint, in half precision, that belongs into `src/devil_hf/checkpoints/photos`. Started again, a stopped stage goes on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
from photos_text import read_text
from PIL import Image
from safetensors.torch import load_file
from shipped import write_shipped
from transformers.utils import logging

from devil_hf.checkpoints import PHOTOS, SCOPES
from devil_hf.cli.main import bounded
from devil_hf.data.pairs.folder import read_caption_folder
from devil_hf.folders import claimed, write_json, written
from devil_hf.model.image_processing_devil import load_images
from devil_hf.settings import make, option, parse, read_yaml
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from devil_hf.training.small_models.caption_language_model import CaptionLanguageModelSettings, train_caption_language_model

ARCHITECTURE = "tf_efficientnet_lite0"
SIDE = 256  # pixels; 16 x 16 places at blocks.4
RECIPE = Path(__file__).parent / "recipes" / "photos.yaml"
SCOPE_IMAGES = 500  # whose features say what is like the training
HELD_OUT = 300  # images whose captions the language model is measured on


@dataclass
class PhotosSettings:
    """What to build, from what, and where."""

    data: Path = option("folder with captions/ and text/")
    backbone: Path = option("safetensors with the weights of tf_efficientnet_lite0, by timm's names")
    output_dir: Path = option("folder of the parts: backbone, language_model, checkpoint", Path("runs/photos"))
    stage: Literal["backbone", "language-model", "translator", "all"] = option("which part to build", "all")
    seed: int = option("of every part", 0)
    threads: int = option("threads of torch", 1)
    language_model_steps: int = option("optimiser steps of the language model", 3_600)
    translator_steps: int | None = option("those of the translator (default: the recipe's)", None)


def build_backbone(settings: PhotosSettings) -> None:
    """Save the backbone without its classifier, as a directory that timm loads as `local-dir:PATH`; images become squares."""
    backbone = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0)
    weights = load_file(settings.backbone)
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    backbone.pretrained_cfg |= {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "crop_mode": "squash"}
    folder = settings.output_dir / "backbone"
    with written(folder) as whole:
        timm.models.save_for_hf(backbone, whole, safe_serialization=True)
    print(f"{folder}: {sum(parameter.numel() for parameter in backbone.parameters())} parameters")


def build_language_model(settings: PhotosSettings) -> None:
    """Train, measure and save the language model with its tokenizer."""
    text = read_text(settings.data)
    print(text.counts, flush=True)
    folder = settings.output_dir / "language_model"
    unfinished = settings.output_dir / "language_model.unfinished.pt"
    own = CaptionLanguageModelSettings(
        seed=settings.seed,
        max_steps=settings.language_model_steps,
        vocab_size=5_000,
        context_length=96,
        batch_size=128,
        bf16=True,
        logging_steps=600,
    )
    model, tokenizer, history = train_caption_language_model(text.groups, own, text.held_out[:HELD_OUT], unfinished=unfinished)
    with written(folder) as whole:
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
    write_json(folder.with_suffix(".json"), {"text": text.counts, "history": history})
    unfinished.unlink(missing_ok=True)
    print(f"{folder}: {model.num_parameters()} parameters, {history[-1]}")


def translator_recipe(settings: PhotosSettings) -> Recipe:
    """The recipe `photos.yaml` with the folders of this build."""
    fields = read_yaml(Recipe, RECIPE)
    training = settings.output_dir / "training"
    fields |= {"output_dir": str(training), "cache_features": str(training / "features"), "save": "full", "resume": True}
    fields |= {part: str(settings.output_dir / part) for part in ("backbone", "language_model")}
    fields |= {"seed": settings.seed, "report_to": "none"}
    fields |= {} if settings.translator_steps is None else {"max_steps": settings.translator_steps}
    fields["model"] |= {"scope": SCOPES[PHOTOS]}
    for source in fields["train_data"] + fields["validation_data"]:
        source["path"] = str(settings.data / source["path"])
    return make(Recipe, fields)


def training_images(settings: PhotosSettings) -> list[Image.Image]:
    """Some training photographs, by which the checkpoint knows what is unlike them."""
    files = read_caption_folder(settings.data / "captions" / "flickr8k", "train")
    return [image for file in files[:: len(files) // SCOPE_IMAGES] for image in load_images(str(file.path))]


def build_translator(settings: PhotosSettings) -> None:
    """Train the translator between the two parts and save all three as one half-precision checkpoint."""
    folder = settings.output_dir / "checkpoint"
    write_shipped(train(translator_recipe(settings)), training_images(settings), folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")


def main() -> None:
    settings = parse(PhotosSettings, sys.argv[1:], description=__doc__)
    logging.set_verbosity_info()
    torch.set_num_threads(settings.threads)
    stages = {"backbone": build_backbone, "language-model": build_language_model, "translator": build_translator}
    for stage in stages if settings.stage == "all" else [settings.stage]:
        with claimed(settings.output_dir / "claims" / stage, f"the stage {stage}"):  # others may be worked on at the same time
            stages[stage](settings)


if __name__ == "__main__":
    sys.exit(bounded("build_photos.py", main))
