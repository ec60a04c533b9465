"""Build the embedded world's checkpoint: `python scripts/build_embedded.py --output_dir runs/embedded --stage all`.

Stages: `backbone` and `language-model` train the frozen parts and may run at the same time; `translator` trains between
them and writes the self-contained checkpoint, in half precision, that belongs into `src/devil_hf/checkpoints/shapes`.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import timm
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from devil_hf import DevilImageProcessor, DevilProcessor
from devil_hf.build import backbone_from_source
from devil_hf.report.quickstart import report, train_translator
from devil_hf.training.small_models import (
    EmbeddedBackboneArguments,
    EmbeddedLanguageModelArguments,
    held_out_document_losses,
    probe_embedded_backbone,
    train_embedded_backbone,
    train_embedded_language_model,
)

logger = logging.getLogger("devil_hf.build_embedded")

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


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
    translator_steps: int = field(default=750, metadata={"help": "Optimiser steps of the translator."})
    scenes: int = field(default=6_000, metadata={"help": "Training scenes of the translator."})


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


def build_translator(arguments: BuildArguments, output: Path) -> None:
    """Train the translator between the two parts and save all three as one half-precision checkpoint."""
    backbone = backbone_from_source(output / "backbone", LAYERS)
    # The checkpoint holds the weights itself; the folder they came from means nothing elsewhere.
    backbone.config |= {"source": None, "revision": None}
    language_model = AutoModelForCausalLM.from_pretrained(output / "language_model")
    tokenizer = AutoTokenizer.from_pretrained(output / "language_model")
    processor = DevilProcessor(DevilImageProcessor.from_data_config(backbone.config["data_config"]), tokenizer)
    model = train_translator(
        backbone,
        language_model.eval(),
        processor,
        output / "training",
        arguments.scenes,
        arguments.translator_steps,
        arguments.seed,
    )
    model.half().save_pretrained(output / "checkpoint")
    processor.save_pretrained(output / "checkpoint")
    for code in (output / "checkpoint").glob("*.py"):
        code.unlink()  # inside the package, the package is the code
    scores = report(output / "checkpoint", output, held_out=500, say=logger.info)
    logger.info(f"{output / 'checkpoint'}: {scores}")


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
    if arguments.stage in ("translator", "all"):
        build_translator(arguments, output)


if __name__ == "__main__":
    main()
