"""Which images these are, by content: what a stopped work compares with before it goes on.

A file is known by its size and by samples of its content, not by its time: a copy is the same, an edited one is not. Work that
keeps something per row (exemplars, cached features, rows of an evaluation) stores these hashes beside it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from PIL import Image
from tqdm.auto import tqdm

from devil_hf.data.objects.masks import region_digest
from devil_hf.data.pairs import open_pairs
from devil_hf.data.pairs.shards import expand_urls
from devil_hf.data.worlds import SHAPES

BLOCK = 4096
FEW, MANY = 2, 16  # blocks that are read of a file up to `LARGE`, and of a larger one
LARGE = 1 << 20
READERS = 16  # threads: a slow disk answers many at once
HUB = "hub"  # the kind of a data set of the Hub, where it streams
SHOWN = 5_000  # files from which on a progress bar is shown


def file_identity(path: str | os.PathLike | None) -> str:
    """Hash of a file's size and of samples of its content; of something that is no local file, of its name."""
    digest = hashlib.sha256()
    try:
        with open(path or "", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            for start in _starts(size):
                file.seek(start)
                digest.update(file.read(BLOCK))
    except OSError:
        digest.update(f"no file: {path}".encode())
    return digest.hexdigest()[:32]


def _starts(size: int) -> list[int]:
    blocks = FEW if size <= LARGE else MANY
    if size <= FEW * BLOCK:
        return list(range(0, size, BLOCK))
    return [round(at * (size - BLOCK) / (blocks - 1)) for at in range(blocks)]


def identities(paths: Sequence[str | os.PathLike | None], what: str = "files") -> list[str]:
    """`file_identity` of many files, with several readers at once.

    Args:
        what: they are, for the progress bar of many.
    """
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(file_identity, paths, chunksize=64)
        return list(tqdm(found, total=len(paths), desc=f"{what}: looking for changes", disable=len(paths) < SHOWN, leave=False))


def image_identity(image: Any) -> str:
    """Hash of an image by content: a path or bytes, or a picture or array with its pixels."""
    if isinstance(image, dict):  # of `datasets`, undecoded
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | os.PathLike):
        return file_identity(Path(image))
    digest = hashlib.sha256()
    if isinstance(image, bytes):
        digest.update(image)
    elif isinstance(image, Image.Image):
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    else:
        array = np.ascontiguousarray(image)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def combined(hashes: Iterable[str]) -> str:
    """One hash of several, in their order."""
    digest = hashlib.sha256()
    for one in hashes:
        digest.update(one.encode() + b"\n")
    return digest.hexdigest()[:32]


def pair_identity(row: dict[str, Any]) -> str:
    """Hash of a row of `open_pairs`: key, captions, region and image."""
    digest = hashlib.sha256(json.dumps([row["key"], row["captions"]]).encode())
    digest.update(b"" if row["region"] is None else region_digest(row["region"]))
    digest.update(b"" if row["image"] is None else image_identity(row["image"]).encode())
    return digest.hexdigest()[:32]


class PairIdentities:
    """Hashes of the rows of `open_pairs`, by their position, without decoding an image.

    Of a stream, whose rows are not known beforehand, all rows have the hash of the sources, of their local shards, and of the
    rows of regions.

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
        rows, paths, digest = self.dataset.with_format("arrow"), [], hashlib.sha256()
        for table in rows.iter(1000):
            columns = [table[name].to_pylist() for name in ("key", "captions", "image", "region")]
            for key, captions, image, region in zip(*columns, strict=True):
                content = image and image["bytes"]
                digest.update(json.dumps([key, captions, content and hashlib.sha256(content).hexdigest()]).encode())
                digest.update(b"" if region is None else region_digest(region))
                paths.append(image["path"] if image and content is None else None)
        digest.update(combined(identities([path for path in paths if path is not None], "data")).encode())
        return digest.hexdigest()[:32]


def _stream_identity(sources: Sequence[dict]) -> str:
    parts = [json.dumps(list(sources), sort_keys=True, default=str)]
    for source in sources:
        if source["kind"] == "webdataset":
            parts += identities(expand_urls(source["urls"]), "shards")
        elif source["kind"] not in (SHAPES, HUB):  # these are named by what they are
            parts.append(PairIdentities([], open_pairs([source], seed=0, shuffle=False)).all())
    return combined(parts)


__all__ = ["PairIdentities", "combined", "file_identity", "identities", "image_identity", "pair_identity"]
