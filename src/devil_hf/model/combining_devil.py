"""One attribution map from the maps of several layers, without training and without labels (beyond the paper).

Maps are interpolated bilinearly to the finest grid and averaged, so that the result stays in nats. With "mean" every layer counts
alike. But layers differ in what they know of a phrase, and one that does not know it has peaks, too. With "informed" layer l has
for each phrase of each image the weight

    w_l = exp(e_l) s_l / sum_m exp(e_m) s_m

where e_l is the evidence that the whole layer has for the phrase (nats per token; exp(e_l) is by how much it makes the phrase
more likely) and s_l the standard deviation of its map over the locations: how much that depends on the place. The average is
smoothed by a Gaussian whose deviation is a 32nd of the grid's side, since the features of a fine layer speak for the edges of
an object as much as for its middle. The rule was chosen among some eighty of its kind in the shapes world, on scenes that
no reported figure is measured on.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

COMBINATIONS = ("informed", "mean")
SMOOTHING = 1 / 32  # deviation of the Gaussian, in sides of the grid


def combine_maps(maps: Mapping[str, Tensor], rule: str, whole: Tensor | None = None) -> Tensor:
    """Combine attribution maps (B, K, H_l, W_l) of several layers into one (B, K, H, W) on the finest of their grids.

    Args:
        maps: layer -> map, all of one measure.
        rule: one of `COMBINATIONS`, see above.
        whole: (L, B, K), evidence of each phrase for each layer's whole map in nats per token; "informed" needs it.
    """
    grid = finest_grid(list(maps.values()))
    resized = torch.stack([F.interpolate(one, grid, mode="bilinear", align_corners=False) for one in maps.values()])
    if rule == "mean":
        return resized.mean(dim=0)
    if whole is None:
        raise ValueError("the combination 'informed' needs the evidence of the whole layers: give `whole`.")
    spread = torch.stack([one.std(dim=(2, 3), correction=0) for one in maps.values()])  # (L, B, K)
    weights = (whole - whole.amax(dim=0)).exp() * spread + 1e-12  # maps that are flat everywhere count alike
    weights = weights / weights.sum(dim=0)
    return smooth((weights[..., None, None] * resized).sum(dim=0))


def smooth(maps: Tensor) -> Tensor:
    """Maps (..., H, W) averaged with Gaussian weights, renormalised at the border."""
    rows, columns = (_gaussian(edge, maps) for edge in maps.shape[-2:])
    return rows @ maps @ columns.T


def _gaussian(edge: int, like: Tensor) -> Tensor:
    """(edge, edge) rows of weights that sum to one."""
    place = torch.arange(edge, device=like.device, dtype=like.dtype)
    weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * (edge * SMOOTHING) ** 2))
    return weights / weights.sum(dim=1, keepdim=True)


def finest_grid(maps: Sequence[Tensor]) -> tuple[int, int]:
    """(rows, columns) of the map with the most locations."""
    return max(((one.shape[-2], one.shape[-1]) for one in maps), key=lambda grid: grid[0] * grid[1])


__all__ = ["COMBINATIONS", "combine_maps", "finest_grid", "smooth"]
