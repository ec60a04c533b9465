r"""Train a caption language model from text alone.

    python scripts/prepare_language_model.py --output-dir language_model --bf16 \
        --flickr-tokens Flickr8k.token.txt.gz --coco-captions captions_val2017.json.gz \
        --held-out-images Flickr_8k.devImages.txt Flickr_8k.testImages.txt --caption-folders flickr8k coco

Captions of the images named in `held-out-images`, and of every image of `caption-folders` whose split is not `train`,
are left out of the text; those of the first `held-out-images` file measure the loss. Started again, a training that was stopped
goes on.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from devil_hf.cli.main import bounded
from devil_hf.data.pairs.files import read_coco_captions, read_flickr_captions, without_images
from devil_hf.data.pairs.folder import read_caption_folder
from devil_hf.folders import claimed, write_json
from devil_hf.settings import option, parse
from devil_hf.text_files import read_list
from devil_hf.training.small_models.caption_language_model import CaptionLanguageModelSettings, train_caption_language_model


@dataclass
class TextSettings(CaptionLanguageModelSettings):
    """Which captions are read, where the model goes, and how it is trained."""

    output_dir: Path = option("where model, tokenizer and training_log.json are written", Path("language_model"))
    flickr_tokens: list[Path] = option("Flickr token files, plain or .gz", [])
    coco_captions: list[Path] = option("COCO caption JSON files, plain or .gz", [])
    held_out_images: list[Path] = option("lists of image names to leave out, one a line; the first one is measured", [])
    caption_folders: list[Path] = option("caption folders whose images outside split train are left out", [])
    threads: int = option("CPU threads; 0 keeps PyTorch's choice", 0)


def read_text(settings: TextSettings) -> tuple[list[list[str]], list[list[str]] | None]:
    """The captions of each training image, and those of the images that are measured."""
    lists = [read_list(path) for path in settings.held_out_images]
    excluded = {name for names in lists for name in names}
    for folder in settings.caption_folders:
        excluded |= {one.path.name for one in read_caption_folder(folder) if one.split != "train"}
    captions: dict[str, list[str]] = {}
    for path in settings.flickr_tokens:
        captions |= read_flickr_captions(path)
    for path in settings.coco_captions:
        captions |= read_coco_captions(path)
    measured = [captions[name] for name in lists[0] if name in captions] if lists else None
    return without_images(captions, excluded), measured


def prepare(settings: TextSettings, groups: list[list[str]], measured: list[list[str]] | None, device: str) -> None:
    """Train and save; a stopped training goes on where its last state was kept."""
    unfinished = settings.output_dir / "unfinished.pt"
    model, tokenizer, history = train_caption_language_model(groups, settings, measured, device, unfinished)
    model.save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    write_json(settings.output_dir / "training_log.json", history)
    unfinished.unlink(missing_ok=True)
    print(f"language model with {model.num_parameters():,} parameters in {settings.output_dir}: {history[-1]}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    settings = parse(TextSettings, sys.argv[1:], description=__doc__, formatter_class=raw)
    logging.set_verbosity_info()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups, measured = read_text(settings)
    with claimed(settings.output_dir, "the training of a language model"):
        prepare(settings, groups, measured, device)


if __name__ == "__main__":
    sys.exit(bounded("prepare_language_model.py", main))
