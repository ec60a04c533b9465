"""Images whose objects have names and places: what attribution maps are measured against, and what regions are learned from.

Whatever the format, an image gives one mask per phrase: the union of all its objects of that class, in the pixels of the upright
image. A source is a file of this folder (or of another package) that registers an `ObjectSource`; where an object is, it says as
data (see `masks.py`), so that a mask is drawn when somebody asks for it, in any process.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from devil_hf.data.objects.masks import Part, draw_region
from devil_hf.registry import Registry

CLASS = "class"  # the group of phrases that are class names


@dataclass(frozen=True)
class Region:
    """One thing of an image.

    Args:
        phrases: what it is called, at least one.
        group: that scores are reported for.
        parts: where it is, as `masks.py` has it.
    """

    phrases: tuple[str, ...]
    group: str
    parts: list[Part]


@dataclass(frozen=True)
class LocalisedImage:
    """One image, and where its phrases are.

    Args:
        key: name of the image, unique in its source.
        read: gives the image, as anything that holds one, such as a path.
        groups: phrase -> group that scores are reported for ("colour", or `CLASS`).
        present: everything that is known to be in the image, phrases or not.
        parts: phrase -> its objects, as `masks.py` has them.
        size: (height, width) of the upright image that the parts were drawn on; None where they do not say it.
        things: one by one, where the source knows several phrases of a thing, or several things of a phrase.
    """

    key: str
    read: Callable[[], Any]
    groups: dict[str, str]
    present: frozenset[str]
    parts: dict[str, list[Part]]
    size: tuple[int, int] | None = None
    things: tuple[Region, ...] | None = None

    @property
    def regions(self) -> tuple[Region, ...]:
        """The things of the image, one by one; where the source does not tell them apart, one for each phrase."""
        if self.things is not None:
            return self.things
        return tuple(Region((phrase,), group, self.parts[phrase]) for phrase, group in self.groups.items())

    def region(self, phrase: str) -> dict[str, Any]:
        """Where a phrase is, as JSON can hold it; `draw_region` draws it."""
        return self.place(self.parts[phrase])

    def place(self, parts: list[Part]) -> dict[str, Any]:
        """Where parts of this image are, as JSON can hold it; `draw_region` draws it."""
        return {"parts": parts, "size": None if self.size is None else list(self.size)}

    def draw(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Phrase -> bool mask of `size`, the (height, width) of the upright image.

        Raises:
            ValueError: if the objects were drawn on an image of another size.
        """
        try:
            return {phrase: draw_region(self.region(phrase), size) for phrase in self.parts}
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from error


@dataclass(frozen=True)
class ObjectSource:
    """A format of images with objects.

    Args:
        what: what it is called in messages.
        recognises: whether a text of the command line names such a source.
        read: (source, folder of the images or None, class names or None) -> its images that hold an object, none of them opened.
        files: (source, class names or None) -> the files and folders that decide what is read, images aside.
        options: which of the two it knows.
    """

    what: str
    recognises: Callable[[str], bool]
    read: Callable[[str, str | PathLike | None, str | PathLike | None], list[LocalisedImage]]
    files: Callable[[str, str | PathLike | None], list[Path]] = lambda source, names: [Path(source)]
    options: Collection[str] = ("images", "names")


OBJECT_SOURCES: Registry[ObjectSource] = Registry("object source", "devil_hf.data.objects")


def open_localised(
    source: str | PathLike, images: str | PathLike | None = None, names: str | PathLike | None = None
) -> list[LocalisedImage]:
    """The images of a source, without opening any.

    Args:
        source: `shapes:COUNT` or `shapes:COUNT:SEED` (words that one object of several has); a COCO instances `.json`; a VOC
            folder (`Annotations`, `JPEGImages`, and `SegmentationClass` where there are masks); or a folder of YOLO `.txt`
            labels, boxes or polygons; a folder of Flickr30k Entities, with `:SPLIT` where it has any; or what another entry of
            `OBJECT_SOURCES` reads.
        images: folder of the images, where it is not the usual one.
        names: class names for YOLO labels: a `data.yaml`, a text file with one name a line, or JSON or YAML that maps ids to
            names; `FILE#KEY` for a table inside the file.

    Raises:
        FileNotFoundError: if something named is not there.
        ValueError: for a source that is none of these, or holds no object, and for images or names that it does not need.
    """
    text = str(source)
    for kind in _kinds():
        if kind.recognises(text):
            for option, value in (("images", images), ("names", names)):
                if value is not None and option not in kind.options:
                    raise ValueError(f"{option}={str(value)!r} is nothing that {text} ({kind.what}) needs: leave it out")
            found = kind.read(text, images, names)
            if not found:
                raise ValueError(f"{text} names no object of any image")
            return found
    known = " or ".join(sorted(kind.what for kind in _kinds()))
    if not Path(text).exists():
        raise FileNotFoundError(f"{text} does not exist; name {known}")
    raise ValueError(f"{text} is no {known}")


def _kinds() -> list[ObjectSource]:
    """By name, whichever was imported first: Flickr30k Entities comes before VOC, whose layout it holds as well."""
    return [OBJECT_SOURCES[name] for name in sorted(OBJECT_SOURCES)]


def deciding_files(source: str | PathLike, names: str | PathLike | None = None) -> list[Path]:
    """The files and folders that decide what `open_localised` reads, images aside; none of what it does not know.

    Raises:
        FileNotFoundError: if class names are needed and not there.
    """
    text = str(source)
    return next((kind.files(text, names) for kind in _kinds() if kind.recognises(text)), [])


def of_file(
    path: Path,
    parts: dict[str, list[Part]],
    key: str | None = None,
    present: Iterable[str] = (),
    size: tuple[int, int] | None = None,
) -> LocalisedImage:
    """An image in a file, whose phrases are names of classes.

    Args:
        path: of the image.
        parts: class -> its objects.
        key: by default the file's name.
        present: classes that are in the image beside those that are asked.
        size: (height, width) that the parts were drawn on.
    """
    groups = dict.fromkeys(parts, CLASS)
    return LocalisedImage(key or path.name, lambda: path, groups, frozenset(parts) | frozenset(present), parts, size)


__all__ = ["CLASS", "OBJECT_SOURCES", "LocalisedImage", "ObjectSource", "Region", "deciding_files", "of_file", "open_localised"]
