"""Frozen features computed once.

The backbone never changes, so its pooled features need no second pass: each image is pooled with several draws of location
dropout (paper, section 3.2), and training picks one draw at random each time it sees the image.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import pool
from devil_hf.training.draws import draw_location_weights


@torch.no_grad()
def pooled_feature_draws(
    model: DevilModel, batches: Iterable[Tensor], draws: int | None = None, description: str = "features", progress: bool = True
) -> list[Tensor]:
    """Pool every image `draws` times with the model's own location dropout, or once over all locations.

    Args:
        batches: pixel values, (B, 3, H, W) each.
        draws: how many location draws each image gets; None for one uniform pooling, as evaluation wants it.
        progress: show one.

    Returns:
        Per layer an fp16 tensor (images, draws or 1, C_l).
    """
    bar = tqdm(batches, desc=description, unit="batch", leave=False, disable=not progress)
    collected = [pool_draws(model, pixel_values, draws) for pixel_values in bar]
    if not collected:
        raise ValueError(f"{description}: there is not one usable image.")
    return [torch.cat(layer) for layer in zip(*collected, strict=True)]


@torch.no_grad()
def pool_draws(
    model: DevilModel,
    pixel_values: Tensor,
    draws: int | None = None,
    regions: Tensor | None = None,
    image_index: Sequence[int] | None = None,
) -> list[Tensor]:
    """The features of one batch, per layer an fp16 tensor (B, draws or 1, C_l).

    Args:
        pixel_values: (images, 3, H, W).
        draws: see `pooled_feature_draws`.
        regions: (B, H, W) masks that the draws stay inside of; None for the whole images.
        image_index: (B,) which image each row is of, where several regions of one are read; None for a row each.

    Raises:
        ValueError: for regions without draws, and for features that are not finite, or too large for fp16.
    """
    pixel_values = pixel_values.to(memory_format=torch.channels_last)  # convolutions run faster on this layout
    feature_maps = cast(list[Tensor], model.extract_features(pixel_values))
    if image_index is not None:
        feature_maps = [maps[list(image_index)] for maps in feature_maps]
    weights = _draw_weights(model, feature_maps, draws, regions)
    return [
        as_stored(pool(maps, rows).view(len(maps), draws or 1, -1), name)
        for name, maps, rows in zip(model.layer_names, feature_maps, weights, strict=True)
    ]


def as_stored(pooled: Tensor, name: str) -> Tensor:
    """Pooled features of the layer `name` in fp16, on the CPU.

    Raises:
        ValueError: for features that are not finite, or too large for fp16.
    """
    largest = pooled.abs().max()
    if not largest < torch.finfo(torch.float16).max:
        raise ValueError(
            f"features of layer {name!r} are not finite, or too large to be stored in fp16 "
            f"(largest {largest.item():.3g}): leave that layer out."
        )
    return pooled.half().cpu()


def _draw_weights(
    model: DevilModel, feature_maps: list[Tensor], draws: int | None, regions: Tensor | None
) -> list[Tensor] | list[None]:
    """Per layer, weights (B, draws, H_l, W_l), or None for uniform ones."""
    if draws is None:
        if regions is not None:
            raise ValueError("draws=None pools whole images, but regions are given: give draws=1 or more")
        return [None] * len(feature_maps)
    images = len(feature_maps[0])
    if regions is not None:
        regions = regions.to(feature_maps[0].device).repeat_interleave(draws, dim=0)
    rows = draw_location_weights(model.config, images * draws, feature_maps, regions)
    return [weights.view(images, draws, *weights.shape[1:]) for weights in rows]


class PooledCaptions:
    """Images as cached draws of pooled features, each with its captions.

    Args:
        features: per layer (images, draws, C_l), as `pooled_feature_draws` returns them.
        captions: the captions of each image, at least one.
        seed: of which draw and which caption an epoch takes.
    """

    def __init__(self, features: Sequence[Tensor], captions: Sequence[Sequence[str]], seed: int = 0):
        if len(features[0]) != len(captions):
            raise ValueError(f"{len(features[0])} images have features, but {len(captions)} have captions.")
        bare = [index for index, texts in enumerate(captions) if not texts]
        if bare:
            raise ValueError(f"images {bare[:5]} have no caption: leave them out.")
        self.features = features
        self.captions = captions
        self.seed = seed

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, index: int, epoch: int) -> dict:
        """An image with one of its draws and one of its captions, both drawn by (seed, epoch, index)."""
        rng = np.random.default_rng((self.seed, epoch, index))
        draw, text = int(rng.integers(self.features[0].shape[1])), int(rng.integers(len(self.captions[index])))
        return {"pooled_features": [layer[index, draw] for layer in self.features], "caption": self.captions[index][text]}

    def every_caption(self) -> list[tuple[int, str]]:
        """(index of the image, caption) of all captions: every image's first, then every image's second, ..."""
        most = max(map(len, self.captions), default=0)
        return [(i, texts[j]) for j in range(most) for i, texts in enumerate(self.captions) if j < len(texts)]


__all__ = ["PooledCaptions", "as_stored", "pool_draws", "pooled_feature_draws"]
