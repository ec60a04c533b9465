"""Rows of `devil_hf.data.pairs.open_pairs` to decoded samples, and the count of those that cannot be decoded.

What makes a row bad, everywhere in the package, is this list: its image cannot be read or decoded (`read_picture`: it
is absent, broken, of no known format, without a pixel, or larger than Pillow's limit against decompression bombs); no
caption has any text, or none that the language model reads as words; its region cannot be drawn; or its source
already said so (a damaged shard). A bad row is counted, logged with its key, and left out: a stream goes on with the
next row, a table gives another row in its place, a pass over images (`exemplars.py`) does without it.

How the count works in many processes. `BadSamples` holds its counts in shared memory, one slot for each `DataLoader`
worker, so that no worker waits for another and the main process sees the sum. Whoever counts judges that sum, once
`minimum` rows were read, and raises `TooManyBadSamples`, which a `DataLoader` hands on to the main process. Each
process of a distributed run judges what it has read itself: if more than the limit is bad over all, it is in at
least one of them. What is left at the end of a pass that is shorter than `minimum` rows is judged by
`BadSamples.judge`, called in the main process.

Nothing here draws from a global random generator: which caption is used, and which row replaces a bad one, depend on
(seed, epoch, row) alone, so that reading again gives the same samples.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from io import BytesIO
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.utils.file_utils import xopen
from huggingface_hub import HfFileSystem
from PIL import Image
from torch.utils.data import get_worker_info
from transformers.utils import logging

from devil_hf.data.objects.masks import draw_region, unpack_region
from devil_hf.model.image_processing_devil import load_images

logger = logging.get_logger(f"transformers.{__name__}")

WORKER_SLOTS = 256
LOGGED_SAMPLES = 100  # per process; further bad samples are only counted
REPLACEMENTS = 100  # rows that are tried in place of a bad one
BARREN_PASSES = 10  # without a good sample, after which an endless stream gives up; shards move between workers


class TooManyBadSamples(RuntimeError):
    """More than the configured share of the samples cannot be used."""


class BadImage(ValueError):
    """An image that cannot be used; the message says why, in a line without its content."""


def read_picture(load: Callable[[], Any]) -> Image.Image:
    """The upright RGB picture of one image.

    Args:
        load: gives the image: what `load_images` reads, or `{"bytes", "path"}` of an undecoded row.

    Raises:
        BadImage: if it cannot be decoded, whatever the reason, or `load` raises an OSError, SyntaxError or ValueError.
    """
    try:
        image = load()
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage(_line(error)) from error
    try:
        return _decode(image) if isinstance(image, dict) else load_images(image)[0]
    except Exception as error:  # damaged files make Pillow's plugins raise almost anything
        raise BadImage(_line(error)) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


class BadSamples:
    """Counts the samples that were read, and those that were bad or out of sight, over all workers of a process.

    Args:
        limit: share of bad samples above which the run stops.
        minimum: samples to read before the share is judged while reading.
    """

    def __init__(self, limit: float = 0.05, minimum: int = 1000):
        if not 0 <= limit <= 1:
            raise ValueError(f"limit={limit} must be a share between 0 and 1")
        self.limit, self.minimum = limit, minimum
        # (process; read, bad, out of sight)
        self._counts = torch.zeros(1 + WORKER_SLOTS, 3, dtype=torch.int64).share_memory_()
        self._logged = 0

    @property
    def read(self) -> int:
        """Samples that were read, good and bad."""
        return int(self._counts[:, 0].sum())

    @property
    def bad(self) -> int:
        """Samples that could not be used."""
        return int(self._counts[:, 1].sum())

    @property
    def out_of_sight(self) -> int:
        """Samples that were left out because the model would see nothing of their region; they are not bad."""
        return int(self._counts[:, 2].sum())

    def add(self, key: str, problem: str | None, seen: bool = True) -> None:
        """Count one sample, which is bad if it has a `problem`.

        Raises:
            TooManyBadSamples: if the share of bad samples is above the limit, once `minimum` were read.
        """
        worker = get_worker_info()
        counts = self._counts[0 if worker is None else 1 + worker.id % WORKER_SLOTS]
        counts[0] += 1
        counts[2] += not seen
        detail = ""
        if problem is not None:
            counts[1] += 1
            self._log(key, problem)
            detail = f"; the last was {key}: {problem}"
        if self.read >= self.minimum:
            self.judge(detail)

    def _log(self, key: str, problem: str) -> None:
        self._logged += 1
        if self._logged <= LOGGED_SAMPLES:
            logger.warning(f"skipped {key}: {problem}")
        if self._logged == LOGGED_SAMPLES:
            logger.warning("further bad samples are counted, but not logged")

    def judge(self, detail: str = "") -> None:
        """Raise `TooManyBadSamples` if the share of bad samples so far is above the limit.

        Call it in the main process at the end of a pass or of the run: reading judges only from `minimum` samples on.
        """
        if self.bad > self.limit * self.read:
            raise TooManyBadSamples(
                f"{self.bad} of {self.read} samples ({self.bad / self.read:.1%}) are bad, more than the limit of "
                f"{self.limit:.1%}{detail}; mend the data, or raise the limit"
            )

    def __str__(self) -> str:
        unseen = f", {self.out_of_sight} lay outside of what the model sees" if self.out_of_sight else ""
        return f"{self.bad} of {self.read} samples were bad{unseen}"


class PairDecoder:
    """Decodes a row of `open_pairs`, or counts it as bad.

    Args:
        bad_samples: where samples are counted.
        seed: seed of the choice among several captions.
        sees: whether enough of a mask (height, width) is in what the model gets to see; rows with other
            regions are left out and counted, and are not bad.
        read: tokenises captions, for what is trained on; each that it gives a ValueError for is left out.
    """

    def __init__(
        self,
        bad_samples: BadSamples,
        seed: int = 0,
        sees: Callable[[np.ndarray], bool] | None = None,
        read: Callable[[list[str]], Sequence[Any]] | None = None,
    ):
        self.bad_samples, self.seed, self.sees, self.read = bad_samples, seed, sees, read

    def __call__(self, row: dict[str, Any], epoch: int = 0) -> dict[str, Any] | None:
        """Decode one row.

        Returns:
            A dictionary of `key` (str), `image` (upright RGB `PIL.Image`), `captions` (list of non-empty str),
            `caption` (one of them, another one in another epoch), `region` (bool mask of the image's size that they speak of,
            or `None` for the whole image) and `seed` (int, for random views of the image), or `None` for a row that
            cannot be used.
        """
        image, region, problem = None, None, row["problem"]
        captions = [text for text in (" ".join(caption.split()) for caption in row["captions"] or []) if text]
        if problem is None and not captions:
            problem = "empty caption"
        if problem is None and self.read is not None:
            captions, problem = self._readable(captions, self.read)
        if problem is None:
            try:
                image = read_picture(lambda: row["image"] or {})
            except BadImage as error:
                problem = f"broken image ({error})"
        if image is not None and row["region"] is not None:
            try:
                region = draw_region(unpack_region(row["region"]), (image.height, image.width))
            except (OSError, ValueError) as error:
                problem = f"broken region ({_line(error)})"
        seen = region is None or (bool(region.any()) and (self.sees is None or self.sees(region)))
        self.bad_samples.add(row["key"], problem, seen)
        if problem is not None or not seen:
            return None
        rng = np.random.default_rng((self.seed, epoch, zlib.crc32(row["key"].encode())))
        caption, seed = captions[rng.integers(len(captions))], int(rng.integers(1 << 31))
        sample = {"key": row["key"], "image": image, "captions": captions, "caption": caption, "seed": seed}
        return sample | {"region": region}

    @staticmethod
    def _readable(captions: list[str], read: Callable[[list[str]], Sequence[Any]]) -> tuple[list[str], str | None]:
        """The captions that can be read, and what is wrong when there is none."""
        readable, problem = [], None
        for caption, found in zip(captions, read(captions), strict=True):
            if isinstance(found, ValueError):
                problem = f"unreadable caption ({_line(found)})"
            else:
                readable.append(caption)
        return readable, None if readable else problem


class PairTable:
    """Decoded samples of a map-style data set, of its length: a bad row is replaced by another one.

    Args:
        dataset: from `open_pairs`.
        decoder: decodes its rows.
    """

    def __init__(self, dataset: Dataset, decoder: PairDecoder):
        self.dataset, self.decoder = dataset, decoder
        decoder.bad_samples.minimum = min(decoder.bad_samples.minimum, len(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """The sample of a row in an epoch, or, for a bad row, always that of the same other row.

        Raises:
            TooManyBadSamples: if too many samples, or all rows tried in place of a bad one, are bad.
        """
        rng = np.random.default_rng((self.decoder.seed, index))
        row = index
        for _ in range(REPLACEMENTS):
            sample = self.decoder(self.dataset[row], epoch)
            if sample is not None:
                return sample
            row = int(rng.integers(len(self.dataset)))
        raise TooManyBadSamples(
            f"{REPLACEMENTS} rows in place of row {index} cannot be used either: {self.decoder.bad_samples}; mend the data"
        )


class PairStream(torch.utils.data.IterableDataset):
    """Decoded samples of a stream without end: one epoch after the other, each shuffled anew, bad rows left out.

    Every node has as many batches as the others. Workers with fewer shards than others begin their next epoch earlier;
    shards change hands with every epoch. A sample has, beside what `PairDecoder` gives, its `place`: worker, epoch,
    and rows that this worker has read of it. A stream that is given, for each worker, epoch and rows of the last
    sample that was used goes on with exactly the samples that would have followed. Rows before it are read but not decoded.

    Args:
        dataset: from `open_pairs`, already split by node where there are several.
        decoder: decodes its rows.
        places: epoch and rows read at which each worker begins; none for the start.
    """

    def __init__(self, dataset: IterableDataset, decoder: PairDecoder, places: Sequence[tuple[int, int]] = ()):
        self.dataset, self.decoder, self.places = dataset, decoder, places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        first, skipped = self.places[worker] if self.places else (0, 0)
        barren = 0
        for epoch in count(first):
            read, good = 0, skipped > 0
            for read, row in enumerate(_in_epoch(self.dataset, epoch), 1):
                sample = None if read <= skipped else self.decoder(row, epoch)
                if sample is not None:
                    good = True
                    yield sample | {"place": (worker, epoch, read)}
            if not read:
                return  # more workers than shards
            skipped, barren = 0, 0 if good else barren + 1
            if barren == BARREN_PASSES:
                raise TooManyBadSamples(f"{barren} passes gave not one good sample: {self.decoder.bad_samples}")


def _in_epoch(dataset: IterableDataset, epoch: int) -> IterableDataset:
    """A copy at `epoch`: the epoch of a data set lies in memory that all workers share, and they need not be level."""
    connections = HfFileSystem._cache  # of this process, which a data set holds on to; a copy of one would join them
    dataset = deepcopy(dataset, {id(connections): connections})
    dataset.set_epoch(epoch)
    return dataset


def _decode(image: dict[str, Any]) -> Image.Image:
    content = image.get("bytes")
    if content is None:
        if not image.get("path"):
            raise ValueError("there is no image")
        with xopen(image["path"], "rb") as file:
            content = file.read()
    with Image.open(BytesIO(content)) as picture:
        return load_images(picture)[0]
