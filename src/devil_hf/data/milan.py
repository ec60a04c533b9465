"""MILANNOTATIONS: units of seven networks with their exemplars and what three people wrote about each (Hernandez et al., 2022).

Two layouts are handed out, and both are read here, under `ROOT/NETWORK/DATASET/`:

    annotations.csv          columns layer, unit, summary; one line per annotator
    LAYER/images_UNIT.npy    (k, 3, H, W) uint8, LAYER/masks_UNIT.npy (k, 1, H, W)                     "per_unit"
    LAYER/images.npy         (units, k, 3, H, W), LAYER/masks.npy, and units.npy, where not all        "per_layer"

Splits within a network are in `ROOT/NETWORK_DATASET-splits.pth` (or `.json`): lists of units under "train" and "test". Nothing
here is unpickled with code: arrays without pickled objects, splits as plain lists, text and numbers alone.
"""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from devil_hf.data.arrays import read_array
from devil_hf.data.exemplar_set import Unit
from devil_hf.text_files import read_csv, read_json

logger = logging.get_logger(f"transformers.{__name__}")

ANNOTATIONS = "annotations.csv"
COLUMNS = ("layer", "unit", "summary")
CLASSIFIERS = tuple((network, dataset) for network in ("alexnet", "resnet152") for dataset in ("imagenet", "places365"))
GENERATORS = tuple(("biggan", dataset) for dataset in ("imagenet", "places365"))
BASE = CLASSIFIERS + GENERATORS
VIT = ("dino_vits8", "imagenet")
WITHIN_SHARE = 0.9  # of the units of one network that are for training


@dataclass(frozen=True)
class MilanSplit:
    """Which networks to train and to test on; the same one on both sides is divided by its split file."""

    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]

    @property
    def within(self) -> bool:
        """Whether units of one network are divided."""
        return self.train == self.test


def _splits() -> dict[str, MilanSplit]:
    splits = {
        f"within-{network}-{dataset}": MilanSplit(((network, dataset),), ((network, dataset),)) for network, dataset in BASE
    }
    for left_out in BASE:
        rest = tuple(pair for pair in BASE if pair != left_out)
        splits[f"without-{left_out[0]}-{left_out[1]}"] = MilanSplit(rest, (left_out,))

    def of(place: int, name: str) -> tuple[tuple[str, str], ...]:
        return tuple(pair for pair in BASE if pair[place] == name)

    across = {
        "alexnet-to-resnet152": (of(0, "alexnet"), of(0, "resnet152")),
        "resnet152-to-alexnet": (of(0, "resnet152"), of(0, "alexnet")),
        "cnns-to-vit": (BASE, (VIT,)),
        "imagenet-to-places365": (of(1, "imagenet"), of(1, "places365")),
        "places365-to-imagenet": (of(1, "places365"), of(1, "imagenet")),
        "classifiers-to-generators": (CLASSIFIERS, GENERATORS),
        "generators-to-classifiers": (GENERATORS, CLASSIFIERS),
    }
    return splits | {name: MilanSplit(train, test) for name, (train, test) in across.items()}


SPLITS = _splits()


def read_annotations(path: str | PathLike) -> dict[tuple[str, int], tuple[str, ...]]:
    """Summaries by (layer, unit), in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is absent, or a unit is no number.
    """
    summaries: dict[tuple[str, int], list[str]] = {}
    for where, row in _rows(path):
        summaries.setdefault((row["layer"], _unit(row["unit"], where)), []).append(row["summary"].strip())
    return {key: tuple(texts) for key, texts in summaries.items()}


def _rows(path: str | PathLike) -> Iterator[tuple[str, dict[str, str]]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no annotations at {path}")
    for where, row in read_csv(path):
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"{path} has no column {missing}; it has {list(row)}")
        yield where, row


def _unit(text: str, where: str) -> int:
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise ValueError(f"{where} names the unit {text!r:.80}, which is no number")
    return int(text)


class MilanUnits:
    """Annotated units of one network with their exemplars: a sequence of `Unit`, whose arrays are read when asked for.

    Args:
        folder: `ROOT/NETWORK/DATASET`.
        keys: (layer, unit) to keep; None for all that are annotated.

    Raises:
        FileNotFoundError: if the annotations, or the arrays of a unit that is asked for, are absent.
        ValueError: if arrays have other shapes than the layout says.
    """

    def __init__(self, folder: str | PathLike, keys: Sequence[tuple[str, int]] | None = None):
        self.folder = Path(folder)
        self.summaries = read_annotations(self.folder / ANNOTATIONS)
        self.keys = list(self.summaries) if keys is None else list(keys)
        unknown = [key for key in self.keys if key not in self.summaries]
        if unknown:
            raise ValueError(f"{self.folder / ANNOTATIONS} has no summary of {len(unknown)} units, such as {unknown[0]}")
        self._rows: dict[str, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Unit:
        layer, unit = self.keys[index]
        images, masks = self._arrays(layer, unit)
        if images.ndim != 4 or images.shape[1] != 3 or masks.shape != (len(images), 1, *images.shape[2:]):
            raise ValueError(
                f"unit {unit} of {layer} in {self.folder} has images {images.shape} and masks {masks.shape}: expected "
                "(k, 3, H, W) and (k, 1, H, W)"
            )
        pictures = torch.from_numpy(np.array(images, dtype=np.uint8))
        return Unit(layer, unit, pictures, torch.from_numpy(np.array(masks[:, 0]) > 0), self.summaries[layer, unit])

    def _arrays(self, layer: str, unit: int) -> tuple[np.ndarray, np.ndarray]:
        folder = self.folder / layer
        if (folder / f"images_{unit}.npy").is_file():
            return _load(folder / f"images_{unit}.npy"), _load(folder / f"masks_{unit}.npy")
        if not (folder / "images.npy").is_file():
            raise FileNotFoundError(f"{folder} holds neither images_{unit}.npy nor images.npy")
        if layer not in self._rows:
            listed = folder / "units.npy"
            units = _load(listed).tolist() if listed.is_file() else range(len(_load(folder / "images.npy")))
            self._rows[layer] = {int(own): row for row, own in enumerate(units)}
        row = self._rows[layer].get(unit)
        if row is None:
            raise FileNotFoundError(f"{folder / 'units.npy'} does not list unit {unit}")
        return _load(folder / "images.npy")[row], _load(folder / "masks.npy")[row]


def _load(file: Path) -> np.ndarray:
    return read_array(file, mapped=True)


class SeveralUnits:
    """Sequences of units, one after another."""

    def __init__(self, parts: Sequence[MilanUnits]):
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Unit:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    @cached_property
    def names(self) -> list[str]:
        """NETWORK/DATASET layer unit, of every unit."""
        return [
            f"{part.folder.parent.name}/{part.folder.name} {layer} {unit}" for part in self.parts for layer, unit in part.keys
        ]

    @cached_property
    def summaries(self) -> list[tuple[str, ...]]:
        """Of every unit, without reading any array."""
        return [part.summaries[key] for part in self.parts for key in part.keys]


def open_milan(root: str | PathLike, split: str) -> tuple[SeveralUnits, SeveralUnits]:
    """Train and test units of a split of MILANNOTATIONS, one of `SPLITS`.

    Raises:
        ValueError: for an unknown split, or a split file that holds more than lists of units.
        FileNotFoundError: if annotations are absent.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {sorted(SPLITS)}")
    root, chosen = Path(root), SPLITS[split]
    if not chosen.within:
        parts = [SeveralUnits([MilanUnits(root / n / d) for n, d in side]) for side in (chosen.train, chosen.test)]
        return parts[0], parts[1]
    ((network, dataset),) = chosen.test
    folder = root / network / dataset
    keys = list(read_annotations(folder / ANNOTATIONS))
    train, test = split_units(root, network, dataset, keys)
    return SeveralUnits([MilanUnits(folder, train)]), SeveralUnits([MilanUnits(folder, test)])


def split_units(
    root: Path, network: str, dataset: str, keys: Sequence[tuple[str, int]]
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(layer, unit) for training and for testing, from the split file; else a fixed random 90 and 10 %, with a warning."""
    stem = root / f"{network}_{dataset}-splits"
    for file in (stem.with_name(stem.name + ".pth"), stem.with_name(stem.name + ".json")):
        if file.is_file():
            content = read_split(file)
            train, test = ([_key(entry, keys, file) for entry in content[part]] for part in ("train", "test"))
            return train, test
    logger.warning(f"{stem}.pth is absent: units are divided at random, so figures are not comparable with published ones")
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0)).tolist()
    cut = round(WITHIN_SHARE * len(keys))
    return [keys[at] for at in sorted(order[:cut])], [keys[at] for at in sorted(order[cut:])]


def read_split(file: str | PathLike) -> Mapping[str, list]:
    """A split file: lists of units under "train" and "test", from torch's format or JSON, without running any code.

    Raises:
        ValueError: if the file holds anything else.
    """
    file = Path(file)
    if file.suffix == ".json":
        content = read_json(file)
    else:
        try:
            content = torch.load(file, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"{file} holds more than lists, text and numbers, and is not read, since that could run code; write it anew as "
                f'{file.with_suffix(".json").name}, {{"train": [[layer, unit], ...], "test": [...]}}'
            ) from error
    if not isinstance(content, Mapping) or not {"train", "test"} <= set(content):
        raise ValueError(f'{file} holds no lists "train" and "test"')
    return {part: _plain(content[part]) for part in ("train", "test")}


def _plain(entries: Any) -> list:
    return entries.tolist() if isinstance(entries, Tensor) else list(entries)


def _key(entry: Any, keys: Sequence[tuple[str, int]], file: Path) -> tuple[str, int]:
    """(layer, unit) of an entry of a split file: a pair, "layer-unit" or "layer/unit", or the position among all units."""
    if isinstance(entry, list | tuple) and len(entry) == 2:
        return str(entry[0]), int(entry[1])
    if isinstance(entry, str) and (match := re.fullmatch(r"(.+)[-/:_](\d+)", entry)):
        return match[1], int(match[2])
    if isinstance(entry, int) and 0 <= entry < len(keys):
        return keys[entry]
    raise ValueError(f"{file} names the unit {entry!r}: expected (layer, unit), 'layer-unit' or a position below {len(keys)}")
