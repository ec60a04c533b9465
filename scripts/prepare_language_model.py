r"""Train a caption language model from text alone.

    python scripts/prepare_language_model.py --output_dir language_model --bf16 \
        --flickr_tokens Flickr8k.token.txt.gz --coco_captions captions_val2017.json.gz \
        --held_out_images Flickr_8k.devImages.txt Flickr_8k.testImages.txt --caption_folders flickr8k coco

Captions of the images named in `held_out_images`, and of every image of `caption_folders` whose split is not `train`,
are left out of the text; those of the first `held_out_images` file measure the loss.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from devil_hf.data.captions import read_caption_records, read_coco_captions, read_flickr_captions, without_images
from devil_hf.training.caption_language_model import CaptionLanguageModelArguments, train_caption_language_model

logger = logging.getLogger("devil_hf")


@dataclass
class TextArguments:
    """Which captions are read and where the model goes."""

    output_dir: str = field(metadata={"help": "Where model, tokenizer and training_log.json are written."})
    flickr_tokens: list[str] = field(default_factory=list, metadata={"help": "Flickr token files, plain or .gz."})
    coco_captions: list[str] = field(default_factory=list, metadata={"help": "COCO caption JSON files, plain or .gz."})
    held_out_images: list[str] = field(
        default_factory=list, metadata={"help": "Lists of image names to leave out; the first one is measured."}
    )
    caption_folders: list[str] = field(
        default_factory=list, metadata={"help": "Caption folders whose images outside split train are left out."}
    )
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 keeps PyTorch's choice."})


def main() -> None:
    text, arguments = HfArgumentParser((TextArguments, CaptionLanguageModelArguments)).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if text.threads:
        torch.set_num_threads(text.threads)
    lists = [Path(path).read_text(encoding="utf-8").split() for path in text.held_out_images]
    excluded = {name for names in lists for name in names}
    for folder in text.caption_folders:
        excluded |= {
            Path(record["image"]).name for record in read_caption_records(folder) if record["split"] != "train"
        }
    captions: dict[str, list[str]] = {}
    for path in text.flickr_tokens:
        captions |= read_flickr_captions(path)
    for path in text.coco_captions:
        captions |= read_coco_captions(path)
    measured = [captions[name] for name in lists[0] if name in captions] if lists else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, history = train_caption_language_model(
        without_images(captions, excluded), arguments, measured, device
    )
    model.save_pretrained(text.output_dir)
    tokenizer.save_pretrained(text.output_dir)
    (Path(text.output_dir) / "training_log.json").write_text(json.dumps(history, indent=1))
    logger.info(f"language model with {model.num_parameters():,} parameters in {text.output_dir}: {history[-1]}")


if __name__ == "__main__":
    main()
