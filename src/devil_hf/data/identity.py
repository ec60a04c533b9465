"""Which images these are, by content: what a stopped work compares with before it goes on.

A file of up to a megabyte, as nearly all images are, is known by all of its content: a copy is the same, an edited one is not.
Reading larger ones whole (shards of gigabytes) would make every start wait, and no samples of them find one image that was put
in another's place. They are known by their size, by samples, and by when they were last changed: a copy that does not keep the
time (`cp -p`, `rsync -a` and `tar` do) is another file. That costs work done anew, where the other mistake would keep what is
wrong. What is embedded in a data set has no such time, and is read whole.

Work that keeps something per row (exemplars, cached features, rows of an evaluation) stores these hashes beside it. An image that
cannot be read has a hash as well: whether it is bad, whoever reads it decides.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from tqdm.auto import tqdm

from devil_hf.data.objects.masks import unpack_region
from devil_hf.data.pairs import open_pairs
from devil_hf.data.pairs.shards import find_shards
from devil_hf.data.worlds import SHAPES

LARGE = 1 << 20  # bytes up to which a file is read whole
BLOCK, BLOCKS = 4096, 16  # that are read of a larger one
READERS = 16  # threads: a slow disk answers many at once
HUB = "hub"  # the kind of a data set of the Hub, where it streams
SHOWN = 5_000  # images from which on a progress bar is shown
ROWS = 100  # that are hashed at once


def file_identity(path: str | os.PathLike | None) -> str:
    """Hash of a file's content, of a large one of its size, time and samples; of something that is no local file, of its name."""
    digest = hashlib.sha256()
    try:
        with open(path or "", "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_size <= LARGE:
                digest.update(file.read())
            else:
                digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
                for at in range(BLOCKS):
                    file.seek(round(at * (about.st_size - BLOCK) / (BLOCKS - 1)))
                    digest.update(file.read(BLOCK))
    except (OSError, ValueError):  # the latter for a name that no file can have
        digest.update(f"no file: {path}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def identities(paths: Sequence[str | os.PathLike | None], what: str = "files") -> list[str]:
    """`file_identity` of many files, with several readers at once.

    Args:
        what: they are, for the progress bar of many.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(_shown(pool.map(file_identity, paths, chunksize=64), len(paths), what))


def row_identities(dataset: Dataset, column: str, what: str) -> list[str]:
    """`image_identity` of a column of images, which are not decoded; some at once, so that memory holds no more than these."""
    with ThreadPoolExecutor(READERS) as pool:
        hashes = (one for batch in dataset.iter(ROWS) for one in pool.map(image_identity, batch[column]))
        return list(_shown(hashes, len(dataset), what))


def _shown(hashes: Iterable[str], total: int, what: str) -> Iterable[str]:
    return tqdm(hashes, total=total, desc=f"{what}: looking for changes", disable=total < SHOWN, leave=False)


def image_identity(image: Any) -> str:
    """Hash of an image by content: of a path or bytes, of the pixels of a picture, array or tensor, and of what is no image."""
    if isinstance(image, dict):  # of `datasets`, undecoded
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | os.PathLike):
        return file_identity(Path(image))
    if isinstance(image, list | tuple) and image and not isinstance(image[0], int | float | list | tuple):
        return combined(map(image_identity, image))
    digest = hashlib.sha256()
    if isinstance(image, bytes):
        digest.update(image)
    elif isinstance(image, Image.Image):
        digest.update(f"{image.mode} {image.size}".encode())
        try:
            digest.update(image.tobytes())
        except Exception as error:  # damaged files make Pillow's plugins raise almost anything
            digest.update(f"broken: {type(error).__name__}".encode())
    else:
        digest.update(_array_bytes(image))
    return digest.hexdigest()[:32]


def _array_bytes(image: Any) -> bytes:
    """Type, shape and values of an array; of what is none, its type alone: numpy would give addresses in memory."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # numpy has no bfloat16
    try:
        array = np.ascontiguousarray(image)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.dtype.hasobject:
        return f"no image: {type(image).__name__}".encode()
    return f"{array.dtype} {array.shape}".encode() + array.tobytes()


def combined(hashes: Iterable[str]) -> str:
    """One hash of several, in their order."""
    digest = hashlib.sha256()
    for one in hashes:
        digest.update(one.encode() + b"\n")
    return digest.hexdigest()[:32]


def pair_identity(row: dict[str, Any]) -> str:
    """Hash of a row of `open_pairs`: key, captions, region and image."""
    digest = hashlib.sha256(json.dumps([row["key"], row["captions"]]).encode())
    digest.update(b"" if row["region"] is None else region_identity(unpack_region(row["region"])).encode())
    digest.update(b"" if row["image"] is None else image_identity(row["image"]).encode())
    return digest.hexdigest()[:32]


def region_identity(region: Mapping[str, Any], masks: dict[str, str] | None = None) -> str:
    """Hash of what a region shows: its outlines, and the content of its mask files, wherever those lie, if they do.

    Args:
        region: as `devil_hf.data.objects.masks` has it.
        masks: the hashes of files that were read already, by path; gets those of others. An image's classes share their file.
    """
    masks = {} if masks is None else masks
    digest = hashlib.sha256(json.dumps(region["size"]).encode())
    for part in region["parts"]:
        if "classes" in part:
            file = part["classes"]
            masks[file] = masks.get(file) or file_identity(file)
            part = dict(part) | {"classes": masks[file]}
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:32]


class PairIdentities:
    """Hashes of the rows of `open_pairs`, by their position, without decoding an image.

    Of a stream, whose rows are not known beforehand, all rows have the hash of the sources, of their shards (local ones by
    content, those of a repository by its commit), and of the rows of regions.

    Args:
        sources: that were opened.
        dataset: what `open_pairs` gave.
    """

    def __init__(self, sources: Sequence[dict], dataset: Dataset | IterableDataset):
        self.dataset = dataset if isinstance(dataset, Dataset) else None
        self._stream = None if self.dataset is not None else _stream_identity(sources)

    def __call__(self, position: int) -> str | None:
        """The hash of a row; None behind the last one."""
        if self.dataset is None:
            return self._stream
        return pair_identity(self.dataset[position]) if position < len(self.dataset) else None

    @property
    def extent(self) -> str:
        """What decides how many rows there are."""
        return str(self._stream) if self.dataset is None else str(len(self.dataset))

    def all(self) -> str:
        """One hash of all rows."""
        if self.dataset is None:
            return str(self._stream)
        rows, masks, paths = self.dataset.with_format("arrow"), dict[str, str](), list[str]()
        digest = hashlib.sha256()
        with tqdm(total=len(rows), desc="data: looking for changes", disable=len(rows) < SHOWN, leave=False) as bar:
            for table in rows.iter(ROWS):
                columns = [table[name].to_pylist() for name in ("key", "captions", "image", "region")]
                for key, captions, image, region in zip(*columns, strict=True):
                    content, path = (None, None) if image is None else (image["bytes"], image["path"])
                    if content is None and path is not None:
                        paths.append(path)
                    known = hashlib.sha256(content).hexdigest() if content is not None else path is not None
                    shown = region and region_identity(unpack_region(region), masks)
                    digest.update(json.dumps([key, captions, known, shown]).encode())
                bar.update(len(table))
        digest.update(combined(identities(paths, "data")).encode())
        return digest.hexdigest()[:32]


def _stream_identity(sources: Sequence[dict]) -> str:
    parts = [json.dumps(list(sources), sort_keys=True, default=str)]
    for source in sources:
        if source["kind"] == "webdataset":
            named = {name: source.get(name) for name in ("urls", "repo", "split", "revision")}
            parts += identities(list(find_shards(**named)), "shards")
        elif source["kind"] not in (SHAPES, HUB):  # these are named by what they are
            parts.append(PairIdentities([], open_pairs([source], seed=0, shuffle=False)).all())
    return combined(parts)


__all__ = [
    "PairIdentities",
    "combined",
    "file_identity",
    "identities",
    "image_identity",
    "pair_identity",
    "region_identity",
    "row_identities",
]
