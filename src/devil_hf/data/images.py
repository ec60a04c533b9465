"""Images of any source, numbered, so that a pass over them can be split between processes, stopped and taken up again.

A source gives its images twice: in order (`stream`), and a chosen few of them once more (`fetch`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image
from transformers.utils import logging

from devil_hf.data.decoding import BadImage, read_picture
from devil_hf.data.identity import combined, identities, image_identity, row_identities
from devil_hf.data.pairs.folder import METADATA_FILES, read_caption_folder
from devil_hf.data.specifications import Sources, read_specification
from devil_hf.data.worlds import SHAPES, World

logger = logging.get_logger(f"transformers.{__name__}")

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass
class NumberedImages:
    """Images that can be read in any order.

    Args:
        name: what the source is called in files and errors.
        numbers: the number of each image, ascending.
        load: image of a number: anything that `load_images` reads.
        key: name of a number.
        hashes: of the images of numbers, by content; None where the name of the source says which images they are.
        warned: of which bad images a warning was given.
    """

    name: str
    numbers: Sequence[int]
    load: Callable[[int], Any]
    key: Callable[[int], str]
    hashes: Callable[[Sequence[int]], Sequence[str]] | None = None
    warned: set[str] = field(default_factory=set, repr=False, compare=False)

    @cached_property
    def identity(self) -> str | None:
        """Hash of all these images by content, with their keys; None where the name says it all."""
        if self.hashes is None:
            return None
        return combined([*map(self.key, self.numbers), *self.hashes(self.numbers)])

    def __len__(self) -> int:
        return len(self.numbers)

    def stream(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Image.Image | None]]:
        """(number, picture) of every `step`-th image from position `start` on; None, and a warning, for a bad one."""
        for position in range(start, len(self.numbers), step):
            number = self.numbers[position]
            yield number, self.picture(number)

    def picture(self, number: int) -> Image.Image | None:
        """The picture of a number; None, and a warning, for an image that is bad (see `decoding.py`)."""
        return _picture(lambda: self.load(number), f"image {number} of {self.name} ({self.key(number)})", self.warned)

    def fetch(self, numbers: Collection[int]) -> Iterator[tuple[int, str, Any]]:
        """(number, key, image) of the named images."""
        for number in sorted(numbers):
            yield number, self.key(number), self.load(number)

    def split(self, every: int) -> tuple["NumberedImages", "NumberedImages"]:
        """Two disjoint parts: all but every `every`-th image, and those."""
        parts = []
        for held_out, name in _part_names(self.name, every):
            chosen = [n for position, n in enumerate(self.numbers) if _is_held_out(position, every) == held_out]
            parts.append(NumberedImages(name, chosen, self.load, self.key, self.hashes))
        return parts[0], parts[1]


@dataclass
class StreamedImages:
    """Images that can only be read from the beginning, such as a streamed data set of the Hub.

    Args:
        name: what the source is called in files and errors.
        read: starts a new reading of all rows, `{column: image, ...}`, in the same order each time.
        column: of the images.
        every, held_out: leave out every `every`-th row, or (held_out) everything else.
        limit: rows to read at most.
        warned: of which bad images a warning was given.
    """

    name: str
    read: Callable[[], Iterable[dict]]
    column: str = "image"
    every: int = 0
    held_out: bool = False
    limit: int | None = None
    warned: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def identity(self) -> None:
        """Nobody knows the images of a stream before they are read."""
        return None

    def _rows(self) -> Iterator[tuple[int, dict]]:
        for number, row in enumerate(islice(self.read(), self.limit)):
            if self.column not in row:
                raise ValueError(f"{self.name} has no column {self.column!r}; its columns are {sorted(row)}")
            if not self.every or (_is_held_out(number, self.every) == self.held_out):
                yield number, row

    def stream(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Image.Image | None]]:
        """(number, picture) of every `step`-th image from position `start` on; None, and a warning, for a bad one."""
        for number, row in islice(self._rows(), start, None, step):
            yield number, _picture(partial(row.__getitem__, self.column), f"image {number} of {self.name}", self.warned)

    def fetch(self, numbers: Collection[int]) -> Iterator[tuple[int, str, Any]]:
        """(number, key, image) of the named images, by reading everything up to the last of them."""
        wanted = set(numbers)
        last = max(wanted, default=-1)
        for number, row in self._rows():
            if number in wanted:
                yield number, str(row.get("key", number)), read_picture(lambda row=row: row[self.column])  # type: ignore[misc]
            if number >= last:
                return

    def split(self, every: int) -> tuple["StreamedImages", "StreamedImages"]:
        """Two disjoint parts: all but every `every`-th image, and those."""
        parts = [
            StreamedImages(name, self.read, self.column, every, held_out, self.limit)
            for held_out, name in _part_names(self.name, every)
        ]
        return parts[0], parts[1]


def _picture(load: Callable[[], Any], where: str, warned: set[str]) -> Image.Image | None:
    try:
        return read_picture(load)
    except BadImage as error:
        if where not in warned:  # an image may be read for more than one purpose
            warned.add(where)
            logger.warning(f"{where} is left out: {error}")
        return None


def _is_held_out(position: int, every: int) -> bool:
    return position % every == every - 1


def _part_names(name: str, every: int) -> list[tuple[bool, str]]:
    """Whether a part is held out, and what it is called: all but every `every`-th image, and those."""
    return [(False, f"{name}, without every {every}th"), (True, f"{name}, every {every}th")]


ImageStream = NumberedImages | StreamedImages


def open_images(
    source: str | PathLike | Sequence | Dataset | IterableDataset,
    split: str | None = None,
    column: str = "image",
    limit: int | None = None,
) -> ImageStream:
    """Open whatever holds images.

    Args:
        source: a folder of images (searched through all its folders), a caption folder, a folder of `save_to_disk`, the id
            of a Hub data set (streamed), `shapes:COUNT` or `shapes:COUNT:SEED` for scenes of the embedded world; or a
            data set, or a list of images or paths.
        split: of a caption folder or a data set.
        column: of the images in a data set.
        limit: only this many images from the beginning.

    Raises:
        FileNotFoundError: for a folder without images.
        ValueError: for a source that is none of these, holds no such column, or has no such split.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or not given")
    if isinstance(source, str | PathLike):
        return _named_images(read_specification(source), split, column, limit)
    if split is not None:
        raise ValueError(f"split={split!r} is of a named source; choose it where the data set or list is made")
    if isinstance(source, IterableDataset):
        stream = _undecoded(source, column)
        return StreamedImages(_named(_stream_name(stream), limit), lambda: stream, column, limit=limit)
    if isinstance(source, Dataset):
        return _first(_dataset(source, column, f"data set of {len(source)} images"), limit)
    images = source
    name = f"list of {len(images)} images"
    listed = NumberedImages(name, range(len(images)), lambda number: images[number], str)
    listed.hashes = lambda numbers: [image_identity(images[number]) for number in numbers]
    return _first(listed, limit)


def _named_images(named: World | Sources | Path | str, split: str | None, column: str, limit: int | None) -> ImageStream:
    if isinstance(named, World):
        if split is not None:
            raise ValueError(f"{named.name} has no splits, so split={split!r} cannot be chosen; leave it out")
        return _first(_scenes(named), limit)
    if isinstance(named, Path) and named.is_dir():
        return _first(_folder(named, split, column), limit)
    if not isinstance(named, str) or named.count("/") != 1:
        raise ValueError(f"{named!s:.200} is neither a folder of images, nor {SHAPES}:COUNT, nor the id of a Hub data set")
    split = split or "train"
    rows = _undecoded(load_dataset(named, split=split, streaming=True), column)
    return StreamedImages(_named(f"{named}, split {split}", limit), lambda: rows, column, limit=limit)


def _first(images: NumberedImages, limit: int | None) -> NumberedImages:
    images.numbers = images.numbers[:limit]
    images.name = _named(images.name, limit)
    return images


def _named(name: str, limit: int | None) -> str:
    return name if limit is None else f"{name}, first {limit}"


def _stream_name(stream: IterableDataset) -> str:
    name = getattr(stream.info, "dataset_name", None) or "stream"
    return name if stream.split is None else f"{name}, split {stream.split}"


def _scenes(world: World) -> NumberedImages:
    return NumberedImages(
        world.name, range(len(world)), lambda number: Image.fromarray(world.scene(number).image), lambda number: f"scene {number}"
    )


def _folder(folder: Path, split: str | None, column: str) -> NumberedImages:
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        dataset = load_from_disk(str(folder))
        if isinstance(dataset, Dataset):
            if split is not None:
                raise ValueError(f"{folder} is one data set without splits, so split={split!r} cannot be chosen; leave it out")
            return _dataset(dataset, column, str(folder))
        part = split or "train"
        if part not in dataset:
            raise ValueError(f"{folder} has no split {part!r}; its splits are {sorted(dataset)}")
        return _dataset(dataset[part], column, f"{folder}, split {part}")
    name = str(folder)
    if split is not None or any((folder / file).is_file() for file in METADATA_FILES):
        listed = read_caption_folder(folder, split)
        paths, keys = [one.path for one in listed], [one.name for one in listed]
        name = name if split is None else f"{folder}, split {split}"
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
        keys = [str(path.relative_to(folder)) for path in paths]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no image with one of the extensions {sorted(EXTENSIONS)}")
    return NumberedImages(
        name,
        range(len(paths)),
        paths.__getitem__,
        keys.__getitem__,
        lambda numbers: identities([paths[number] for number in numbers], name),
    )


def _dataset(dataset: Dataset, column: str, name: str) -> NumberedImages:
    if column not in dataset.column_names:
        raise ValueError(f"{name} has no column {column!r}; its columns are {dataset.column_names}")

    rows = _undecoded(dataset.select_columns([column]), column)
    keys = dataset.select_columns(["key"]) if "key" in dataset.column_names else None

    def key(number: int) -> str:
        return str(number if keys is None else keys[number]["key"])

    def hashes(numbers: Sequence[int]) -> list[str]:
        return row_identities(rows.select(numbers), column, name)

    def load(number: int) -> Image.Image:
        return read_picture(lambda: rows[number][column])

    return NumberedImages(name, range(len(dataset)), load, key, hashes)


def _undecoded(dataset: Any, column: str) -> Any:
    """A data set whose images are decoded here, so that a broken one does not end the reading of all."""
    if dataset.features and isinstance(dataset.features.get(column), ImageFeature):
        return dataset.cast_column(column, ImageFeature(decode=False))
    return dataset
