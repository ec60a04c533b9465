"""Pairs of caption files that name images: COCO JSON and Flickr token files, plain or gzipped."""

import gzip
import json
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import IO

from datasets import Dataset
from transformers.utils import logging

from devil_hf.data.pairs import PAIR_SOURCES
from devil_hf.data.pairs.folder import rows_of_files

logger = logging.get_logger(f"transformers.{__name__}")


@PAIR_SOURCES.register("coco")
def open_coco(annotations: str, images: str, names: str | list | None = None, allow_missing: bool = False) -> Dataset:
    """COCO captions.

    Args:
        annotations: JSON file with `images` and `annotations`, plain or gzipped.
        images: folder of the images.
        names: only these file names; a file has one per line.
        allow_missing: leave out images that are absent, instead of an error.
    """
    return _of_captions(_existing(annotations), read_coco_captions(annotations), images, names, allow_missing)


@PAIR_SOURCES.register("flickr")
def open_flickr(captions: str, images: str, names: str | list | None = None, allow_missing: bool = False) -> Dataset:
    """Flickr8k or Flickr30k captions.

    Args:
        captions: token file with lines `name.jpg#0<TAB>caption`, plain or gzipped.
        images: folder of the images.
        names: only these file names, the split; a file has one per line.
        allow_missing: leave out images that are absent, instead of an error.
    """
    return _of_captions(_existing(captions), read_flickr_captions(captions), images, names, allow_missing)


def read_coco_captions(path: str | PathLike) -> dict[str, list[str]]:
    """Read a COCO captions file (`images`, `annotations`) into captions by image file name."""
    with _open_text(Path(path)) as file:
        content = json.load(file)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(names[annotation["image_id"]], []).append(annotation["caption"].strip())
    return captions


def read_flickr_captions(path: str | PathLike) -> dict[str, list[str]]:
    """Read a Flickr token file, lines `name.jpg#0<TAB>caption`, into captions by image file name."""
    captions: dict[str, list[str]] = {}
    with _open_text(Path(path)) as lines:
        for number, line in enumerate(lines, 1):
            key, tab, caption = line.rstrip("\n").partition("\t")
            if not tab:
                raise ValueError(f"{path}:{number} has no tab between image and caption: {line[:80]!r}")
            captions.setdefault(key.rpartition("#")[0], []).append(caption.strip())
    return captions


def without_images(captions: dict[str, list[str]], excluded: Collection[str]) -> list[list[str]]:
    """Give the captions grouped by image, without those of the `excluded` image file names."""
    excluded = set(excluded)
    groups = [[text for text in texts if text] for name, texts in captions.items() if name not in excluded]
    groups = [texts for texts in groups if texts]
    logger.info(f"{len(groups)} of {len(captions)} images give text, {len(excluded & captions.keys())} are excluded")
    return groups


def _existing(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


def _of_captions(
    file: str, captions: dict[str, list[str]], images: str, names: str | list | None, allow_missing: bool
) -> Dataset:
    if not Path(images).is_dir():
        raise FileNotFoundError(f"there is no folder {images}")
    if isinstance(names, str):
        names = Path(_existing(names)).read_text(encoding="utf-8").split()
    chosen = list(captions) if names is None else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in captions]
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(chosen)} images have no caption in {file}, the first is {unknown[0]}")
    if allow_missing:
        present = [name for name in chosen if (Path(images) / name).is_file()]
        logger.info(f"{len(present)} of {len(chosen)} images of {file} are in {images}")
        chosen = present
    return rows_of_files(Path(images), chosen, [captions[name] for name in chosen])


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
