"""One attribution map from the maps of several layers, without training and without labels (beyond the paper).

Maps are interpolated bilinearly to the finest grid and averaged, so that the result stays in nats. With "mean" every layer counts
alike. But layers differ in what they know of a phrase, and a layer that does not know it still has peaks, of noise. With
"informed" layer l of L weighs

    w_l = exp(p_l / t) / sum_m exp(p_m / t),    p_l = max over locations of the layer's map

for each phrase of each image: by how strongly it speaks for the phrase anywhere. Evidence is log p(phrase | location) -
log p(phrase | nothing), so an uninformed layer cannot speak strongly for anything, and exp(p_l) is by how much the layer's best
place makes the phrase more likely. t is `TEMPERATURE`.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

COMBINATIONS = ("informed", "mean")
TEMPERATURE = 0.3  # nats per token


def combine_maps(maps: Mapping[str, Tensor], rule: str) -> Tensor:
    """Combine attribution maps (B, K, H_l, W_l) of several layers into one (B, K, H, W) on the finest of their grids.

    Args:
        maps: layer -> map, all in one unit.
        rule: one of `COMBINATIONS`, see above.
    """
    grid = finest_grid(list(maps.values()))
    resized = torch.stack([F.interpolate(one, grid, mode="bilinear", align_corners=False) for one in maps.values()])
    if rule == "mean":
        return resized.mean(dim=0)
    peaks = torch.stack([one.amax(dim=(2, 3)) for one in maps.values()])  # (L, B, K)
    weights = (peaks / TEMPERATURE).softmax(dim=0)
    return (weights[..., None, None] * resized).sum(dim=0)


def finest_grid(maps: Sequence[Tensor]) -> tuple[int, int]:
    """(rows, columns) of the map with the most locations."""
    return max(((one.shape[-2], one.shape[-1]) for one in maps), key=lambda grid: grid[0] * grid[1])


__all__ = ["COMBINATIONS", "combine_maps", "finest_grid"]
