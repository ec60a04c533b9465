"""Exemplars as they lie in a folder: the units, their images, and the masks of where they are active.

Layout of the output folder:

    exemplars.json          network, SHA-256 of its weights, source, preprocessing, k, quantile, images; units, grid
    exemplars.parquet       a row per unit: layer, unit, threshold, peaks, keys, images, masks (see `ExemplarSet.dataset`)
    LAYER.safetensors       peaks (U, k), images (U, k), activations (U, k, H, W), threshold (U), features (U, C), counted (U)
    images/NUMBER.jpg       each exemplar once, as the network saw it (cropped), and metadata.jsonl with its key
    partial/                states of an unfinished pass, from which it goes on
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

from devil_hf.folders import written
from devil_hf.text_files import read_json, read_json_lines

SUMMARY, PARTIAL, PARQUET, IMAGES = "exemplars.json", "partial", "exemplars.parquet", "images"
ROUNDING = 1e-5  # relative, of up-sampled activations in fp32
MASKS = 256  # masks resized at once


@dataclass
class Unit:
    """One unit and its exemplars.

    Args:
        layer, unit: which one.
        images: uint8 (k, 3, H, W).
        masks: bool (k, H, W), where it exceeds its threshold; no pixel of an exemplar where it does not.
        summaries: what people wrote about it, where they did.
    """

    layer: str
    unit: int
    images: Tensor
    masks: Tensor
    summaries: tuple[str, ...] = ()


class ExemplarSet:
    """Exemplars in a folder that `find_exemplars` wrote; a sequence of `Unit`, layer by layer."""

    def __init__(self, folder: str | PathLike, summary: dict | None = None):
        self.folder = Path(folder)
        if summary is None:
            file = self.folder / SUMMARY
            if not file.is_file():
                raise FileNotFoundError(f"{self.folder} holds no {SUMMARY}: find exemplars first")
            summary = read_json(file)
        self.summary: dict[str, Any] = summary
        self.layers: list[str] = summary["layers"]

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Per layer what its safetensors file holds."""
        return {name: load_file(self.folder / layer_file(name)) for name in self.layers}

    @cached_property
    def keys(self) -> dict[int, str]:
        """Key in the source of each stored image's number."""
        return {row["number"]: row["key"] for _, row in read_json_lines(self.folder / IMAGES / "metadata.jsonl")}

    @cached_property
    def units(self) -> list[tuple[str, int]]:
        """(layer, unit) of every row."""
        return [(name, unit) for name in self.layers for unit in range(self.summary["shapes"][name]["units"])]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> Unit:
        layer, unit = self.units[index]
        numbers = [number for number in self.tensors[layer]["images"][unit].tolist() if number >= 0]
        images = torch.stack([pil_to_tensor(self.image(number)) for number in numbers])
        return Unit(layer, unit, images, self.masks(layer, torch.tensor([unit]))[0, : len(numbers)])

    def image_path(self, number: int) -> Path:
        """File of a stored image."""
        return self.folder / IMAGES / f"{number:09d}.jpg"

    def image(self, number: int) -> Image.Image:
        """A stored image."""
        with Image.open(self.image_path(number)) as image:
            return image.convert("RGB")

    def masks(self, layer: str, units: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Masks (n, k, H, W) of units of a layer: activations up-sampled bilinearly, above the unit's threshold.

        Args:
            size: (H, W); None for that of the stored images.
        """
        return self._masks(layer, units, self.tensors[layer]["activations"][units], size)

    def masks_of_image(self, layer: str, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Units (n,) of a layer that an image is an exemplar of, with their masks (n, H, W) on it, up to `MASKS` at once."""
        own = self.tensors[layer]
        unit, slot = torch.nonzero(own["images"] == number, as_tuple=True)
        for units, slots in zip(unit.split(MASKS), slot.split(MASKS), strict=True):
            yield units, self._masks(layer, units, own["activations"][units, slots][:, None])[:, 0]

    def _masks(self, layer: str, units: Tensor, activations: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Where activations (n, k, h, w) of units (n,), up-sampled, lie above their units' thresholds.

        The threshold may be an activation itself: without a margin, a tie would fall differently from batch to batch.
        """
        size = size or tuple(self.summary["crop"])
        resized = F.interpolate(activations, size, mode="bilinear", align_corners=False)
        threshold = self.tensors[layer]["threshold"][units, None, None, None]
        return resized - threshold > ROUNDING * threshold.abs()

    def write_parquet(self) -> None:
        """Write `exemplars.parquet`; `find_exemplars` does so at its end."""
        features = Features(
            {
                "layer": Value("string"),
                "unit": Value("int32"),
                "threshold": Value("float32"),
                "peaks": List(Value("float32")),
                "keys": List(Value("string")),
                "images": List(Value("string")),
                "masks": List(Value("binary")),
            }
        )
        bar = tqdm(total=len(self.units), desc="exemplars: masks", unit="unit")

        def rows() -> Iterator[dict]:
            for layer in self.layers:
                own = self.tensors[layer]
                for unit in range(len(own["peaks"])):
                    numbers = [number for number in own["images"][unit].tolist() if number >= 0]
                    masks = self.masks(layer, torch.tensor([unit]))[0]
                    bar.update()
                    yield {
                        "layer": layer,
                        "unit": unit,
                        "threshold": float(own["threshold"][unit]),
                        "peaks": own["peaks"][unit, : len(numbers)].tolist(),
                        "keys": [self.keys[number] for number in numbers],
                        "images": [f"{IMAGES}/{self.image_path(number).name}" for number in numbers],
                        "masks": [_png(mask) for mask in masks[: len(numbers)]],
                    }

        with bar:
            write_rows(rows(), features, self.folder / PARQUET)

    def dataset(self) -> Dataset:
        """The exemplars as a `datasets` data set, a row per unit.

        Columns: `layer`, `unit`, `threshold`, `peaks` (activations, descending), `keys` (of the images in their source),
        `images` and `masks` (lists of pictures, decoded when a row is read).
        """
        rows = Dataset(parquet.read_table(self.folder / PARQUET))
        folder = str(self.folder.absolute())
        pictures = List(ImageFeature())
        features = Features(rows.features | {"images": pictures, "masks": pictures})
        return rows.map(
            lambda row: {
                "images": [{"path": f"{folder}/{name}", "bytes": None} for name in row["images"]],
                "masks": [{"path": None, "bytes": mask} for mask in row["masks"]],
            },
            features=features,
            keep_in_memory=True,
        )


def layer_file(layer: str) -> str:
    """Name of the file of a layer's tensors."""
    return layer.replace("/", "_").replace(":", "_") + ".safetensors"


def write_rows(rows: Iterator[dict], features: Features, file: Path, chunk: int = 256) -> None:
    """Write rows to a parquet file, a chunk at a time; the file appears when it is whole."""
    # The schema carries the features, so that any reader of `datasets` finds them again.
    schema = features.arrow_schema
    with written(file) as unfinished, parquet.ParquetWriter(unfinished, schema) as writer:
        for batch in iter(lambda: list(islice(rows, chunk)), []):
            table = Dataset.from_list(batch, features=features).data.table
            writer.write_table(table.select(schema.names).cast(schema))


def _png(mask: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


__all__ = ["IMAGES", "PARTIAL", "SUMMARY", "ExemplarSet", "Unit", "layer_file", "write_rows"]
