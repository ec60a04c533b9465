"""Exemplars: the images that drive each unit of a network most, and where in them (DeViL, section 4.5; MILAN).

One pass over a source of images keeps, per unit, the k images of its highest activation with their activation maps, and a
sketch of the quantiles of all its activations; memory does not depend on the number of images. A unit is a channel of a
layer's feature map, or a linear read-out of the map (a *direction*: a probe, a class vector, a latent of a sparse
autoencoder). A second pass over the exemplars alone stores them as pictures, and the unit's own features: the layer's
feature map pooled where the unit exceeds its quantile, averaged over exemplars where it does so at all.
`exemplar_set.py` has the layout of the output folder.
"""

import json
import shutil
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from devil_hf.data.exemplar_pass import PassState, TopImages, check_settings, load_state, save_state
from devil_hf.data.exemplar_set import IMAGES, PARTIAL, SUMMARY, ExemplarSet, layer_file
from devil_hf.data.images import ImageStream, NumberedImages
from devil_hf.data.unit_reader import UnitReader, pixel_batches
from devil_hf.folders import claimed, write_json, written
from devil_hf.model.image_processing_devil import DevilImageProcessor

JPEG_QUALITY = 95
SAME = 0.02  # relative difference of activations that batches and number formats may make


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
        FolderInUse: when another run works in the folder.
    """
    if k < 1 or not 0 < quantile < 1 or batch_size < 1:
        raise ValueError(f"k={k} and batch_size={batch_size} must be at least 1, and quantile={quantile} between 0 and 1")
    output_dir, state = Path(output_dir), PartialState()
    settings = _settings(reader, processor, images, k, quantile, state)
    if not (output_dir / SUMMARY).is_file():  # finished ones are claimed by nobody: they may lie where nothing can be written
        with claimed(output_dir, "a search for exemplars", state.is_main_process):
            if not (output_dir / SUMMARY).is_file():
                return _find(reader, processor, images, output_dir, settings, batch_size, save_every, workers, state)
    found = ExemplarSet(output_dir)
    check_settings(settings, found.summary, output_dir)
    return found


def _find(reader, processor, images, output_dir: Path, settings, batch_size, save_every, workers, state) -> "ExemplarSet":
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
        share, *others = (load_state(file, settings, device) for file in written)
        for other in others:
            share.merge(other)
        _finish(reader, processor, images, output_dir, settings, share, batch_size)
    state.wait_for_everyone()
    return ExemplarSet(output_dir)


def _settings(
    reader: UnitReader, processor: DevilImageProcessor, images: ImageStream, k: int, quantile: float, state: PartialState
) -> dict[str, Any]:
    """What decides the exemplars; the images are looked at by one process for all."""
    identity = [images.identity if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(identity)
    return {
        "network": str(reader.backbone.config["source"]),
        **reader.known(processor),
        "source": images.name,  # with limit, split and held-out part
        "images_sha256": identity[0],
        "layers": reader.layers,
        "k": k,
        "quantile": quantile,
        "activation": "maximum over locations",
    }


def _run_pass(reader, processor, images, file, settings, batch_size, save_every, workers, state) -> None:
    """One process' pass over its share, whose state ends in `file`; without an image to read, no file is written."""
    device = next(reader.backbone.parameters()).device
    share = load_state(file, settings, device) if file.is_file() else None
    position = 0 if share is None else share.position
    total = None
    if isinstance(images, NumberedImages):
        total = len(range(state.process_index, len(images), state.num_processes))
    saved = position
    start = state.process_index + position * state.num_processes
    batches = pixel_batches(images, processor, batch_size, start, state.num_processes, workers)
    with tqdm(total=total, initial=position, desc="exemplars", unit="image", disable=not state.is_main_process) as bar:
        for numbers, pixel_values, read in batches:
            layers = [activations for activations, _ in reader(pixel_values)]
            if share is None:
                share = PassState.empty(layers, settings["k"], device)
            share.add(layers, numbers, read)
            bar.update(read)
            if share.position - saved >= save_every:
                save_state(share, file, settings)
                saved = share.position
    if share is not None:
        save_state(share, file, settings)


@torch.no_grad()
def _finish(reader, processor, images, output_dir: Path, settings: dict, share: PassState, batch_size: int) -> None:
    """Second pass, over the exemplars: pictures, keys, and the units' own features."""
    (output_dir / IMAGES).mkdir(exist_ok=True)
    thresholds = [sketch.quantile(settings["quantile"]) for sketch in share.sketches]
    sums: list[Any] = [None] * len(share.top)  # a tensor once the width of the layer is seen
    numbers = sorted({int(n) for top in share.top for n in top.images.unique() if n >= 0})
    rows = images.fetch(numbers)
    allowed = [SAME * float(top.peaks[top.images >= 0].abs().max()) for top in share.top]
    with (
        (output_dir / IMAGES / "metadata.jsonl").open("w", encoding="utf-8") as metadata,
        tqdm(total=len(numbers), desc="exemplars: pictures", unit="image") as bar,
    ):
        for batch in iter(lambda: list(islice(rows, batch_size)), []):
            pixel_values = processor(images=[image for _, _, image in batch], return_tensors="pt")["pixel_values"]
            for (number, key, _), pixels in zip(batch, to_uint8(pixel_values, processor), strict=True):
                name = f"{number:09d}.jpg"
                picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                picture.save(output_dir / IMAGES / name, quality=JPEG_QUALITY, subsampling=0)
                metadata.write(json.dumps({"file_name": name, "number": number, "key": key}) + "\n")
            for layer, (activations, feature_map) in enumerate(reader(pixel_values)):
                _check_same(share.top[layer], batch, activations, allowed[layer], output_dir)
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
        with written(output_dir / layer_file(name), f"The pass itself is kept in {output_dir / PARTIAL}") as unfinished:
            save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, unfinished)
        channels = 0 if not reader.channels else pooled.shape[1]
        summary["shapes"][name] = {"units": len(top.peaks), "channels": channels, "grid": list(top.activations.shape[2:])}
    found = ExemplarSet(output_dir, summary)
    found.write_parquet()
    write_json(output_dir / SUMMARY, summary)
    shutil.rmtree(output_dir / PARTIAL)


def _check_same(top: TopImages, batch: list, activations: Tensor, allowed: float, folder: Path) -> None:
    """Raise a ValueError when an image (number, key, image) drives its units (B, U, H, W) otherwise than in the first pass.

    Args:
        allowed: difference in units that are hardly driven.
    """
    for (number, key, _), seen in zip(batch, activations.amax(dim=(2, 3)), strict=True):
        unit, slot = torch.nonzero(top.images == number, as_tuple=True)
        before = top.peaks[unit, slot]
        if not torch.isclose(seen[unit], before, rtol=SAME, atol=allowed).all():
            raise ValueError(
                f"image {key} is another one than when the pass read it: the images changed meanwhile. Remove {folder}, and run "
                "again on images that stay as they are."
            )


def _add_own_features(sums: Tensor, top: TopImages, threshold: Tensor, number: int, feature_map: Tensor) -> None:
    """Pool one image's feature map (C, H, W) with the masks of the units that it is an exemplar of."""
    unit, slot = torch.nonzero(top.images == number, as_tuple=True)
    masks = (top.activations[unit, slot] > threshold[unit, None, None]).float().flatten(1)  # (n, H * W)
    weights = masks / masks.sum(dim=1, keepdim=True).clamp(min=1)
    sums.index_add_(0, unit, weights @ feature_map.flatten(1).T)


def to_uint8(pixel_values: Tensor, processor: DevilImageProcessor) -> Tensor:
    """Normalised pixel values (B, 3, H, W) as the uint8 pictures that they were made of."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return ((pixel_values.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


__all__ = ["find_exemplars", "to_uint8"]
