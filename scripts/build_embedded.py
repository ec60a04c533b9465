"""Build the embedded world's checkpoint: `python scripts/build_embedded.py --output_dir runs/embedded --stage all`.

Stages: `backbone` and `language-model` train the frozen parts and may run at the same time; `translator` trains between
them.
"""

import json
import logging
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Literal

import timm
import torch
from transformers import HfArgumentParser

from devil_hf.training.embedded import EmbeddedBackboneArguments
from devil_hf.training.embedded import EmbeddedLanguageModelArguments
from devil_hf.training.embedded import held_out_document_losses
from devil_hf.training.embedded import probe_embedded_backbone
from devil_hf.training.embedded import train_embedded_backbone
from devil_hf.training.embedded import train_embedded_language_model

logger = logging.getLogger("devil_hf.build_embedded")


@dataclass
class BuildArguments:
    """What to build and where."""

    output_dir: str = field(
        default="runs/embedded", metadata={"help": "Folder of the parts: backbone, language_model, translator."}
    )
    stage: Literal["backbone", "language-model", "translator", "all"] = field(
        default="all", metadata={"help": "Which part to build."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every part."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    backbone_steps: int = field(
        default=EmbeddedBackboneArguments.max_steps, metadata={"help": "Optimiser steps of the backbone."}
    )
    language_model_steps: int = field(
        default=EmbeddedLanguageModelArguments.max_steps, metadata={"help": "Optimiser steps of the language model."}
    )


def build_backbone(arguments: BuildArguments, folder: Path) -> None:
    """Train, probe and save the backbone as a directory that timm loads as `local-dir:PATH`."""
    backbone, history = train_embedded_backbone(
        EmbeddedBackboneArguments(seed=arguments.seed, max_steps=arguments.backbone_steps)
    )
    timm.models.save_for_hf(backbone, folder, safe_serialization=True)
    report = {"probe_f1": probe_embedded_backbone(backbone), "history": history}
    folder.with_suffix(".json").write_text(json.dumps(report, indent=1))
    logger.info(f"{folder}: F1 of linear probes {report['probe_f1']}")


def build_language_model(arguments: BuildArguments, folder: Path) -> None:
    """Train, measure and save the language model with its tokenizer."""
    settings = EmbeddedLanguageModelArguments(seed=arguments.seed, max_steps=arguments.language_model_steps)
    model, tokenizer, history = train_embedded_language_model(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {"held_out_losses": held_out_document_losses(model, tokenizer), "history": history}
    folder.with_suffix(".json").write_text(json.dumps(report, indent=1))
    logger.info(f"{folder}: held-out losses {report['held_out_losses']}")


def main() -> None:
    (arguments,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(arguments.threads)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.stage in ("backbone", "all"):
        build_backbone(arguments, output / "backbone")
    if arguments.stage in ("language-model", "all"):
        build_language_model(arguments, output / "language_model")


if __name__ == "__main__":
    main()
