"""Pairs of caption files that name images: COCO JSON and Flickr token files, plain or gzipped."""

import re
import unicodedata
from collections.abc import Collection
from os import PathLike
from pathlib import Path

from datasets import Dataset
from transformers.utils import logging

from devil_hf.data.objects.coco import annotations_of, images_by_id, read_lists
from devil_hf.data.pairs import PAIR_SOURCES
from devil_hf.data.pairs.folder import rows_of_files
from devil_hf.text_files import existing_file, numbered_lines, read_list

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
    """Read a COCO captions file (`images`, `annotations`) into captions by image file name.

    A caption that is null, or of an image that is not listed, is left out, with a warning.

    Raises:
        ValueError: for a file that is no COCO captions file.
    """
    rows, annotations = read_lists(path, "images", "annotations")
    images = images_by_id(rows, path)
    captions: dict[str, list[str]] = {}
    left_out = 0
    for image, annotation in annotations_of(annotations, images, path):
        if "caption" not in annotation:
            raise ValueError(f"{path} has annotations without a caption, of {sorted(annotation)}: name a captions file")
        texts = captions.setdefault(image["file_name"], [])
        if isinstance(annotation["caption"], str):
            texts.append(annotation["caption"].strip())
        else:
            left_out += 1
    if left_out:
        logger.warning(f"{left_out} captions of {path} are left out: they hold no text")
    return captions


def read_flickr_captions(path: str | PathLike) -> dict[str, list[str]]:
    """Read a Flickr token file, lines `name.jpg#0<TAB>caption`, into captions by image file name.

    Raises:
        ValueError: for a line that is not like this.
    """
    captions: dict[str, list[str]] = {}
    for where, line in numbered_lines(path):
        key, tab, caption = line.partition("\t")
        name = re.sub(r"#\d+$", "", key.strip())
        if not tab:
            raise ValueError(f"{where} has no tab between image and caption: {line[:80]!r}")
        if not name:
            raise ValueError(f"{where} names no image in front of the tab: {line[:80]!r}")
        captions.setdefault(name, []).append(caption.strip())
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
        names = read_list(_existing(names))
    elif names is not None and not all(isinstance(name, str) for name in names):
        raise ValueError("names must be file names, or a file with one a line")
    of_form = {unicodedata.normalize("NFC", name): name for name in captions}  # accents may be composed in two ways
    chosen = list(captions) if names is None else list(dict.fromkeys(names))
    chosen = [of_form.get(unicodedata.normalize("NFC", name), name) for name in chosen]
    if unknown := [name for name in chosen if name not in captions]:
        raise ValueError(f"{len(unknown)} of {len(chosen)} images have no caption in {file}, the first is {unknown[0]}")
    if allow_missing:
        present = [name for name in chosen if existing_file(Path(images), name)]
        logger.info(f"{len(present)} of {len(chosen)} images of {file} are in {images}")
        chosen = present
    return rows_of_files(Path(images), chosen, [captions[name] for name in chosen])
