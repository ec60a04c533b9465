"""Features that stand for a unit: its exemplars pooled where it is active (DeViL, section 4.5).

Two modes say which. `"pixels"` gives the exemplars to the translator's own backbone and pools every layer with the mask,
resized to the layer's grid: the paper's way, for units of any network. `"features"` is for units of the very network, and of a
layer, that the translator reads: what the exemplar pass pooled on the unit's own grid enters directly, that layer alone visible.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from devil_hf.data.exemplar_set import ExemplarSet, Unit
from devil_hf.model.checkpoint_devil import weights_hash
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import pool, region_weights
from devil_hf.model.processing_devil import DevilProcessor

MODES = ("pixels", "features")


@dataclass
class PooledUnits:
    """Features that stand for units.

    Args:
        units: (layer, unit) of each of N units.
        features: per layer of the translator (N, C_l), None where no unit shows that layer.
        hidden: (N, L) bool, layers where every mask vanished, or that the mode does not show.
    """

    units: list[tuple[str, int]]
    features: list[Tensor | None]
    hidden: Tensor

    @property
    def silent(self) -> Tensor:
        """(N,) bool: units that never exceed their threshold, of which nothing can be said."""
        return self.hidden.all(dim=1)


@torch.no_grad()
def own_features(model: DevilModel, exemplars: ExemplarSet) -> PooledUnits:
    """Mode "features": what `exemplars` pooled of the units' own layers, which must be layers of the translator.

    Raises:
        ValueError: if the units belong to another network, or to layers that the translator does not read.
    """
    ours = str(model.backbone.config["sha256"] or weights_hash(model.backbone.module))
    theirs = exemplars.summary["weights_sha256"].partition("+")[0]
    if ours != theirs:
        raise ValueError(
            'mode "features" is for units of the backbone that the translator reads, but the exemplars were found in weights '
            f'with SHA-256 {theirs}, and the translator reads {ours}: use the mode "pixels".'
        )
    unknown = [name for name in exemplars.layers if name not in model.layer_names]
    if unknown:
        raise ValueError(f'mode "features" needs layers among {model.layer_names}, not {unknown}: use the mode "pixels".')
    total, start = len(exemplars), 0
    features: list[Tensor | None] = [None] * len(model.layer_names)
    hidden = torch.ones(total, len(model.layer_names), dtype=torch.bool)
    for name in exemplars.layers:
        own, index = exemplars.tensors[name], model.layer_names.index(name)
        stop = start + len(own["features"])
        features[index] = torch.zeros(total, own["features"].shape[1])
        features[index][start:stop] = own["features"]  # type: ignore[index]
        hidden[start:stop, index] = own["counted"] == 0
        start = stop
    return PooledUnits(exemplars.units, features, hidden)


@torch.no_grad()
def encoded_features(
    model: DevilModel, processor: DevilProcessor, units: ExemplarSet | Iterable[Unit], batch_size: int = 32
) -> PooledUnits:
    """Mode "pixels": the exemplars' pictures through the translator's backbone, every layer pooled with the masks.

    Args:
        units: an `ExemplarSet`, whose pictures are encoded once each; or any sequence of units, such as MILANNOTATIONS.
    """
    if isinstance(units, ExemplarSet):
        return _encode_exemplars(model, processor, units, batch_size)
    names, rows, hidden = [], [], []
    for unit in tqdm(units, desc="exemplars: features", unit="unit"):
        sums = _Sums(1, model)
        pictures = list(unit.images.permute(0, 2, 3, 1).numpy())
        maps = model.extract_features(processor(images=pictures, return_tensors="pt")["pixel_values"])
        masks = _mask_in_crop(unit.masks, processor)
        sums.add(torch.zeros(len(masks), dtype=torch.long), [pool_masked(cast(Tensor, one), masks) for one in maps])
        features, gone = sums.means()
        names.append((unit.layer, unit.unit))
        rows.append(features)
        hidden.append(gone)
    if not names:
        raise ValueError("there is no unit to describe")
    return PooledUnits(names, [torch.cat(layer) for layer in zip(*rows, strict=True)], torch.cat(hidden))


class _Sums:
    """Means of pooled features over a unit's exemplars, of those alone whose mask does not vanish on the layer's grid."""

    def __init__(self, units: int, model: DevilModel):
        self.sums = [torch.zeros(units, channels) for channels in model.backbone.channels]
        self.counts = torch.zeros(units, len(self.sums))

    def add(self, unit: Tensor, pooled: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take in, per layer, features (n, C_l) and whether they are empty (n,), of the units with positions `unit` (n,)."""
        for layer, (features, empty) in enumerate(pooled):
            full = ~empty
            self.sums[layer].index_add_(0, unit[full], features[full])
            self.counts[:, layer].index_add_(0, unit[full], torch.ones(int(full.sum())))

    def means(self) -> tuple[list[Tensor], Tensor]:
        """Per layer the means (units, C_l), and (units, L) bool, where there was nothing to average."""
        counts = self.counts.clamp(min=1)
        return [one / counts[:, layer, None] for layer, one in enumerate(self.sums)], self.counts == 0


def pool_masked(feature_map: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Pool map n of `feature_map` (n, C, H, W) with mask n of `masks` (n, h, w): features (n, C), and vanished (n,)."""
    weights, empty = region_weights(masks[:, None].to(feature_map.device), (feature_map.shape[-2], feature_map.shape[-1]))
    return pool(feature_map.float(), weights).cpu(), empty[:, 0].cpu()


def _mask_in_crop(masks: Tensor, processor: DevilProcessor) -> Tensor:
    """Masks (k, H, W) over pictures as masks over the translator's crop of them."""
    geometry = processor.image_processor.geometry(masks.shape[-2:])
    resized = F.interpolate(masks[:, None].float(), geometry.resized_size, mode="bilinear", antialias=True, align_corners=False)[
        :, 0
    ]
    (top, left), (height, width) = geometry.offset, geometry.crop_size
    padding = (max(-left, 0), max(width + left - resized.shape[2], 0), max(-top, 0), max(height + top - resized.shape[1], 0))
    padded = F.pad(resized, padding)
    top, left = max(top, 0), max(left, 0)
    return padded[:, top : top + height, left : left + width]


def _encode_exemplars(model: DevilModel, processor: DevilProcessor, exemplars: ExemplarSet, batch_size: int) -> PooledUnits:
    sums = _Sums(len(exemplars), model)
    starts, start = {}, 0
    for name in exemplars.layers:
        starts[name] = start
        start += len(exemplars.tensors[name]["peaks"])
    numbers = sorted(exemplars.keys)
    bar = tqdm(total=len(numbers), desc="exemplars: features", unit="image")
    with bar:
        for begin in range(0, len(numbers), batch_size):
            batch = numbers[begin : begin + batch_size]
            images = [exemplars.image(number) for number in batch]
            maps = model.extract_features(processor(images=images, return_tensors="pt")["pixel_values"])
            for position, number in enumerate(batch):
                own = [cast(Tensor, one)[position : position + 1] for one in maps]
                for name in exemplars.layers:
                    for units, masks in exemplars.masks_of_image(name, number):
                        masks = _mask_in_crop(masks, processor)
                        pooled = [pool_masked(one.expand(len(masks), -1, -1, -1), masks) for one in own]
                        sums.add(starts[name] + units, pooled)
            bar.update(len(batch))
    features, hidden = sums.means()
    return PooledUnits(exemplars.units, list(features), hidden)


def pool_units(model: DevilModel, processor: DevilProcessor, units: ExemplarSet | Iterable[Unit], mode: str = "pixels"):
    """Features of units in one of the two modes, `PooledUnits`."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {MODES}")
    if mode == "pixels":
        return encoded_features(model, processor, units)
    if not isinstance(units, ExemplarSet):
        raise ValueError('mode "features" needs exemplars of a network of your own; of foreign files use "pixels"')
    return own_features(model, units)
