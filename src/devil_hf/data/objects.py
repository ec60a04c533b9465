"""Images whose objects have names and masks: what attribution maps are measured against.

Sources are the shapes world (exact masks), COCO instances JSON, Pascal VOC folders and YOLO labels. Whatever the format, an
image gives one mask per phrase: the union of all its objects of that class, in the pixels of the upright image. Polygons are
filled by Pillow and by nothing else, so that numbers do not depend on what is installed; run-length codes need pycocotools.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image, ImageDraw

from devil_hf.data.images import EXTENSIONS
from devil_hf.data.worlds import World, parse_world

FINE = 5  # polygons are drawn this many times larger
CLASS = "class"  # the group of phrases that are class names
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True)
class LocalisedImage:
    """One image, and where its phrases are.

    Args:
        key: name of the image, unique in its source.
        read: gives the image, as anything that holds one, such as a path.
        groups: phrase -> group that scores are reported for ("colour", or `CLASS`).
        present: everything that is known to be in the image, phrases or not.
        draw: (height, width) of the upright image -> phrase -> bool mask of that shape.
    """

    key: str
    read: Callable[[], Any]
    groups: dict[str, str]
    present: frozenset[str]
    draw: Callable[[tuple[int, int]], dict[str, np.ndarray]]


def open_localised(
    source: str | PathLike, images: str | PathLike | None = None, names: str | PathLike | None = None
) -> list[LocalisedImage]:
    """The images of a source, without opening any.

    Args:
        source: `shapes:COUNT` or `shapes:COUNT:SEED` (words that one object of several has); a COCO instances `.json`; a VOC
            folder (`Annotations`, `JPEGImages`, and `SegmentationClass` where there are masks); or a folder of YOLO `.txt`
            labels, boxes or polygons.
        images: folder of the images, where it is not the usual one.
        names: class names for YOLO labels: a `data.yaml`, a text file with one name a line, or JSON or YAML that maps ids to
            names; `FILE#KEY` for a table inside the file.

    Raises:
        FileNotFoundError: if something named is not there.
        ValueError: for a source that is none of these, or holds no object.
    """
    if world := parse_world(str(source)):
        return _shapes(world)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; sources are shapes:COUNT, or files of COCO, VOC or YOLO")
    if path.is_file():
        found = read_coco_instances(path, images)
    elif (path / "Annotations").is_dir():
        found = read_voc(path, images)
    elif any(path.glob("*.txt")):
        found = read_yolo(path, images, names)
    else:
        raise ValueError(
            f"{path} is no COCO instances JSON, VOC folder (with Annotations/) or folder of YOLO labels (*.txt)"
        )
    if not found:
        raise ValueError(f"{path} names no object of any image")
    return found


def _shapes(world: World) -> list[LocalisedImage]:
    found = []
    for index, scene in enumerate(world.scenes()):
        phrases = scene.unique_phrases()
        if phrases:

            def draw(size, scene=scene, phrases=phrases):
                return {phrase.text: scene.masks[phrase.object_index] for phrase in phrases}

            groups = {phrase.text: phrase.attribute for phrase in phrases}
            present = frozenset(word for item in scene.objects for word in item.attributes.values())

            def read(scene=scene):
                return scene.image

            found.append(LocalisedImage(f"{world.seed}-{index}", read, groups, present, draw))
    return found


def read_coco_instances(file: str | PathLike, images: str | PathLike | None = None) -> list[LocalisedImage]:
    """COCO instances: polygons, run-length codes, or boxes where an object has nothing else.

    Classes of which an image holds a crowd without a mask are left out of that image.

    Args:
        file: `instances_*.json` with `images`, `annotations` and `categories`.
        images: folder of the images; by default found beside the file.
    """
    file = Path(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        rows, annotations = content["images"], content["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no COCO instances file ({error!r}): expected images, annotations, categories"
        ) from error
    of_image: dict[Any, dict[str, list[dict]]] = {}
    for annotation in annotations:
        if annotation["category_id"] not in names:
            raise ValueError(
                f"{file}: annotation {annotation.get('id')} is of category {annotation['category_id']}, unnamed"
            )
        of_image.setdefault(annotation["image_id"], {}).setdefault(names[annotation["category_id"]], []).append(
            annotation
        )
    folder = _coco_folder(file, images, rows)
    found = []
    for row in rows:
        objects = {
            name: parts
            for name, parts in of_image.get(row["id"], {}).items()
            if all(part.get("segmentation") or not part.get("iscrowd") for part in parts)
        }
        if objects:
            drawn = (int(row["height"]), int(row["width"]))

            def draw(size, objects=objects, drawn=drawn, name=row["file_name"]):
                if size != drawn:
                    raise ValueError(f"{name} is {size} pixels (height, width), but its objects were drawn on {drawn}")
                return {
                    name: _union(size, (_coco_mask(part, size) for part in parts)) for name, parts in objects.items()
                }

            found.append(_of_file(folder / row["file_name"], objects, draw, row["file_name"], of_image[row["id"]]))
    return found


def _coco_folder(file: Path, images: str | PathLike | None, rows: Sequence[dict]) -> Path:
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
    raise FileNotFoundError(
        f"{rows[0]['file_name']} of {file} is not in {looked}: name the folder of the images (--images)"
    )


def _coco_mask(annotation: dict, size: tuple[int, int]) -> np.ndarray:
    shape = annotation.get("segmentation")
    if not shape:
        left, top, width, height = annotation["bbox"]
        return box_mask((left, top, left + width, top + height), size)
    if isinstance(shape, dict):
        return _decode_runs(shape, size)
    return polygon_mask([np.reshape(outline, (-1, 2)) for outline in shape], size)


def _decode_runs(code: dict, size: tuple[int, int]) -> np.ndarray:
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ValueError("masks as run-length codes need pycocotools: pip install 'devil-hf[maps]'") from error
    if isinstance(code["counts"], list):
        code = coco.frPyObjects(code, *size)
    if tuple(code["size"]) != size:
        raise ValueError(f"a run-length code of size {code['size']} does not fit an image of {size} (height, width)")
    return coco.decode(code).astype(bool)


def read_voc(folder: str | PathLike, images: str | PathLike | None = None) -> list[LocalisedImage]:
    """Pascal VOC: the masks of `SegmentationClass` where an image has one, else the boxes of its annotation.

    Masks tell VOC's twenty classes only: others are left out of an image that has masks.

    Args:
        folder: with `Annotations/*.xml`.
        images: folder of the images (`JPEGImages`).
    """
    folder = Path(folder)
    pictures = Path(images) if images else folder / "JPEGImages"
    found = []
    for file in sorted((folder / "Annotations").glob("*.xml")):
        try:
            root = ElementTree.parse(file).getroot()
            objects = [(item.findtext("name", ""), _voc_box(item)) for item in root.iter("object")]
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no VOC annotation ({error})") from error
        segmentation = folder / "SegmentationClass" / f"{file.stem}.png"
        present = frozenset(name for name, _ in objects)
        if segmentation.is_file():
            objects = [(name, box) for name, box in objects if name in VOC_CLASSES]
        if not objects:
            continue
        image = pictures / (root.findtext("filename") or f"{file.stem}.jpg")
        if not image.is_file():
            raise FileNotFoundError(f"{image} of {file} does not exist: name the folder of the images (--images)")

        def draw(size, objects=objects, segmentation=segmentation):
            names = dict.fromkeys(name for name, _ in objects)
            if segmentation.is_file():
                classes = np.asarray(Image.open(segmentation))  # palette indices; 255 is the border between objects
                if classes.shape != size:
                    raise ValueError(f"{segmentation} is {classes.shape} pixels, its image {size} (height, width)")
                return {name: classes == VOC_CLASSES.index(name) + 1 for name in names}
            return {name: _union(size, (box_mask(box, size) for one, box in objects if one == name)) for name in names}

        found.append(_of_file(image, (name for name, _ in objects), draw, present=present))
    return found


def _voc_box(item: ElementTree.Element) -> tuple[float, ...]:
    """(left, top, right, bottom) in continuous pixels: VOC counts from 1 and includes both ends."""
    left, top, right, bottom = (
        float(item.findtext(f"bndbox/{edge}") or "missing") for edge in ("xmin", "ymin", "xmax", "ymax")
    )
    return left - 1, top - 1, right, bottom


def read_yolo(
    folder: str | PathLike, images: str | PathLike | None = None, names: str | PathLike | None = None
) -> list[LocalisedImage]:
    """YOLO labels: a line per object, its class and a box (centre, size) or a polygon, in shares of the image.

    Args:
        folder: of `.txt` files named as their images.
        images: folder of the images; by default the label folder's path with `labels` replaced by `images`.
        names: see `open_localised`; by default a `data.yaml` or `classes.txt` in or above the folder.
    """
    folder = Path(folder)
    parts = ["images" if part == "labels" else part for part in folder.parts]
    pictures = Path(images) if images else Path(*parts)
    if not pictures.is_dir():
        raise FileNotFoundError(f"{pictures} does not exist: name the folder of the images (--images)")
    by_stem = {path.stem: path for path in pictures.iterdir() if path.suffix.lower() in EXTENSIONS}
    table = _read_names(_names_file(folder, names))
    found = []
    for file in sorted(folder.glob("*.txt")):
        if file.name == "classes.txt":
            continue
        objects: list[tuple[str, np.ndarray]] = []
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line.strip():
                objects.append(_yolo_object(line, table, f"{file}:{number}"))
        if not objects:
            continue
        if file.stem not in by_stem:
            raise FileNotFoundError(f"no image {file.stem}.* in {pictures} for {file}")

        def draw(size, objects=objects):
            scale = np.array(size[::-1])
            phrases = dict.fromkeys(name for name, _ in objects)
            return {
                phrase: _union(
                    size, (polygon_mask([outline * scale], size) for name, outline in objects if name == phrase)
                )
                for phrase in phrases
            }

        found.append(_of_file(by_stem[file.stem], (name for name, _ in objects), draw))
    return found


def _yolo_object(line: str, names: dict[int, str], where: str) -> tuple[str, np.ndarray]:
    """The name and the outline (points, 2) of one label."""
    try:
        number, *values = [float(field) for field in line.split()]
    except ValueError as error:
        raise ValueError(f"{where} is no YOLO label ({error}): {line[:80]!r}") from error
    if int(number) not in names:
        raise ValueError(
            f"{where} is of class {int(number)}, which has no name; the names are of {sorted(names)[:10]}..."
        )
    if len(values) == 4:
        x, y, width, height = values
        left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
        return names[int(number)], np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{where} has {len(values)} numbers after the class: a box has 4, a polygon 6, 8, ...")
    return names[int(number)], np.reshape(values, (-1, 2))


def _names_file(folder: Path, names: str | PathLike | None) -> str:
    if names:
        return str(names)
    for parent in (folder, *list(folder.parents)[:3]):
        for name in ("data.yaml", "classes.txt"):
            if (parent / name).is_file():
                return str(parent / name)
    raise FileNotFoundError(f"no data.yaml or classes.txt in or above {folder}: give the class names (--names)")


def _read_names(spec: str) -> dict[int, str]:
    file, _, key = spec.partition("#")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: it should give the class names")
    text = Path(file).read_text(encoding="utf-8")
    if file.endswith(".txt"):
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    table = yaml.safe_load(text)  # reads JSON as well
    if key or (isinstance(table, dict) and "names" in table):
        table = table.get(key or "names")
    if isinstance(table, list):
        table = dict(enumerate(table))
    try:
        return {int(number): str(name) for number, name in table.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{spec} maps no class ids to names; FILE#KEY names a table inside a file") from error


def _of_file(
    path: Path, names: Iterable[str], draw, key: str | None = None, present: Iterable[str] = ()
) -> LocalisedImage:
    groups = dict.fromkeys(names, CLASS)
    return LocalisedImage(key or path.name, lambda: path, groups, frozenset(groups) | frozenset(present), draw)


def polygon_mask(outlines: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The union of polygons (points, 2) of (x, y) in continuous pixels, as a bool mask of `size` (height, width)."""
    height, width = size
    # Pillow fills the border of a polygon, too: drawn finely and read at the centres of pixels, that is a tenth of a pixel.
    canvas = Image.new("1", (FINE * width, FINE * height))
    draw = ImageDraw.Draw(canvas)
    for outline in outlines:
        draw.polygon([(FINE * x - 0.5, FINE * y - 0.5) for x, y in np.asarray(outline).tolist()], fill=1)
    return np.array(canvas)[FINE // 2 :: FINE, FINE // 2 :: FINE]


def box_mask(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie in a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    rows, columns = (np.arange(edge) + 0.5 for edge in size)
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None]


def _union(size: tuple[int, int], masks: Iterable[np.ndarray]) -> np.ndarray:
    union = np.zeros(size, dtype=bool)
    for mask in masks:
        union |= mask
    return union


__all__ = [
    "CLASS",
    "LocalisedImage",
    "box_mask",
    "open_localised",
    "polygon_mask",
    "read_coco_instances",
    "read_voc",
    "read_yolo",
]
