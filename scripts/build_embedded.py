"""Build the embedded world's checkpoint: `python scripts/build_embedded.py --output-dir runs/embedded --stage all`.

Stages: `backbone` and `language-model` train the frozen parts and may run at the same time; `translator` trains between them by
the quickstart's recipe and writes the self-contained checkpoint, in half precision, that belongs into
`src/devil_hf/checkpoints/shapes`. Started again, a stage that was stopped goes on.
`devil evaluate shapes --checkpoint runs/embedded/checkpoint` measures it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
from shipped import write_shipped
from transformers.utils import logging

from devil_hf.checkpoints import SCOPES, SHAPES
from devil_hf.cli.main import bounded
from devil_hf.data.worlds import World
from devil_hf.folders import claimed, write_json, written
from devil_hf.settings import make, option, parse, read_yaml
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from devil_hf.training.small_models.shapes_backbone import ShapesBackboneSettings, probe_shapes_backbone, train_shapes_backbone
from devil_hf.training.small_models.shapes_language_model import (
    ShapesLanguageModelSettings,
    held_out_document_losses,
    train_shapes_language_model,
)

SCOPE_IMAGES = 500  # whose features say what is like the training
LAYERS = ["layer1", "layer2", "layer3", "layer4"]


@dataclass
class BuildSettings:
    """What to build and where."""

    output_dir: Path = option("folder of the parts: backbone, language_model, checkpoint", Path("runs/embedded"))
    stage: Literal["backbone", "language-model", "translator", "all"] = option("which part to build", "all")
    seed: int = option("of every part", 0)
    threads: int = option("threads of torch", 1)
    backbone_steps: int = option("optimiser steps of the backbone", ShapesBackboneSettings.max_steps)
    language_model_steps: int = option("those of the language model", ShapesLanguageModelSettings.max_steps)
    translator_steps: int = option("those of the translator", 750)
    scenes: int = option("training scenes of the translator", 6_000)


def build_backbone(settings: BuildSettings) -> None:
    """Train, probe and save the backbone as a directory that timm loads as `local-dir:PATH`."""
    folder = settings.output_dir / "backbone"
    unfinished = settings.output_dir / "backbone.unfinished.pt"
    own = ShapesBackboneSettings(seed=settings.seed, max_steps=settings.backbone_steps)
    backbone, history = train_shapes_backbone(own, unfinished=unfinished)
    with written(folder) as whole:
        timm.models.save_for_hf(backbone, whole, safe_serialization=True)
    report = {"probe_f1": probe_shapes_backbone(backbone), "history": history}
    write_json(folder.with_suffix(".json"), report)
    unfinished.unlink(missing_ok=True)
    print(f"{folder}: F1 of linear probes {report['probe_f1']}")


def build_language_model(settings: BuildSettings) -> None:
    """Train, measure and save the language model with its tokenizer."""
    folder = settings.output_dir / "language_model"
    unfinished = settings.output_dir / "language_model.unfinished.pt"
    own = ShapesLanguageModelSettings(seed=settings.seed, max_steps=settings.language_model_steps)
    model, tokenizer, history = train_shapes_language_model(own, unfinished=unfinished)
    with written(folder) as whole:
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
    report = {"held_out_losses": held_out_document_losses(model, tokenizer), "history": history}
    write_json(folder.with_suffix(".json"), report)
    unfinished.unlink(missing_ok=True)
    print(f"{folder}: held-out losses {report['held_out_losses']}")


def translator_recipe(settings: BuildSettings) -> Recipe:
    """The quickstart's recipe with the parts that were built here."""
    fields = read_yaml(Recipe, Path("quickstart"))
    training = settings.output_dir / "training"
    fields |= {"output_dir": str(training), "cache_features": str(training / "features"), "save": "full", "resume": True}
    fields |= {
        "resume": True,
        "checkpoint": "",
        "new_translator": False,
        "layers": LAYERS,
        "report_to": "none",
        "seed": settings.seed,
    }
    fields |= {part: str(settings.output_dir / part) for part in ("backbone", "language_model")}
    fields |= {"max_steps": settings.translator_steps, "warmup_steps": settings.translator_steps // 20}
    fields["model"] |= {"scope": SCOPES[SHAPES]}
    fields["train_data"][0] |= {"size": settings.scenes}
    return make(Recipe, fields)


def build_translator(settings: BuildSettings) -> None:
    """Train the translator between the two parts and save all three as one half-precision checkpoint."""
    folder = settings.output_dir / "checkpoint"
    scenes = [scene.image for scene in World(SCOPE_IMAGES, settings.seed).scenes()]  # by which it knows what is unlike them
    write_shipped(train(translator_recipe(settings)), scenes, folder)
    print(f"{folder}: measure it by `devil evaluate shapes --checkpoint {folder}`")


def main() -> None:
    settings = parse(BuildSettings, sys.argv[1:], description=__doc__)
    logging.set_verbosity_info()
    torch.set_num_threads(settings.threads)
    stages = {"backbone": build_backbone, "language-model": build_language_model, "translator": build_translator}
    for stage in stages if settings.stage == "all" else [settings.stage]:
        with claimed(settings.output_dir / "claims" / stage, f"the stage {stage}"):  # others may be worked on at the same time
            stages[stage](settings)


if __name__ == "__main__":
    sys.exit(bounded("build_embedded.py", main))
