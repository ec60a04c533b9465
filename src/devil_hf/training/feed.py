"""What a training step reads: batches without end, each a function of the data, the seed and its own number.

A run can therefore be stopped anywhere and go on exactly, however its loader works ahead. A table (anything with a length and
`sample(index, epoch)`) is read in a new order in every epoch, over epoch borders, so that nothing is dropped and every process
has the same number of batches. A stream is split over processes and workers by `datasets`; each worker reports its place.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from devil_hf.data.decoding import PairDecoder, PairStream, PairTable
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.training.tokens import CaptionTokens

Place = tuple[int, int]  # epoch, and rows read in it


class Table(Protocol):
    """Training data of known length."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """A caption (`caption`) and an `image` or `pooled_features`, by index and epoch alone."""
        ...


def seed_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def random_view(image: Image.Image, smallest_crop: float, seed: int) -> Image.Image:
    """A random crop of at least `smallest_crop` of the image's area, mirrored half of the time; a function of size and seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = image.convert("RGB")
        top, left, height, width = v2.RandomResizedCrop.get_params(image, [smallest_crop, 1.0], [0.75, 4 / 3])
        crop = image.crop((left, top, left + width, top + height))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else crop


def view_of(
    sample: dict[str, Any], smallest_crop: float, seed: int, sees: Callable[[np.ndarray], bool]
) -> tuple[Image.Image, np.ndarray | None]:
    """A random view of a sample's image, and of its region, if it has one; the whole image where the view would lose that.

    Args:
        sees: whether enough of a mask is in what the model gets to see.
    """
    image, region = sample["image"], sample["region"]
    view = random_view(image, smallest_crop, seed)
    if region is None:
        return view, None
    seen = np.asarray(random_view(Image.fromarray(region), smallest_crop, seed))[..., 0] > 127
    return (view, seen) if sees(seen) else (image, region)


class ImageTable:
    """Captioned images of a map-style source as training data.

    Args:
        pairs: decoded pairs.
        smallest_crop: share of the image that a random crop keeps at least; 1 shows it whole and never mirrored (paper).
    """

    def __init__(self, pairs: PairTable, smallest_crop: float = 1.0):
        self.pairs, self.smallest_crop = pairs, smallest_crop

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """Image and caption, both drawn by (seed, epoch, key)."""
        return _item(self.pairs.sample(index, epoch), self.smallest_crop, self.pairs.decoder)


class CaptionStream(torch.utils.data.IterableDataset):
    """Captioned images of a stream as training data, without end; bad rows are left out.

    Args:
        dataset: rows of `open_pairs`.
        decoder: decodes them and counts the bad ones.
        smallest_crop: see `ImageTable`.
        places: where each worker begins (default: at the start).
    """

    def __init__(self, dataset: IterableDataset, decoder: PairDecoder, smallest_crop: float = 1.0, places: Sequence[Place] = ()):
        self.dataset, self.decoder, self.smallest_crop, self.places = dataset, decoder, smallest_crop, places

    def part(self, process: int, processes: int, places: Sequence[Place] = ()) -> "CaptionStream":
        """The share of one process, from `places` on."""
        dataset = split_dataset_by_node(self.dataset, process, processes) if processes > 1 else self.dataset
        return CaptionStream(dataset, self.decoder, self.smallest_crop, places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in PairStream(self.dataset, self.decoder, self.places):
            yield _item(sample, self.smallest_crop, self.decoder) | {"place": sample["place"]}


def _item(sample: dict[str, Any], smallest_crop: float, decoder: PairDecoder) -> dict[str, Any]:
    image, region = sample["image"], sample["region"]
    if smallest_crop < 1:
        image, region = view_of(sample, smallest_crop, sample["seed"], decoder.sees or np.any)
    return {"image": image, "region": region, "caption": sample["caption"]}


class CaptionCollator:
    """Makes batches of images (or of their pooled features) and caption tokens.

    Args:
        processor: tokenises the captions and, for items with an "image", preprocesses the images.
        max_caption_tokens: captions are cut to this length (paper: 100).
        tokens: of captions that were read before, such as when they were checked.
    """

    def __init__(self, processor: DevilProcessor, max_caption_tokens: int = 100, tokens: CaptionTokens | None = None):
        self.processor = processor
        self.max_caption_tokens = max_caption_tokens
        self.tokens = tokens or CaptionTokens(processor)

    def __call__(self, items: list[dict]) -> dict:
        batch: dict[str, Any] = dict(self.tokens.batch([item["caption"] for item in items], self.max_caption_tokens))
        if "pooled_features" in items[0]:
            layers = zip(*(item["pooled_features"] for item in items), strict=True)
            batch["pooled_features"] = [torch.stack(layer).float() for layer in layers]
        else:
            images = [item["image"] for item in items]
            pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixel_values.to(memory_format=torch.channels_last)  # convolutions run faster on it
            if (regions := batch_regions(self.processor, [item["region"] for item in items])) is not None:
                batch["regions"] = regions
        if "place" in items[-1]:
            batch["place"] = items[-1]["place"]
        return batch


def batch_regions(processor: DevilProcessor, masks: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    """Regions (B, H, W) of a batch over its pixel values, ones where a mask is None; None where all are."""
    drawn = [None if mask is None else processor.masks_to_regions([mask])[0, 0] for mask in masks]
    size = next((region.shape for region in drawn if region is not None), None)
    if size is None:
        return None
    return torch.stack([torch.ones(size) if region is None else region for region in drawn])


def sees_with(processor: DevilProcessor) -> Callable[[np.ndarray], bool]:
    """A function that tells whether a mask (height, width) fills at least half of one pixel of what `processor` lets through."""
    return partial(_sees, processor)  # workers can be given it, unlike a closure


def _sees(processor: DevilProcessor, mask: np.ndarray) -> bool:
    return bool((processor.masks_to_regions([mask]) >= 0.5).any())


class _Places:
    """(index, epoch) of every sample of one process, batch by batch, without end."""

    def __init__(self, size: int, batch_size: int, seed: int, process: int, processes: int, first_batch: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.process, self.processes, self.first_batch = process, processes, first_batch

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for batch in itertools.count(self.first_batch):
            begin = (batch * self.processes + self.process) * self.batch_size
            places = []
            for position in range(begin, begin + self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
                places.append((int(order[position % self.size]), epoch))
            yield places


class _TableDataset(Dataset):
    def __init__(self, table: Table):
        self.table = table

    def __getitem__(self, place: Place) -> dict[str, Any]:
        return self.table.sample(*place)


def table_loader(
    table: Table,
    collate: Callable[[list[dict]], dict],
    batch_size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
    first_batch: int = 0,
    **options,
) -> DataLoader:
    """Batches of a table; together the processes read each epoch's permutation once. `options` are those of `DataLoader`."""
    if len(table) == 0:
        raise ValueError(
            "the training data are empty: not one row has a caption, a readable image and, if it names a region, one that the "
            "model sees any of."
        )
    places: Any = _Places(len(table), batch_size, seed, process, processes, first_batch)
    return DataLoader(_TableDataset(table), batch_sampler=places, collate_fn=collate, **options)


class StreamPosition:
    """How far one process has read a stream: for each worker, where its last batch but one and its last one ended."""

    def __init__(self, workers: int = 1):
        self.workers = workers
        self.batches = 0
        self.before: list[Place] = [(0, 0)] * workers
        self.after: list[Place] = [(0, 0)] * workers

    def advance(self, place: tuple[int, int, int]) -> None:
        """Note a batch whose last sample a worker read at (worker, epoch, row)."""
        worker, epoch, row = place
        self.before[worker], self.after[worker] = self.after[worker], (epoch, row)
        self.batches += 1

    def state(self) -> dict[str, Any]:
        """What has to be kept to go on from here."""
        return {"workers": self.workers, "batches": self.batches, "before": self.before, "after": self.after}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "StreamPosition":
        """The position that `state` described."""
        position = cls(state["workers"])
        position.batches = state["batches"]
        position.before, position.after = ([(e, r) for e, r in state[name]] for name in ("before", "after"))
        return position


class StreamLoader:
    """Batches of a stream from `position` on.

    Workers take turns, beginning with the first. Those that are a batch ahead of the others therefore read their last one
    again, which is dropped: the next turn is then that of the worker whose it would have been.

    Args:
        stream: the training data.
        position: where to go on; `advance` it by the `place` of every batch that is used.
        options: those of `DataLoader`, but for the number of workers, which is the position's.
    """

    def __init__(
        self, stream: CaptionStream, collate, batch_size: int, position: StreamPosition, process=0, processes=1, **options
    ):
        self.ahead = position.batches % position.workers
        places = position.before[: self.ahead] + position.after[self.ahead :]
        share = stream.part(process, processes, places)
        self.loader = DataLoader(share, batch_size=batch_size, collate_fn=collate, **options)

    def __iter__(self) -> Iterator[dict]:
        return itertools.islice(iter(self.loader), self.ahead, None)


__all__ = [
    "CaptionCollator",
    "CaptionStream",
    "ImageTable",
    "StreamLoader",
    "StreamPosition",
    "Table",
    "batch_regions",
    "random_view",
    "seed_of",
    "sees_with",
    "table_loader",
    "view_of",
]
