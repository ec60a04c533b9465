"""Exemplars: the images that drive each unit of a network most, and where in them (DeViL, section 4.5; MILAN).

One pass over a source of images keeps, per unit, the k images of its highest activation with their activation maps, and a
sketch of the quantiles of all its activations; memory does not depend on the number of images. A unit is a channel of a
layer's feature map, or a linear read-out of the map (a *direction*: a probe, a class vector, a latent of a sparse
autoencoder). A second pass over the exemplars alone stores them as pictures, and the unit's own features: the layer's
feature map pooled where the unit exceeds its quantile, averaged over exemplars where it does so at all.

Layout of the output folder:

    exemplars.json          network, SHA-256 of its weights, source, preprocessing, k, quantile, images; units, grid
    exemplars.parquet       a row per unit: layer, unit, threshold, peaks, keys, images, masks (see `ExemplarSet.dataset`)
    LAYER.safetensors       peaks (U, k), images (U, k), activations (U, k, H, W), threshold (U), features (U, C), counted (U)
    images/NUMBER.jpg       each exemplar once, as the network saw it (cropped), and metadata.jsonl with its key
    partial/                states of an unfinished pass, from which it goes on
"""

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from devil_hf.build import backbone_from_source, image_processor_of
from devil_hf.data.images import ImageStream, NumberedImages
from devil_hf.data.quantiles import QuantileSketch
from devil_hf.model.backbone_devil import FeatureBackbone, weights_hash
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.pooling_devil import resolve_layers

logger = logging.get_logger(f"transformers.{__name__}")

# Locations of each image that the quantile sketch sees; all of them on grids up to 16 x 16.
SKETCHED_LOCATIONS = 256
SUMMARY, PARTIAL, PARQUET, IMAGES = "exemplars.json", "partial", "exemplars.parquet", "images"
JPEG_QUALITY = 95
ROUNDING = 1e-5  # relative, of up-sampled activations in fp32


# ------------------------------------------------------------------------------------------------------------- reading


class UnitReader:
    """Activations of a network's units, layer by layer.

    Args:
        backbone: the network and its layers.
        directions: linear read-outs (M, C_l) by layer name. They follow the layer's channels as further units.
        biases: (M,) by layer name, added to the read-outs; zero where left out.
        channels: whether channels are units too; without them only layers with directions are read.
        layers: which of the backbone's layers, by name or index; None for all.
    """

    def __init__(
        self,
        backbone: FeatureBackbone,
        directions: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
        channels: bool = True,
        layers: str | int | Sequence[str | int] | None = None,
    ):
        directions, biases = dict(directions or {}), dict(biases or {})
        for name, vectors in directions.items():
            if name not in backbone.layers:
                raise ValueError(f"directions of layer {name!r}: this network reads the layers {backbone.layers}")
            width = backbone.channels[backbone.layers.index(name)]
            if vectors.ndim != 2 or vectors.shape[1] != width:
                raise ValueError(
                    f"directions of shape {tuple(vectors.shape)}: layer {name!r} needs (directions, {width})"
                )
        if not channels and not directions:
            raise ValueError("without channels there are no units but directions: give some")
        self.backbone, self.directions, self.biases, self.channels = backbone, directions, biases, channels
        chosen = [backbone.layers[at] for at in resolve_layers(layers, backbone.layers)]
        self.layers = [name for name in chosen if channels or name in directions]

    @property
    def fingerprint(self) -> str:
        """A hash of the network's weights and of the directions."""
        extra = {f"{name}.direction": tensor for name, tensor in self.directions.items()}
        extra |= {f"{name}.bias": tensor for name, tensor in self.biases.items()}
        own = str(self.backbone.config["sha256"])
        return f"{own}+{weights_hash(extra)}" if extra else own

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer of `layers`: activations of its units (B, U, H, W), and the feature map (B, C, H, W)."""
        parameter = next(self.backbone.parameters())
        positions = [self.backbone.layers.index(name) for name in self.layers]
        pixel_values = pixel_values.to(parameter).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(pixel_values, positions)
        return [
            (self._units(name, maps[at].float()), maps[at].float())
            for name, at in zip(self.layers, positions, strict=True)
        ]

    def _units(self, name: str, feature_map: Tensor) -> Tensor:
        if name not in self.directions:
            return feature_map
        read = torch.einsum("bchw,mc->bmhw", feature_map, self.directions[name].to(feature_map))
        if name in self.biases:
            read = read + self.biases[name].to(feature_map)[:, None, None]
        return torch.cat([feature_map, read], dim=1) if self.channels else read


def open_network(
    network: str | PathLike | nn.Module, layers: Any = None, device: str | torch.device = "cpu", **kwargs
) -> tuple[FeatureBackbone, DevilImageProcessor]:
    """Any network and its own preprocessing; the arguments are those of `devil_hf.build.backbone_from_source`."""
    backbone = backbone_from_source(network, layers, **kwargs)
    return backbone.to(device), image_processor_of(backbone.config["data_config"])


def pixel_batches(
    images: ImageStream,
    processor: DevilImageProcessor,
    batch_size: int,
    start: int = 0,
    step: int = 1,
    workers: int = 0,
) -> Iterator[tuple[list[int], Tensor, int]]:
    """(numbers, pixel values, positions read) of batches of a source; images that cannot be read are left out, with a warning."""
    if isinstance(images, NumberedImages):
        chosen = _Positions(images, processor, range(start, len(images), step))
        pairs: Any = torch.utils.data.DataLoader(
            chosen,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=list,
            multiprocessing_context="fork" if workers else None,  # sources hold functions, which cannot be pickled
        )
    else:
        pairs = _batched(((n, _pixels(image, processor, n)) for n, image in images.stream(start, step)), batch_size)
    read = 0
    for rows in pairs:
        read += len(rows)
        kept = [(number, pixels) for number, pixels in rows if pixels is not None]
        if kept:
            yield [number for number, _ in kept], torch.stack([pixels for _, pixels in kept]), read
            read = 0


class _Positions(torch.utils.data.Dataset):
    """Pixel values of the images at given positions, for a data loader."""

    def __init__(self, images: NumberedImages, processor: DevilImageProcessor, positions: range):
        self.images, self.processor, self.positions = images, processor, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        number = self.images.numbers[self.positions[index]]
        try:
            image = self.images.load(number)
        except (OSError, SyntaxError) as error:
            logger.warning(f"image {number} of {self.images.name} is left out: {error}")
            return number, None
        return number, _pixels(image, self.processor, number)


def _pixels(image: Any, processor: DevilImageProcessor, number: int) -> Tensor | None:
    try:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]
    except (OSError, ValueError) as error:
        logger.warning(f"image {number} is left out: {error}")
        return None


def _batched(rows: Iterator, size: int) -> Iterator[list]:
    batch: list = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------------------ the pass


class TopImages:
    """The k images with the highest peak of each unit, and the unit's activation maps there.

    Args:
        peaks: (U, k), descending; -inf where there are fewer than k images.
        images: (U, k) numbers of the images, -1 where there is none.
        activations: (U, k, H, W).
    """

    def __init__(self, peaks: Tensor, images: Tensor, activations: Tensor):
        self.peaks, self.images, self.activations = peaks, images, activations

    @classmethod
    def empty(cls, units: int, k: int, grid: tuple[int, int], device=None) -> "TopImages":
        peaks = torch.full((units, k), -torch.inf, device=device)
        return cls(peaks, torch.full_like(peaks, -1, dtype=torch.long), torch.zeros(units, k, *grid, device=device))

    def add(self, activations: Tensor, numbers: Tensor) -> None:
        """Take in activations (B, U, H, W) of the images `numbers` (B,), ascending."""
        peaks = activations.amax(dim=(2, 3)).T  # (U, B)
        self._keep(peaks, numbers.expand(len(peaks), -1), activations.transpose(0, 1))

    def merge(self, other: "TopImages") -> None:
        """Take in what another process kept."""
        self._keep(other.peaks, other.images, other.activations)

    def _keep(self, peaks: Tensor, images: Tensor, activations: Tensor) -> None:
        k = self.peaks.shape[1]
        all_images = torch.cat([self.images, images], dim=1)
        all_peaks = torch.cat([self.peaks, peaks], dim=1)
        # Of equal peaks the first image stays, whatever the order of arrival: by number first, then stably by peak.
        by_number = all_images.argsort(dim=1, stable=True)
        order = by_number.gather(1, all_peaks.gather(1, by_number).argsort(dim=1, descending=True, stable=True)[:, :k])
        self.peaks, self.images = all_peaks.gather(1, order), all_images.gather(1, order)
        old = order.clamp(max=k - 1)[:, :, None, None].expand(-1, -1, *self.activations.shape[2:])
        kept = self.activations.gather(1, old)
        unit, slot = torch.nonzero(order >= k, as_tuple=True)  # few, once the pass is under way
        kept[unit, slot] = activations[unit, order[unit, slot] - k].to(kept)
        self.activations = kept


@dataclass
class _Pass:
    """State of one process' share of the pass."""

    top: list[TopImages]
    sketches: list[QuantileSketch]
    position: int  # images read of this share
    seen: int  # of them readable


def find_exemplars(
    reader: UnitReader,
    processor: DevilImageProcessor,
    images: ImageStream,
    output_dir: str | PathLike,
    k: int = 15,
    quantile: float = 0.99,
    batch_size: int = 32,
    save_every: int = 2_000,
    workers: int = 0,
) -> "ExemplarSet":
    """Find the exemplars of all units in one pass over `images`.

    Under `accelerate launch` each process passes over its share, and the first one merges them. A pass that was stopped goes
    on where it last saved its state; a finished one is opened and not repeated.

    Args:
        output_dir: see the layout above.
        k: exemplars per unit.
        quantile: of a unit's activations over all locations of all images; the mask is where the unit exceeds it.
        save_every: images between two saves of the state.
        workers: processes that read images ahead.

    Raises:
        ValueError: if the folder holds exemplars of other settings, or no image could be read.
    """
    if k < 1 or not 0 < quantile < 1 or batch_size < 1:
        raise ValueError(
            f"k={k} and batch_size={batch_size} must be at least 1, and quantile={quantile} between 0 and 1"
        )
    output_dir = Path(output_dir)
    settings = {
        "network": str(reader.backbone.config["source"]),
        "weights_sha256": reader.fingerprint,
        "source": images.name,  # with limit, split and held-out part
        "layers": reader.layers,
        "k": k,
        "quantile": quantile,
        "activation": "maximum over locations",
        "preprocessing": {
            "crop": [int(processor.crop_size["height"]), int(processor.crop_size["width"])],
            "crop_pct": processor.crop_pct,
            "crop_mode": processor.crop_mode,
        },
    }
    if (output_dir / SUMMARY).is_file():
        found = ExemplarSet(output_dir)
        _check_settings(settings, found.summary, output_dir)
        return found
    state = PartialState()
    (output_dir / PARTIAL).mkdir(parents=True, exist_ok=True)
    settings["processes"] = state.num_processes
    files = [output_dir / PARTIAL / f"process_{process}.safetensors" for process in range(state.num_processes)]
    _run_pass(reader, processor, images, files[state.process_index], settings, batch_size, save_every, workers, state)
    state.wait_for_everyone()
    written = [file for file in files if file.is_file()]  # by processes that had an image to read
    state.wait_for_everyone()  # all have looked, before the first one takes the states away
    if not written:  # raised by all processes: none is left waiting
        raise ValueError(f"no image of {images.name} could be read")
    if state.is_main_process:
        device = next(reader.backbone.parameters()).device
        share, *others = (_load_state(file, settings, device) for file in written)
        for other in others:
            _merge(share, other)
        _finish(reader, processor, images, output_dir, settings, share, batch_size)
    state.wait_for_everyone()
    return ExemplarSet(output_dir)


def _check_settings(asked: dict, found: dict, folder: Path) -> None:
    # The same weights may lie elsewhere by now: their hash says more than where they came from.
    different = {
        name: (found.get(name), value)
        for name, value in asked.items()
        if name != "network" and found.get(name) != value
    }
    if different:
        shown = "; ".join(f"{name} is {old!r}, asked for {new!r}" for name, (old, new) in different.items())
        raise ValueError(f"{folder} holds exemplars of other settings: {shown}. Choose another folder, or remove it.")


def _run_pass(reader, processor, images, file, settings, batch_size, save_every, workers, state) -> None:
    """One process' pass over its share, whose state ends in `file`; without an image to read, no file is written."""
    device = next(reader.backbone.parameters()).device
    share = _load_state(file, settings, device) if file.is_file() else None
    position = 0 if share is None else share.position
    total = None
    if isinstance(images, NumberedImages):
        total = len(range(state.process_index, len(images), state.num_processes))
    saved = position
    start = state.process_index + position * state.num_processes
    batches = pixel_batches(images, processor, batch_size, start, state.num_processes, workers)
    with tqdm(total=total, initial=position, desc="exemplars", unit="image", disable=not state.is_main_process) as bar:
        for numbers, pixel_values, read in batches:
            layers = reader(pixel_values)
            if share is None:
                share = _Pass(
                    [TopImages.empty(a.shape[1], settings["k"], a.shape[2:], device) for a, _ in layers],
                    [QuantileSketch(a.shape[1], device=device) for a, _ in layers],
                    0,
                    0,
                )
            for (activations, _), top, sketch in zip(layers, share.top, share.sketches, strict=True):
                top.add(activations, torch.tensor(numbers, device=device))
                sketch.add(_sampled(activations, numbers[0]))
            share.position += read
            share.seen += len(numbers)
            bar.update(read)
            if share.position - saved >= save_every:
                _save_state(share, file, settings)
                saved = share.position
    if share is not None:
        _save_state(share, file, settings)


def _sampled(activations: Tensor, seed: int) -> Tensor:
    """Activations (B, U, H, W) as values (U, B * n) of n locations, all of them or drawn at random."""
    flat = activations.flatten(2).transpose(0, 1)  # (U, B, H * W)
    if flat.shape[2] > SKETCHED_LOCATIONS:
        generator = torch.Generator().manual_seed(seed)
        flat = flat[:, :, torch.randperm(flat.shape[2], generator=generator)[:SKETCHED_LOCATIONS].to(flat.device)]
    return flat.flatten(1)


def _save_state(share: _Pass, file: Path, settings: dict) -> None:
    tensors: dict[str, Tensor] = {}
    for layer, (top, sketch) in enumerate(zip(share.top, share.sketches, strict=True)):
        parts = {"peaks": top.peaks, "images": top.images, "activations": top.activations} | sketch.state()
        tensors |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    metadata = {"settings": json.dumps(settings), "position": str(share.position), "seen": str(share.seen)}
    waiting = file.with_suffix(".writing")
    save_file(tensors, waiting, metadata)
    os.replace(waiting, file)  # a kill leaves either the old state or the new one


def _load_state(file: Path, settings: dict, device) -> _Pass:
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118, no mapping
    _check_settings(settings, json.loads(metadata["settings"]), file.parent)
    top, sketches = [], []
    for layer in range(len(settings["layers"])):
        own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
        top.append(TopImages(*(own.pop(name).to(device) for name in ("peaks", "images", "activations"))))
        sketches.append(QuantileSketch.from_state(own, device=device))
    return _Pass(top, sketches, int(metadata["position"]), int(metadata["seen"]))


def _merge(share: _Pass, other: _Pass) -> None:
    for mine, theirs in zip(share.top, other.top, strict=True):
        mine.merge(theirs)
    for sketch, more in zip(share.sketches, other.sketches, strict=True):
        sketch.merge(more)
    share.seen += other.seen


# ------------------------------------------------------------------------------------------------------------ finishing


@torch.no_grad()
def _finish(reader, processor, images, output_dir: Path, settings: dict, share: _Pass, batch_size: int) -> None:
    """Second pass, over the exemplars: pictures, keys, and the units' own features."""
    (output_dir / IMAGES).mkdir(exist_ok=True)
    thresholds = [sketch.quantile(settings["quantile"]) for sketch in share.sketches]
    sums: list[Any] = [None] * len(share.top)  # a tensor once the width of the layer is seen
    numbers = sorted({int(n) for top in share.top for n in top.images.unique() if n >= 0})
    rows = _batched(images.fetch(numbers), batch_size)
    with (
        (output_dir / IMAGES / "metadata.jsonl").open("w", encoding="utf-8") as metadata,
        tqdm(total=len(numbers), desc="exemplars: pictures", unit="image") as bar,
    ):
        for batch in rows:
            pixel_values = processor(images=[image for _, _, image in batch], return_tensors="pt")["pixel_values"]
            for (number, key, _), pixels in zip(batch, to_uint8(pixel_values, processor), strict=True):
                name = f"{number:09d}.jpg"
                picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                picture.save(output_dir / IMAGES / name, quality=JPEG_QUALITY, subsampling=0)
                metadata.write(json.dumps({"file_name": name, "number": number, "key": key}) + "\n")
            for layer, (_, feature_map) in enumerate(reader(pixel_values)):
                pooled = sums[layer]
                if pooled is None:
                    pooled = torch.zeros(len(thresholds[layer]), feature_map.shape[1], device=feature_map.device)
                    sums[layer] = pooled
                for (number, _, _), one in zip(batch, feature_map, strict=True):
                    _add_own_features(pooled, share.top[layer], thresholds[layer], number, one)
            bar.update(len(batch))
    summary = settings | {"images": share.seen, "crop": list(pixel_values.shape[-2:]), "shapes": {}}
    for name, top, threshold, pooled in zip(reader.layers, share.top, thresholds, sums, strict=True):
        counted = (top.peaks > threshold[:, None]).sum(dim=1)
        tensors = {
            "peaks": top.peaks,
            "images": top.images,
            "activations": top.activations,
            "threshold": threshold,
            "features": pooled / counted.clamp(min=1)[:, None],
            "counted": counted,
        }
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, output_dir / layer_file(name))
        channels = 0 if not reader.channels else pooled.shape[1]
        summary["shapes"][name] = {
            "units": len(top.peaks),
            "channels": channels,
            "grid": list(top.activations.shape[2:]),
        }
    found = ExemplarSet(output_dir, summary)
    found.write_parquet()
    (output_dir / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(output_dir / PARTIAL)


def _add_own_features(sums: Tensor, top: TopImages, threshold: Tensor, number: int, feature_map: Tensor) -> None:
    """Pool one image's feature map (C, H, W) with the masks of the units that it is an exemplar of."""
    unit, slot = torch.nonzero(top.images == number, as_tuple=True)
    masks = (top.activations[unit, slot] > threshold[unit, None, None]).float().flatten(1)  # (n, H * W)
    weights = masks / masks.sum(dim=1, keepdim=True).clamp(min=1)
    sums.index_add_(0, unit, weights @ feature_map.flatten(1).T)


def exceeds(activations: Tensor, threshold: Tensor) -> Tensor:
    """Whether up-sampled activations lie above a unit's threshold, by more than the rounding of the up-sampling.

    The threshold may be an activation itself: without a margin, a tie would fall differently from batch to batch.
    """
    return activations - threshold > ROUNDING * threshold.abs()


def to_uint8(pixel_values: Tensor, processor: DevilImageProcessor) -> Tensor:
    """Normalised pixel values (B, 3, H, W) as the uint8 pictures that they were made of."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return ((pixel_values.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def layer_file(layer: str) -> str:
    """Name of the file of a layer's tensors."""
    return layer.replace("/", "_").replace(":", "_") + ".safetensors"


# ------------------------------------------------------------------------------------------------------------ reading back


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
            summary = json.loads(file.read_text())
        self.summary: dict[str, Any] = summary
        self.layers: list[str] = summary["layers"]

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Per layer what its safetensors file holds."""
        return {name: load_file(self.folder / layer_file(name)) for name in self.layers}

    @cached_property
    def keys(self) -> dict[int, str]:
        """Key in the source of each stored image's number."""
        with (self.folder / IMAGES / "metadata.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return {row["number"]: row["key"] for row in rows}

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
        own = self.tensors[layer]
        resized = F.interpolate(
            own["activations"][units], size or tuple(self.summary["crop"]), mode="bilinear", align_corners=False
        )
        return exceeds(resized, own["threshold"][units, None, None, None])

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


def write_rows(rows: Iterator[dict], features: Features, file: Path, chunk: int = 256) -> None:
    """Write rows to a parquet file, a chunk at a time; the file appears when it is whole."""
    waiting = file.with_suffix(".writing")
    # The schema carries the features, so that any reader of `datasets` finds them again.
    schema = features.arrow_schema
    with parquet.ParquetWriter(waiting, schema) as writer:
        for batch in _batched(rows, chunk):
            table = Dataset.from_list(batch, features=features).data.table
            writer.write_table(table.select(schema.names).cast(schema))
    os.replace(waiting, file)


def _png(mask: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
