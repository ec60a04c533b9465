"""Frozen features computed once.

The backbone never changes, so its pooled features need no second pass: each image is pooled with several draws of location
dropout (paper, section 3.2), and training picks one draw at random each time it sees the image.
"""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from devil_hf.modeling_devil import DevilModel
from devil_hf.pooling_devil import location_dropout
from devil_hf.pooling_devil import pool


@torch.no_grad()
def pooled_feature_draws(
    model: DevilModel,
    batches: Iterable[Tensor],
    draws: int | None = None,
    description: str = "features",
    total: int | None = None,
) -> list[Tensor]:
    """Pool every image `draws` times with the model's own location dropout, or once over all locations.

    Args:
        batches: pixel values, (B, 3, H, W) each.
        draws: how many location draws each image gets; None for one uniform pooling, as evaluation wants it.
        total: number of batches, for the progress bar.

    Returns:
        Per layer an fp16 tensor (images, draws or 1, C_l).
    """
    collected: list[list[Tensor]] = [[] for _ in model.layer_names]
    for pixel_values in tqdm(batches, desc=description, total=total, unit="batch", leave=False):
        pixel_values = pixel_values.to(memory_format=torch.channels_last)  # convolutions run faster on this layout
        feature_maps = cast(list[Tensor], model.extract_features(pixel_values))
        weights = _draw_weights(model, feature_maps, draws)
        for name, maps, layer_weights, layer in zip(model.layer_names, feature_maps, weights, collected, strict=True):
            pooled = pool(maps, layer_weights).view(len(maps), draws or 1, -1)
            if not pooled.abs().max() < torch.finfo(torch.float16).max:
                raise ValueError(
                    f"features of layer {name!r} are not finite, or too large to be stored in fp16 "
                    f"(largest {pooled.abs().max().item():.3g}): leave that layer out."
                )
            layer.append(pooled.half().cpu())
    return [torch.cat(layer) for layer in collected]


def _draw_weights(model: DevilModel, feature_maps: list[Tensor], draws: int | None) -> list[Tensor] | list[None]:
    """Per layer, weights (B, draws, H_l, W_l), or None for uniform ones."""
    if draws is None:
        return [None] * len(feature_maps)
    config, images = model.config, len(feature_maps[0])
    grids = [maps.shape[-2:] for maps in feature_maps]
    rows = location_dropout(
        images * draws, grids, config.location_dropout, config.location_schedule, feature_maps[0].device
    )
    return [weights.view(images, draws, *weights.shape[1:]) for weights in rows]


class PooledCaptions(Dataset):
    """Images as cached draws of pooled features, each with its captions.

    An item is one image with one of its draws and one of its captions, both drawn by torch's generator.

    Args:
        features: per layer (images, draws, C_l), as `pooled_feature_draws` returns them.
        captions: the captions of each image, at least one.
        every_caption: make an item of every caption instead, with its image's first draw: nothing random, for validation.
    """

    def __init__(self, features: Sequence[Tensor], captions: Sequence[Sequence[str]], every_caption: bool = False):
        if len(features[0]) != len(captions):
            raise ValueError(f"{len(features[0])} images have features, but {len(captions)} have captions.")
        bare = [index for index, texts in enumerate(captions) if not texts]
        if bare:
            raise ValueError(f"images {bare[:5]} have no caption: leave them out.")
        self.features = features
        self.captions = captions
        self.pairs = [(i, j) for i, texts in enumerate(captions) for j in range(len(texts))] if every_caption else None

    def __len__(self) -> int:
        return len(self.captions if self.pairs is None else self.pairs)

    def __getitem__(self, index: int) -> dict:
        if self.pairs is not None:
            image, text = self.pairs[index]
            return {"pooled_features": [f[image, 0] for f in self.features], "caption": self.captions[image][text]}
        texts = self.captions[index]
        draw = int(torch.randint(self.features[0].shape[1], ()))
        return {
            "pooled_features": [layer[index, draw] for layer in self.features],
            "caption": texts[int(torch.randint(len(texts), ()))],
        }
