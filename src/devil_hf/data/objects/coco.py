"""COCO instances JSON as images with objects, and what all COCO files share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils import logging

from devil_hf.data.objects import OBJECT_SOURCES, LocalisedImage, ObjectSource, of_file
from devil_hf.data.objects.masks import Part
from devil_hf.text_files import existing_file, read_json

logger = logging.get_logger(f"transformers.{__name__}")

CORNERS = 3  # that a polygon has at least


def read_coco(source: str, images: str | PathLike | None = None, names=None) -> list[LocalisedImage]:
    """COCO instances: polygons, run-length codes, or boxes where an object has nothing else.

    Classes of which an image holds a crowd without a mask are left out of that image. Objects without any place, or of images
    that are not listed, are left out, with a warning.

    Args:
        source: `instances_*.json` with `images`, `annotations` and `categories`, plain or gzipped.
        images: folder of the images; by default found beside the file.
        names: not needed, the file names its classes.
    """
    file = Path(source)
    rows, annotations, categories = read_lists(file, "images", "annotations", "categories")
    by_id = images_by_id(rows, file)
    classes = _class_names(categories, file)
    of_image = _objects(annotations_of(annotations, by_id, file), classes, file)
    paths = _image_paths(file, images, list(by_id.values()))
    found = []
    for number, row in by_id.items():
        objects = of_image.get(number, {})
        parts = {name: [one for one in places if one] for name, places in objects.items() if None not in places}
        if parts:
            key = row["file_name"]
            found.append(of_file(paths[key], parts, key, objects, _size(row, file)))
    return found


def read_lists(file: str | PathLike, *names: str) -> list[list[dict]]:
    """Lists of a COCO file; entries that are null are passed over.

    Raises:
        ValueError: for a file that is no JSON, or has no such lists of objects.
    """
    content = read_json(file)
    found = []
    for name in names:
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{file} is no COCO file with {', '.join(names)}: it has no list {name!r}")
        rows = [row for row in rows if row is not None]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{file}: the list {name!r} holds something else than objects")
        found.append(rows)
    return found


def images_by_id(rows: Sequence[dict], file: str | PathLike) -> dict[Any, dict]:
    """The rows of `images` by their id.

    Raises:
        ValueError: for a row without id or file name, and for an id of two files.
    """
    found: dict[Any, dict] = {}
    for row in rows:
        number, name = row.get("id"), row.get("file_name")
        if not isinstance(number, int | str) or not isinstance(name, str) or not name:
            raise ValueError(f"{file}: an image needs an id and a file_name, and one has {number!r:.80} and {name!r:.80}")
        if found.setdefault(number, row)["file_name"] != name:
            raise ValueError(f"{file}: the images {found[number]['file_name']} and {name} both have the id {number}")
    return found


def annotations_of(annotations: Sequence[dict], images: Mapping[Any, dict], file: str | PathLike) -> Iterator[tuple[dict, dict]]:
    """(image, annotation) of every annotation whose image is listed; a warning tells how many others there are."""
    unlisted = 0
    for annotation in annotations:
        number = annotation.get("image_id")
        if isinstance(number, int | str) and number in images:
            yield images[number], annotation
        else:
            unlisted += 1
    if unlisted:
        logger.warning(f"{unlisted} annotations of {file} are left out: their images are not listed")


def _class_names(categories: Sequence[dict], file: Path) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for category in categories:
        number, name = category.get("id"), category.get("name")
        if not isinstance(number, int | str) or not isinstance(name, str) or not name.strip():
            raise ValueError(f"{file}: a category needs an id and a name, and one has {number!r:.80} and {name!r:.80}")
        names[number] = name
    return names


def _objects(pairs: Iterator[tuple[dict, dict]], names: dict[Any, str], file: Path) -> dict[Any, dict[str, list[Part | None]]]:
    """By image and class the places of objects, None of a crowd without a mask."""
    found: dict[Any, dict[str, list[Part | None]]] = {}
    placeless = 0
    for image, annotation in pairs:
        category = annotation.get("category_id")
        if not isinstance(category, int | str) or category not in names:
            raise ValueError(f"{file}: annotation {annotation.get('id')} is of category {category!r:.80}, unnamed")
        crowd = bool(annotation.get("iscrowd")) and not annotation.get("segmentation")
        part = None if crowd else _part(annotation)
        if part is None and not crowd:
            placeless += 1
        else:
            found.setdefault(image["id"], {}).setdefault(names[category], []).append(part)
    if placeless:
        logger.warning(f"{placeless} objects of {file} are left out: they have neither a segmentation nor a bbox of four numbers")
    return found


def _part(annotation: dict) -> Part | None:
    """Where an object is: its mask if it has one, else its box; None if it has neither."""
    shape = annotation.get("segmentation")
    if isinstance(shape, dict) and isinstance(shape.get("counts"), str | list):
        return {"runs": shape["counts"], "size": shape.get("size")}
    if isinstance(shape, list):
        outlines = [one for one in shape if isinstance(one, list) and len(one) >= 2 * CORNERS and len(one) % 2 == 0]
        if outlines and all(map(_finite, outlines)):
            return {"polygons": outlines}
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not _finite(box):
        return None
    left, top, width, height = box
    return {"box": [left, top, left + width, top + height]}


def _finite(numbers: list) -> bool:
    try:
        return all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
    except OverflowError:  # a whole number that no float holds
        return False


def _size(row: dict, file: Path) -> tuple[int, int]:
    try:
        return int(row["height"]), int(row["width"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: the image {row['file_name']} needs a height and a width, in pixels") from error


def _image_paths(file: Path, images: str | PathLike | None, rows: Sequence[dict]) -> dict[str, Path]:
    """The file of each image by its name."""
    if not rows:
        raise ValueError(f"{file} lists no image")
    split = file.name.partition(".")[0].removeprefix("instances_")
    usual = [file.parent / "images" / split, file.parent / "images", file.parent / split, file.parent]
    usual += [file.parent.parent / split, file.parent.parent / "images" / split]
    names = [row["file_name"] for row in rows]
    for folder in [Path(images)] if images else usual:
        if existing_file(folder, names[0]):
            paths = {name: existing_file(folder, name) for name in names}
            if missing := [name for name, path in paths.items() if path is None]:
                raise FileNotFoundError(f"{len(missing)} images of {file} are not in {folder}, such as {missing[0]}")
            return {name: path for name, path in paths.items() if path is not None}
    looked = images or ", ".join(str(folder) for folder in usual)
    raise FileNotFoundError(f"{names[0]} of {file} is not in {looked}: name the folder of the images (--images)")


def _is_coco(text: str) -> bool:
    return text.endswith((".json", ".json.gz")) and Path(text).is_file()


OBJECT_SOURCES.register("coco", ObjectSource("COCO instances JSON", _is_coco, read_coco, options=("images",)))
