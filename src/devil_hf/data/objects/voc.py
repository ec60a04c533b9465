"""Pascal VOC folders as images with objects."""

import math
from os import PathLike
from pathlib import Path
from xml.etree import ElementTree

from devil_hf.data.objects import OBJECT_SOURCES, LocalisedImage, ObjectSource, of_file
from devil_hf.data.objects.masks import Part
from devil_hf.text_files import existing_file

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(source: str, images: str | PathLike | None = None, names=None) -> list[LocalisedImage]:
    """Pascal VOC: the masks of `SegmentationClass` where an image has one, else the boxes of its annotation.

    Masks tell VOC's twenty classes only: others are left out of an image that has masks.

    Args:
        source: folder with `Annotations/*.xml`.
        images: folder of the images (`JPEGImages`).
        names: not needed, the annotations name their classes.
    """
    folder = Path(source)
    pictures = Path(images) if images else folder / "JPEGImages"
    found = []
    for file in sorted((folder / "Annotations").glob("*.xml")):
        try:
            root = ElementTree.parse(file).getroot()
            objects = [(_voc_name(item), _voc_box(item)) for item in root.iter("object")]
        except (ElementTree.ParseError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is no VOC annotation ({error}): an object needs a name, and a bndbox of four numbers"
            ) from error
        segmentation = folder / "SegmentationClass" / f"{file.stem}.png"
        present = frozenset(name for name, _ in objects)
        if segmentation.is_file():
            objects = [(name, box) for name, box in objects if name in VOC_CLASSES]
        if not objects:
            continue
        name = (root.findtext("filename") or f"{file.stem}.jpg").strip()
        image = existing_file(pictures, name)
        if image is None:
            raise FileNotFoundError(f"{pictures / name} of {file} does not exist: name the folder of the images (--images)")

        parts: dict[str, list[Part]] = {}
        for name, box in objects:
            parts.setdefault(name, []).append({"box": list(box)})
        if segmentation.is_file():  # palette indices; 255 is the border between objects
            parts = {name: [{"classes": str(segmentation), "index": VOC_CLASSES.index(name) + 1}] for name in parts}
        found.append(of_file(image, parts, present=present))
    return found


def _voc_name(item: ElementTree.Element) -> str:
    if not (name := item.findtext("name", "").strip()):
        raise ValueError("an object has no name")
    return name


def _voc_box(item: ElementTree.Element) -> tuple[float, ...]:
    """(left, top, right, bottom) in continuous pixels: VOC counts from 1 and includes both ends."""
    left, top, right, bottom = (float(item.findtext(f"bndbox/{edge}") or "missing") for edge in ("xmin", "ymin", "xmax", "ymax"))
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError(f"a box of {left}, {top}, {right}, {bottom}")
    return left - 1, top - 1, right, bottom


OBJECT_SOURCES.register(
    "voc",
    ObjectSource(
        "VOC folder (with Annotations/)", lambda text: (Path(text) / "Annotations").is_dir(), read_voc, options=("images",)
    ),
)
