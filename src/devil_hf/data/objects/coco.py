"""COCO instances JSON as images with objects."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from devil_hf.data.objects import OBJECT_SOURCES, LocalisedImage, ObjectSource, of_file
from devil_hf.data.objects.masks import Part


def read_coco(source: str, images: str | PathLike | None = None, names=None) -> list[LocalisedImage]:
    """COCO instances: polygons, run-length codes, or boxes where an object has nothing else.

    Classes of which an image holds a crowd without a mask are left out of that image.

    Args:
        source: `instances_*.json` with `images`, `annotations` and `categories`.
        images: folder of the images; by default found beside the file.
        names: not needed, the file names its classes.
    """
    file = Path(source)
    rows, of_image = _read_annotations(file)
    folder = _image_folder(file, images, rows)
    found = []
    for row in rows:
        objects = of_image.get(row["id"], {})
        parts = {
            name: [_part(annotation) for annotation in annotations]
            for name, annotations in objects.items()
            if all(one.get("segmentation") or not one.get("iscrowd") for one in annotations)
        }
        if parts:
            size = (int(row["height"]), int(row["width"]))
            found.append(of_file(folder / row["file_name"], parts, row["file_name"], objects, size))
    return found


def _read_annotations(file: Path) -> tuple[list[dict], dict[Any, dict[str, list[dict]]]]:
    """The rows of images, and by image and class the annotations."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        rows, annotations = content["images"], content["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no COCO instances file ({error!r}): expected images, annotations, categories") from error
    of_image: dict[Any, dict[str, list[dict]]] = {}
    for annotation in annotations:
        category = annotation["category_id"]
        if category not in names:
            raise ValueError(f"{file}: annotation {annotation.get('id')} is of category {category}, unnamed")
        of_image.setdefault(annotation["image_id"], {}).setdefault(names[category], []).append(annotation)
    return rows, of_image


def _image_folder(file: Path, images: str | PathLike | None, rows: Sequence[dict]) -> Path:
    if not rows:
        raise ValueError(f"{file} lists no image")
    split = file.stem.removeprefix("instances_")
    usual = [file.parent / "images" / split, file.parent / "images", file.parent / split, file.parent]
    usual += [file.parent.parent / split, file.parent.parent / "images" / split]
    for folder in [Path(images)] if images else usual:
        if (folder / rows[0]["file_name"]).is_file():
            missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
            if missing:
                raise FileNotFoundError(f"{len(missing)} images of {file} are not in {folder}, such as {missing[0]}")
            return folder
    looked = images or ", ".join(str(folder) for folder in usual)
    raise FileNotFoundError(f"{rows[0]['file_name']} of {file} is not in {looked}: name the folder of the images (--images)")


def _part(annotation: dict) -> Part:
    shape = annotation.get("segmentation")
    if not shape:
        left, top, width, height = annotation["bbox"]
        return {"box": [left, top, left + width, top + height]}
    if isinstance(shape, dict):
        return {"runs": shape["counts"], "size": shape["size"]}
    return {"polygons": shape}


OBJECT_SOURCES.register(
    "coco", ObjectSource("COCO instances JSON", lambda text: Path(text).suffix == ".json" and Path(text).is_file(), read_coco)
)
