"""The text of the photographs' language model: captions grouped by image, and phrases, as far as the rules of the data allow.

No caption of an image that anything is chosen or reported on gets in: Flickr8k's images for development and test, and COCO
images with another split than `train`.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from devil_hf.training.small_models.caption_language_model import content_words

LONGEST_PHRASE = 8  # in words; longer ones are clauses
MOST_REPEATS = 3  # documents of a phrase, however often people said it


@dataclass
class CaptionText:
    """What the language model is trained on, and what it is measured on.

    Args:
        groups: the captions of each training image; a phrase is a group of one.
        held_out: the captions of each image of Flickr8k's development list.
        counts: images and captions of each source, and documents of phrases.
    """

    groups: list[list[str]]
    held_out: list[list[str]]
    counts: dict[str, int]


def read_text(folder: Path) -> CaptionText:
    """Read all text that may be used.

    Args:
        folder: with `captions/` (flickr8k, coco, coco_more) and `text/`.
    """
    captions, phrases = _flickr30k(folder)
    counts = {"images of Flickr30k": len(captions)}
    flickr8k = _flickr8k(folder)
    known = {f"{name}.jpg" for name in captions}
    further = [flickr8k[name] for name in _names(folder, "train") if name in flickr8k and _photograph(name) not in known]
    counts["further images of Flickr8k"] = len(further)
    coco = _coco(folder)
    counts["images of COCO"] = len(coco)
    groups = [*captions.values(), *further, *coco.values()]
    counts["captions"] = sum(map(len, groups))
    said = [phrase for phrase, count in sorted(phrases.items()) if count > 1 and content_words(phrase)]
    documents = [[phrase] for phrase in said for _ in range(min(phrases[phrase], MOST_REPEATS))]
    counts["documents of phrases"] = len(documents)
    held_out = [flickr8k[name] for name in _names(folder, "dev") if name in flickr8k]
    return CaptionText(groups + documents, held_out, counts)


def _flickr30k(folder: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    captions, phrases = {}, Counter[str]()
    for row in _rows(folder / "text" / "flickr30k_captions_entities.jsonl.gz"):
        captions[row["flickr_id"]] = row["captions"]
        named = [phrase.lower() for caption in row["phrases"] for phrase, _ in caption]
        phrases.update(phrase for phrase in named if len(phrase.split()) <= LONGEST_PHRASE)
    return captions, phrases


def _flickr8k(folder: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    with gzip.open(folder / "captions" / "flickr8k" / "Flickr8k.token.txt.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            name, _, caption = line.rstrip("\n").partition("\t")
            captions.setdefault(name.partition("#")[0], []).append(caption)
    return captions


def _names(folder: Path, split: str) -> list[str]:
    file = folder / "captions" / "flickr8k" / f"Flickr_8k.{split}Images.txt"
    return sorted(set(file.read_text(encoding="utf-8").split()))


def _photograph(name: str) -> str:
    """Flickr8k's names are those of Flickr30k with a hash behind."""
    return f"{name.partition('_')[0]}.jpg"


def _coco(folder: Path) -> dict[int, list[str]]:
    """Captions by image: the separate text, and those of training images that it lacks."""
    with_images = [row for name in ("coco", "coco_more") for row in _lines(folder / "captions" / name / "captions.jsonl")]
    held_out = {_number(row["image"]) for row in with_images if row["split"] != "train"}
    rows = _rows(folder / "text" / "coco_captions_by_id.jsonl.gz")
    captions = {row["coco_id"]: row["captions"] for row in rows if row["lm_ok"] and row["coco_id"] not in held_out}
    return {_number(row["image"]): row["captions"] for row in with_images if row["split"] == "train"} | captions


def _number(image: str) -> int:
    return int(re.findall(r"\d+", Path(image).stem)[-1])


def _rows(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
