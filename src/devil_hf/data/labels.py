"""Images of which it is known what is in them, however it is written down: by folders of classes, by objects, or by captions.

Names (of classes and objects) are taken as complete: what is not named is not there. Captions are not: people leave things out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from devil_hf.data.captioned import open_captioned
from devil_hf.data.decoding import read_picture
from devil_hf.data.identity import image_identity
from devil_hf.data.images import open_images
from devil_hf.data.objects import OBJECT_SOURCES, open_localised
from devil_hf.data.pairs.folder import METADATA_FILES
from devil_hf.data.specifications import read_specification
from devil_hf.data.worlds import World


@dataclass(frozen=True)
class LabelledImages:
    """Images and what is known of them.

    Args:
        name: what they are, for people.
        keys: one name per image.
        texts: per image, the names of what is in it, or its captions.
        named: whether texts are names, and complete.
        load: the image at a position.
        identity: a hash of the image at a position.
    """

    name: str
    keys: list[str]
    texts: list[list[str]]
    named: bool
    load: Callable[[int], Image.Image]
    identity: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.keys)


def open_labelled(
    source: str,
    split: str | None = None,
    limit: int = 200,
    images: str | PathLike | None = None,
    names: str | PathLike | None = None,
) -> LabelledImages:
    """Open the first `limit` images of a source, of folders of classes one of each in turn.

    Args:
        source: a folder with a folder of images for each class; a COCO `.json`, VOC or YOLO folder, or what else
            `open_localised` reads; a caption folder, or sources as `open_captioned` reads them.
        split: of a caption folder.
        images, names: of a source that `open_localised` reads, as there.

    Raises:
        FileNotFoundError: for a folder without images.
        ValueError: for a source that is none of these, a folder whose images lie in no folders of classes, a split of anything
            but a caption folder, and images or names of anything but objects.
    """
    named = read_specification(source)
    if isinstance(named, World):
        raise ValueError(f"{named.name}: what scenes hold is known by other means than labels; name labelled images")
    folder = Path(source)
    captions = any((folder / file).is_file() for file in METADATA_FILES) or not isinstance(named, Path) or split is not None
    objects = not captions and any(kind.recognises(source) for kind in OBJECT_SOURCES.values())
    if objects:
        return _of_objects(source, limit, images, names)
    if images is not None or names is not None:
        raise ValueError(f"{source} has no objects by COCO, VOC or YOLO, which --images and --names are of: leave them out")
    if not captions and folder.is_dir():
        return _of_classes(folder, limit)
    found = open_captioned(source, split, limit)
    return LabelledImages(found.name, found.keys, found.captions, False, found.load, lambda at: found.identities[at])


def _of_objects(source: str, limit: int, images: str | PathLike | None, names: str | PathLike | None) -> LabelledImages:
    found = open_localised(source, images, names)[:limit]
    texts = [sorted(one.present) for one in found]
    return _of_files(source, [one.key for one in found], texts, [one.read for one in found])


def _of_classes(folder: Path, limit: int) -> LabelledImages:
    images = open_images(folder)
    by_class: dict[str, list[str]] = {}
    for number in images.numbers:  # type: ignore[union-attr]
        key = images.key(number)  # type: ignore[union-attr]
        if len(Path(key).parts) < 2:
            raise ValueError(
                f"{folder / key} lies in no folder of a class: move the images of each class into a folder of its name"
            )
        by_class.setdefault(Path(key).parts[0], []).append(key)
    keys = [key for key in chain.from_iterable(zip_longest(*by_class.values())) if key is not None][:limit]
    texts = [[Path(key).parts[0].replace("_", " ")] for key in keys]
    return _of_files(folder.name, keys, texts, [lambda key=key: folder / key for key in keys])  # type: ignore[misc]


def _of_files(name: str, keys: list[str], texts: list[list[str]], read: Sequence[Callable[[], Any]]) -> LabelledImages:
    return LabelledImages(name, keys, texts, True, lambda at: read_picture(read[at]), lambda at: image_identity(read[at]()))


__all__ = ["LabelledImages", "open_labelled"]
