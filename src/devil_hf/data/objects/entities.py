"""Flickr30k Entities: phrases of captions, with the boxes that people drew for them (Plummer et al., ICCV 2015).

Read from the original distribution (`Sentences/*.txt`, `Annotations/*.xml`), or from a folder whose `regions.jsonl` holds the
same, an image a line. An entity is what several phrases of an image's captions speak of ("a girl", "a child"), and has one or
more boxes; entities without any ("scene" as the annotators have it, or not to be seen) and boxes outside of their image are
counted.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from transformers.utils import logging

from devil_hf.data.objects import OBJECT_SOURCES, LocalisedImage, ObjectSource, Region
from devil_hf.data.objects.masks import Part
from devil_hf.text_files import existing_file, read_json_lines, read_text

logger = logging.get_logger(f"transformers.{__name__}")

REGIONS_FILE = "regions.jsonl"
PHRASE = re.compile(r"\[/EN#(\d+)((?:/\w+)+) ([^\]]+)\]")
NOT_VISUAL = "notvisual"
NOBODY = "0"  # the id that the distribution gives to what is not in the picture

Box = tuple[float, float, float, float]  # left, top, right, bottom, in continuous pixels of the upright image


@dataclass(frozen=True)
class Entity:
    """What phrases of an image speak of.

    Args:
        name: its id in the distribution.
        types: of "people", "clothing", "bodyparts", "animals", "vehicles", "instruments", "scene" and "other".
        phrases: as they stand in the captions, repeated ones once.
        boxes: inside of the image; none where nobody drew one.
    """

    name: str
    types: tuple[str, ...]
    phrases: tuple[str, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class EntityImage:
    """An image and its entities.

    Args:
        key: the image's name.
        path: of the image.
        size: (height, width) that the boxes were drawn on.
        entities: with boxes and without.
        split: where the folder says it.
        captions: the sentences that name them, where they are in the same place; `captions.jsonl` has those of a `regions.jsonl`.
    """

    key: str
    path: Path
    size: tuple[int, int]
    entities: tuple[Entity, ...]
    split: str | None = None
    captions: tuple[str, ...] = ()


@dataclass
class EntityCounts:
    """What a source of entities holds, and what of it cannot be used."""

    counts: Counter[str] = field(default_factory=Counter)

    def box(self, left: float, top: float, width: float, height: float, size: tuple[int, int]) -> Box | None:
        """A box inside of an image (height, width), cut at its border; None, and counted, where nothing is left."""
        right, bottom = min(left + width, size[1]), min(top + height, size[0])
        left, top = max(left, 0.0), max(top, 0.0)
        if not (right - left > 0 and bottom - top > 0):  # what is no number, neither
            self.counts["boxes outside of their image"] += 1
            return None
        self.counts["boxes"] += 1
        return left, top, right, bottom

    def entity(self, name: str, types: tuple[str, ...], phrases: list[str], boxes: list[Box | None]) -> Entity:
        """An entity, counted."""
        entity = Entity(name, types, tuple(dict.fromkeys(phrases)), tuple(box for box in boxes if box is not None))
        self.counts["phrases" if entity.boxes else "phrases without a box"] += len(entity.phrases)
        return entity

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in sorted(self.counts.items()))


def is_entities(folder: str | PathLike) -> bool:
    """Whether a folder, or FOLDER:SPLIT, holds entities of either layout."""
    place = _place(str(folder))[0]
    return (place / REGIONS_FILE).is_file() or ((place / "Sentences").is_dir() and (place / "Annotations").is_dir())


def read_entities(source: str | PathLike, images: str | PathLike | None = None) -> list[EntityImage]:
    """The images of a folder with their entities, none of them opened; what cannot be used is counted and logged.

    Args:
        source: the folder, or FOLDER:SPLIT for the images of one split of a `regions.jsonl`.
        images: folder of the images; by default the folder itself, or the original's `flickr30k-images` in or beside it.

    Raises:
        FileNotFoundError: if a folder or an image is missing.
        ValueError: for a malformed file, a split that is not there, and a folder in which no phrase has a box.
    """
    folder, split = _place(str(source))
    counts = EntityCounts()
    if (folder / REGIONS_FILE).is_file():
        found = list(_of_lines(folder / REGIONS_FILE, Path(images) if images else folder, split, counts))
    elif split is not None:
        raise ValueError(f"{source}: the original distribution has no splits; name a folder with the sentences of one split")
    else:
        found = list(_of_distribution(folder, _picture_folder(folder, images), counts))
    missing = [one.path for one in found if existing_file(one.path.parent, one.path.name) is None]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(found)} images are absent, the first is {missing[0]}; name their folder")
    if not any(entity.boxes for one in found for entity in one.entities):
        raise ValueError(f"{source}: no phrase has a box ({counts})")
    logger.info(f"{source}: {len(found):,} images; {counts}")
    return found


def _place(text: str) -> tuple[Path, str | None]:
    """The folder and the split of FOLDER or FOLDER:SPLIT."""
    folder, colon, split = text.rpartition(":")
    return (Path(folder), split) if colon and not Path(text).is_dir() else (Path(text), None)


def _of_lines(file: Path, images: Path, split: str | None, counts: EntityCounts) -> Iterator[EntityImage]:
    lines = list(read_json_lines(file))
    known = {str(line.get("split")) for _, line in lines}
    if split is not None and split not in known:
        raise ValueError(f"no image of {file} is in split {split!r}; its splits are {sorted(known)}")
    for where, line in lines:
        if split is not None and line.get("split") != split:
            continue
        try:
            columns, rows = (int(edge) for edge in line["size"])
            size = (rows, columns)
            entities = []
            for one in line["regions"]:
                boxes = [counts.box(left, top, width, height, size) for left, top, width, height in one["boxes"]]
                types, phrases = tuple(one["types"]), list(one["phrases"])
                if not types or not all(isinstance(text, str) for text in (*types, *phrases)):
                    raise ValueError(f"types {one['types']!r:.80} and phrases {one['phrases']!r:.80} must be texts")
                entities.append(counts.entity(str(one["entity"]), types, phrases, boxes))
            name = line["image"]
            path = existing_file(images, name) or images / name
            counts.counts["phrases of scenes"] += len(line.get("scene_phrases", ()))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{where} is no line of entities ({error!r}): it needs image, size [width, height] and regions, each with "
                "entity, types, phrases and boxes [left, top, width, height]"
            ) from error
        yield EntityImage(name, path, size, tuple(entities), line.get("split"))


def _of_distribution(folder: Path, images: Path, counts: EntityCounts) -> Iterator[EntityImage]:
    for file in sorted((folder / "Sentences").glob("*.txt")):
        phrases: dict[str, list[str]] = {}
        types: dict[str, tuple[str, ...]] = {}
        sentences = read_text(file)
        for name, kinds, phrase in PHRASE.findall(sentences):
            if name == NOBODY or NOT_VISUAL in kinds:
                counts.counts["phrases of nothing to be seen"] += 1
                continue
            phrases.setdefault(name, []).append(phrase)
            types.setdefault(name, tuple(kinds.strip("/").split("/")))
        size, boxes = _read_annotation(folder / "Annotations" / f"{file.stem}.xml", counts)
        entities = [counts.entity(name, types[name], phrases[name], list(boxes.get(name, ()))) for name in phrases]
        captions = tuple(line.strip() for line in PHRASE.sub(r"\3", sentences).splitlines() if line.strip())
        yield EntityImage(f"{file.stem}.jpg", images / f"{file.stem}.jpg", size, tuple(entities), captions=captions)


def _read_annotation(file: Path, counts: EntityCounts) -> tuple[tuple[int, int], dict[str, list[Box | None]]]:
    """(height, width) and the boxes by entity; VOC's convention, which counts from 1 and includes both ends."""
    boxes: dict[str, list[Box | None]] = {}
    try:
        root = ElementTree.parse(file).getroot()
        size = (int(root.findtext("size/height") or ""), int(root.findtext("size/width") or ""))
        for item in root.iter("object"):
            if item.find("bndbox") is None:
                continue  # a scene, or not to be seen
            left, top, right, bottom = (float(item.findtext(f"bndbox/{edge}") or "") for edge in ("xmin", "ymin", "xmax", "ymax"))
            box = counts.box(left - 1, top - 1, right - left + 1, bottom - top + 1, size)
            for name in item.findall("name"):
                boxes.setdefault(name.text or "", []).append(box)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{file} is no annotation of Flickr30k Entities ({error})") from error
    return size, boxes


def _picture_folder(folder: Path, images: str | PathLike | None) -> Path:
    usual = [place / name for place in (folder, folder.parent) for name in ("flickr30k-images", "flickr30k_images", "images")]
    found = [place for place in ([Path(images)] if images else usual) if place.is_dir()]
    if not found:
        looked = images or ", ".join(map(str, usual))
        raise FileNotFoundError(f"the images of {folder} are not in {looked}: name their folder (--images)")
    return found[0]


def read_localised_entities(source: str, images: str | PathLike | None = None, names: Any = None) -> list[LocalisedImage]:
    """Entities with boxes as localised phrases, in lower case, grouped by type.

    The pointing game of this data set asks every phrase and takes any of its boxes; where one phrase of an image names several
    entities ("a man" in two captions), the boxes of all of them count.

    Args:
        source: see `read_entities`.
        images: folder of the images.
        names: not needed.
    """
    found = []
    for image in read_entities(source, images):
        groups: dict[str, str] = {}
        parts: dict[str, list[Part]] = {}
        for entity in image.entities:
            for phrase in dict.fromkeys(phrase.lower() for phrase in entity.phrases if entity.boxes):
                groups.setdefault(phrase, entity.types[0])
                parts.setdefault(phrase, []).extend({"box": list(box)} for box in entity.boxes)
        if parts:
            read = (lambda path: lambda: path)(image.path)
            things = tuple(
                Region(tuple(dict.fromkeys(map(str.lower, one.phrases))), one.types[0], [{"box": list(box)} for box in one.boxes])
                for one in image.entities
                if one.boxes and one.phrases
            )
            found.append(LocalisedImage(image.key, read, groups, frozenset(parts), parts, image.size, things))
    return found


OBJECT_SOURCES.register(
    "entities",
    ObjectSource(
        "Flickr30k Entities folder", is_entities, read_localised_entities, lambda source, names: [_place(source)[0]], ("images",)
    ),
)

__all__ = ["Entity", "EntityImage", "is_entities", "read_entities", "read_localised_entities"]
