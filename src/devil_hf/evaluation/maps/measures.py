"""How maps are compared with masks, on numpy arrays; `standard.py` says which of this is reported.

Masks are those of the crop that the backbone saw: what it never saw is neither a hit nor a miss. Pointing is decided on the
map's own grid (`pointing.py`); everything by pixels enlarges the map bilinearly to the mask first, as the paper draws it.
A map without any knowledge, equal everywhere, scores what chance would: ties share their score.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from devil_hf.evaluation.maps.pointing import finite_map
from devil_hf.statistics import average_precision

LEVELS = np.linspace(0.0, 1.0, 41)  # shares of a map's maximum that the best threshold is looked for among
FIXED_LEVEL = 0.5


def enlarge(attribution: ArrayLike, size: tuple[int, int]) -> np.ndarray:
    """A map (..., rows, columns) bilinearly enlarged to `size`, as `F.interpolate(..., align_corners=False)` does."""
    values = np.asarray(attribution, dtype=np.float64)
    for axis, edge in ((-2, size[0]), (-1, size[1])):
        cells = values.shape[axis]
        place = np.clip((np.arange(edge) + 0.5) * cells / edge - 0.5, 0, cells - 1)
        low = np.floor(place).astype(int)
        share = place - low
        if axis == -2:
            share = share[:, None]
        values = (1 - share) * values.take(low, axis) + share * values.take(np.minimum(low + 1, cells - 1), axis)
    return values


def energy_pointing(values: ArrayLike, mask: ArrayLike) -> float:
    """Share of the positive mass of a map that lies on the mask, both (height, width); 0 where nothing is positive.

    Source: Wang et al., Score-CAM, 2020. It needs a map whose zero means something, as that of evidence does.
    """
    mass, inside = np.clip(finite_map(values), 0, None), _mask(mask)
    total = mass.sum()
    return float(mass[inside].sum() / total) if total > 0 else 0.0


def relative(values: ArrayLike) -> np.ndarray:
    """A map in shares of its maximum, what is negative at 0: as class activation maps are drawn.

    A map that is nowhere positive (log-probabilities) is taken on its own range; one that is flat is one everywhere.
    """
    values = finite_map(values)
    low = 0.0 if values.max() > 0 else values.min()
    high = values.max()
    return np.clip(values - low, 0, None) / (high - low) if high > low else np.ones_like(values)


def overlaps(values: ArrayLike, mask: ArrayLike, levels: Sequence[float] = tuple(LEVELS)) -> np.ndarray:
    """Pixels in the intersection and in the union of the mask and {relative map >= level}, see `relative`, (levels, 2)."""
    flat, inside = relative(values).ravel(), _mask(mask).ravel()
    # One sort instead of a pass per level.
    order = np.sort(flat)
    order_inside = np.sort(flat[inside])
    above = len(order) - np.searchsorted(order, levels, side="left")
    hit = len(order_inside) - np.searchsorted(order_inside, levels, side="left")
    return np.stack([hit, above + int(inside.sum()) - hit], axis=1)


def pixel_precision(values: ArrayLike, mask: ArrayLike) -> float:
    """Average precision of the pixels of a map ranked by it, both (height, width)."""
    return average_precision(finite_map(values).ravel(), _mask(mask).ravel())


def choice(values: np.ndarray, masks: np.ndarray, at: int) -> float | None:
    """The share of a phrase's pixels at which its map is higher than those of the image's other objects; ties share.

    Phrases whose masks overlap may both be true of a place, so they do not compete.

    Args:
        values: (K, height, width), maps of the image's K phrases in one unit.
        masks: (K, height, width) bool.
        at: which phrase.

    Returns:
        The share, None without a rival.
    """
    mask = _mask(masks[at])
    rivals = [other for other in range(len(masks)) if other != at and not (masks[other] & mask).any()]
    if not rivals:
        return None
    own, against = values[at][mask], values[rivals][:, mask]  # (pixels,), (rivals, pixels)
    won = (own >= against).all(axis=0)
    tied = (own == against).sum(axis=0)
    return float(np.mean(won / (1 + tied)))


def centre_prior(size: tuple[int, int], tiles: int = 1) -> np.ndarray:
    """The map that always says "the middle": a Gaussian with a quarter of each side as its deviation, (rows, columns).

    Args:
        tiles: images side by side and below each other; each has its own middle.
    """
    # Whole numbers until the end, so that places equally far from the middle are equal to the last bit.
    rows, columns = (((2 * np.arange(edge) + 1) * tiles % (2 * edge) - edge) / (0.5 * edge) for edge in size)
    return np.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / 2)


def tile_crops(crops: np.ndarray) -> np.ndarray:
    """Up to four pictures or masks (n, ..., height, width) as one of the same size, each at half its size in a 2 x 2 layout.

    One is left as it is. Unused quarters are zero, which is the mean colour of normalised pixel values. Odd sides are cut.
    """
    crops = np.asarray(crops)
    if len(crops) == 1:
        return crops[0]
    if len(crops) > 4:
        raise ValueError(f"{len(crops)} images do not fit into a 2 x 2 layout: give at most four")
    height, width = crops.shape[-2] // 2, crops.shape[-1] // 2
    cut = crops[..., : 2 * height, : 2 * width].astype(np.float64)
    halves = cut.reshape(*cut.shape[:-2], height, 2, width, 2).mean(axis=(-3, -1))
    board = np.zeros(crops.shape[1:])
    for one, (row, column) in zip(halves, product((0, 1), (0, 1)), strict=False):
        board[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = one
    return board


def _mask(mask: ArrayLike) -> np.ndarray:
    mask = np.asarray(mask).astype(bool)
    if not mask.any():
        raise ValueError("a mask without a pixel shows no object; leave hidden objects out")
    return mask


__all__ = [
    "FIXED_LEVEL",
    "LEVELS",
    "centre_prior",
    "choice",
    "energy_pointing",
    "enlarge",
    "overlaps",
    "pixel_precision",
    "relative",
    "tile_crops",
]
