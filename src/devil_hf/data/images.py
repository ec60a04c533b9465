"""Images of any source, numbered, so that a pass over them can be split between processes, stopped and taken up again.

A source gives its images twice: in order (`stream`), and a chosen few of them once more (`fetch`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from devil_hf.data.identity import combined, identities, image_identity
from devil_hf.data.pairs.folder import METADATA_FILES, read_caption_folder
from devil_hf.data.specifications import Sources, read_specification
from devil_hf.data.worlds import SHAPES, World

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
    """

    name: str
    numbers: Sequence[int]
    load: Callable[[int], Any]
    key: Callable[[int], str]
    hashes: Callable[[Sequence[int]], Sequence[str]] | None = None

    @cached_property
    def identity(self) -> str | None:
        """Hash of all these images by content, with their keys; None where the name says it all."""
        if self.hashes is None:
            return None
        return combined([*map(self.key, self.numbers), *self.hashes(self.numbers)])

    def __len__(self) -> int:
        return len(self.numbers)

    def stream(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        """(number, image) of every `step`-th image from position `start` on."""
        for position in range(start, len(self.numbers), step):
            yield self.numbers[position], self.load(self.numbers[position])

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
    """

    name: str
    read: Callable[[], Iterable[dict]]
    column: str = "image"
    every: int = 0
    held_out: bool = False
    limit: int | None = None

    @property
    def identity(self) -> None:
        """Nobody knows the images of a stream before they are read."""
        return None

    def _rows(self) -> Iterator[tuple[int, dict]]:
        for number, row in enumerate(islice(self.read(), self.limit)):
            if not self.every or (_is_held_out(number, self.every) == self.held_out):
                yield number, row

    def stream(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        """(number, image) of every `step`-th image from position `start` on."""
        for number, row in islice(self._rows(), start, None, step):
            yield number, row[self.column]

    def fetch(self, numbers: Collection[int]) -> Iterator[tuple[int, str, Any]]:
        """(number, key, image) of the named images, by reading everything up to the last of them."""
        wanted = set(numbers)
        last = max(wanted, default=-1)
        for number, row in self._rows():
            if number in wanted:
                yield number, str(row.get("key", number)), row[self.column]
            if number >= last:
                return

    def split(self, every: int) -> tuple["StreamedImages", "StreamedImages"]:
        """Two disjoint parts: all but every `every`-th image, and those."""
        parts = [
            StreamedImages(name, self.read, self.column, every, held_out, self.limit)
            for held_out, name in _part_names(self.name, every)
        ]
        return parts[0], parts[1]


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
        ValueError: for a source that is none of these, or holds no such column.
    """
    if isinstance(source, str | PathLike):
        return _named_images(read_specification(source), split, column, limit)
    if isinstance(source, IterableDataset):
        stream = source
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
        return _first(_scenes(named), limit)
    if isinstance(named, Path) and named.is_dir():
        return _first(_folder(named, split, column), limit)
    if not isinstance(named, str) or named.count("/") != 1:
        raise ValueError(f"{named!s:.200} is neither a folder of images, nor {SHAPES}:COUNT, nor the id of a Hub data set")
    split = split or "train"
    rows = load_dataset(named, split=split, streaming=True)
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
            return _dataset(dataset, column, str(folder))
        part = split or "train"
        return _dataset(dataset[part], column, f"{folder}, split {part}")
    name = str(folder)
    if any((folder / file).is_file() for file in METADATA_FILES):
        paths = [one.path for one in read_caption_folder(folder, split)]
        name = name if split is None else f"{folder}, split {split}"
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no image with one of the extensions {sorted(EXTENSIONS)}")
    return NumberedImages(
        name,
        range(len(paths)),
        paths.__getitem__,
        lambda number: str(paths[number].relative_to(folder)),
        lambda numbers: identities([paths[number] for number in numbers], name),
    )


def _dataset(dataset: Dataset, column: str, name: str) -> NumberedImages:
    if column not in dataset.column_names:
        raise ValueError(f"{name} has no column {column!r}; its columns are {dataset.column_names}")

    def key(number: int) -> str:
        return str(dataset[number]["key"]) if "key" in dataset.column_names else str(number)

    def hashes(numbers: Sequence[int]) -> list[str]:
        rows = dataset.select_columns([column])
        if isinstance(rows.features[column], ImageFeature):
            rows = rows.cast_column(column, ImageFeature(decode=False))
        return [image_identity(rows[number][column]) for number in numbers]

    return NumberedImages(name, range(len(dataset)), lambda number: dataset[number][column], key, hashes)
