"""Captioned images and caption texts from the files in which they are usually handed out.

A caption folder holds `captions.jsonl` or `metadata.jsonl`, one line `{"image": ..., "captions": [...], "split": ...}`
per image, paths relative to the folder. It becomes a `datasets.Dataset` whose images are decoded when a row is read.
Flickr token files and COCO caption JSON give texts by image file name, plain or gzipped.
"""

import gzip
import json
from collections.abc import Collection, Iterator
from os import PathLike
from pathlib import Path
from typing import IO

from datasets import Dataset, Image
from transformers.utils import logging

logger = logging.get_logger(f"transformers.{__name__}")

CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")


def read_caption_records(folder: str | PathLike, split: str | None = None) -> list[dict]:
    """Read the lines of a caption folder, without opening any image.

    Args:
        folder (`str` or `PathLike`): Folder with `captions.jsonl` or `metadata.jsonl`.
        split (`str`, *optional*): Only the images of this split; `None` takes all.

    Returns:
        `list[dict]`: `{"image": path relative to the folder, "captions": list[str], "split": str or None}`,
        in the order of the file.

    Raises:
        FileNotFoundError: if the folder holds neither file.
        ValueError: if a line is malformed or names no caption, or if no image is in `split`.
    """
    path = _caption_file(Path(folder))
    records = [_parse_record(fields, where) for where, fields in read_json_lines(path)]
    if split is None:
        return records
    chosen = [record for record in records if record["split"] == split]
    if not chosen:
        known = sorted({str(record["split"]) for record in records})
        raise ValueError(f"no image of {path} is in split {split!r}; its splits are {known}")
    return chosen


def load_caption_folder(folder: str | PathLike, split: str | None = None) -> Dataset:
    """Open a caption folder as a data set.

    Its columns are `image` (decoded on access), `captions` (list of str) and `key` (file name of the image).

    Args:
        folder (`str` or `PathLike`): Folder with `captions.jsonl` or `metadata.jsonl`.
        split (`str`, *optional*): Only the images of this split; `None` takes all.

    Raises:
        FileNotFoundError: if the folder holds no caption file, or a listed image is absent.
        ValueError: see [`read_caption_records`].
    """
    folder = Path(folder)
    records = read_caption_records(folder, split)
    paths = [folder / record["image"] for record in records]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} images are absent, the first is {missing[0]}")
    columns = {
        "image": [str(path) for path in paths],
        "captions": [record["captions"] for record in records],
        "key": [path.name for path in paths],
    }
    return Dataset.from_dict(columns).cast_column("image", Image())


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


def read_coco_captions(path: str | PathLike) -> dict[str, list[str]]:
    """Read a COCO captions file (`images`, `annotations`) into captions by image file name."""
    with _open_text(Path(path)) as file:
        content = json.load(file)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(names[annotation["image_id"]], []).append(annotation["caption"].strip())
    return captions


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield `file:number` and the object of every line that is not blank.

    Raises:
        ValueError: for a line that is not a JSON object.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{where} is not a JSON object: {line.strip()[:80]}")
            yield where, fields


def without_images(captions: dict[str, list[str]], excluded: Collection[str]) -> list[list[str]]:
    """Give the captions grouped by image, without those of the `excluded` image file names."""
    excluded = set(excluded)
    groups = [[text for text in texts if text] for name, texts in captions.items() if name not in excluded]
    groups = [texts for texts in groups if texts]
    logger.info(f"{len(groups)} of {len(captions)} images give text, {len(excluded & captions.keys())} are excluded")
    return groups


def _caption_file(folder: Path) -> Path:
    for name in CAPTION_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {CAPTION_FILES}; write one line per image with its captions")


def _parse_record(fields: dict, where: str) -> dict:
    image, captions = fields.get("image", fields.get("file_name")), fields.get("captions")
    if isinstance(captions, list) and all(isinstance(caption, str) for caption in captions):
        captions = [caption.strip() for caption in captions if caption.strip()]
    else:
        captions = []
    if not image or not captions:
        raise ValueError(
            f'{where} needs "image" and a list "captions" with at least one non-empty string; it is {str(fields)[:80]}'
        )
    return {"image": image, "captions": captions, "split": fields.get("split")}


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
