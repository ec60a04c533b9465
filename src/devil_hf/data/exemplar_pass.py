"""What a pass over images keeps: per unit the images of its highest activations, and a sketch of all its activations.

Memory does not depend on the number of images. States of several processes merge, and a state on disk goes on as if unbroken.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from devil_hf.data.quantiles import QuantileSketch
from devil_hf.folders import written

# Locations of each image that the quantile sketch sees; all of them on grids up to 16 x 16.
SKETCHED_LOCATIONS = 256


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
        """Room for the `k` best images of each of `units` units with activations on `grid`, (H, W)."""
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
class PassState:
    """State of one process' share of the pass.

    Args:
        top: per layer the images of the highest activations.
        sketches: per layer the quantiles of all activations.
        position: images read of this share.
        seen: of them readable.
    """

    top: list[TopImages]
    sketches: list[QuantileSketch]
    position: int
    seen: int

    @classmethod
    def empty(cls, layers: list[Tensor], k: int, device: torch.device) -> "PassState":
        """A state that has seen nothing, for the k best images of layers with activations like these (B, U, H, W)."""
        top = [TopImages.empty(one.shape[1], k, (one.shape[2], one.shape[3]), device) for one in layers]
        return cls(top, [QuantileSketch(one.shape[1], device=device) for one in layers], 0, 0)

    def add(self, layers: list[Tensor], numbers: list[int], read: int) -> None:
        """Take in activations (B, U, H, W) per layer of the images `numbers`, for which `read` positions were read."""
        for activations, top, sketch in zip(layers, self.top, self.sketches, strict=True):
            top.add(activations, torch.tensor(numbers, device=activations.device))
            sketch.add(_sampled(activations, numbers[0]))
        self.position += read
        self.seen += len(numbers)

    def merge(self, other: "PassState") -> None:
        """Take in what another process saw."""
        for mine, theirs in zip(self.top, other.top, strict=True):
            mine.merge(theirs)
        for sketch, more in zip(self.sketches, other.sketches, strict=True):
            sketch.merge(more)
        self.seen += other.seen


def _sampled(activations: Tensor, seed: int) -> Tensor:
    """Activations (B, U, H, W) as values (U, B * n) of n locations, all of them or drawn at random."""
    flat = activations.flatten(2).transpose(0, 1)  # (U, B, H * W)
    if flat.shape[2] > SKETCHED_LOCATIONS:
        generator = torch.Generator().manual_seed(seed)
        flat = flat[:, :, torch.randperm(flat.shape[2], generator=generator)[:SKETCHED_LOCATIONS].to(flat.device)]
    return flat.flatten(1)


def save_state(share: PassState, file: Path, settings: dict) -> None:
    """Write a state and the settings of its pass to a file; a kill leaves either the old state or the new one."""
    tensors: dict[str, Tensor] = {}
    for layer, (top, sketch) in enumerate(zip(share.top, share.sketches, strict=True)):
        parts = {"peaks": top.peaks, "images": top.images, "activations": top.activations} | sketch.state()
        tensors |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    metadata = {"settings": json.dumps(settings), "position": str(share.position), "seen": str(share.seen)}
    with written(file, f"The state of before is kept in {file.parent}") as unfinished:
        save_file(tensors, unfinished, metadata)


def load_state(file: Path, settings: dict, device) -> PassState:
    """The state that `save_state` wrote; a ValueError where it belongs to other settings."""
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118, no mapping
    check_settings(settings, json.loads(metadata["settings"]), file.parent)
    top, sketches = [], []
    for layer in range(len(settings["layers"])):
        own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
        top.append(TopImages(*(own.pop(name).to(device) for name in ("peaks", "images", "activations"))))
        sketches.append(QuantileSketch.from_state(own, device=device))
    return PassState(top, sketches, int(metadata["position"]), int(metadata["seen"]))


def check_settings(asked: dict, found: dict, folder: Path) -> None:
    """Raise a ValueError when a folder holds exemplars of other settings than those asked for."""
    # The same weights may lie elsewhere by now: their hash says more than where they came from.
    different = {
        name: (found.get(name), value) for name, value in asked.items() if name != "network" and found.get(name) != value
    }
    if different:
        shown = "; ".join(f"{name} is {old!r}, asked for {new!r}" for name, (old, new) in different.items())
        what = "exemplars of other settings"
        if list(different) == ["images_sha256"]:
            what = f"exemplars of other images: those of {asked['source']} have changed since"
        raise ValueError(f"{folder} holds {what}: {shown}. Choose another folder, or remove it.")


__all__ = ["PassState", "TopImages", "check_settings", "load_state", "save_state"]
