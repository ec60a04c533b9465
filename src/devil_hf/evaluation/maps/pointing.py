"""The pointing game: is the maximum of an attribution map on the object, within a tolerance in cells of the map's grid?

A cell stands for its centre, which is also where the maximum of a bilinearly enlarged map lies. It hits when a pixel of
the object's mask is closer to that centre than the tolerance, half a cell by default: coarse layers can say no more
than which cell. `chance_pointing` is what a map without any knowledge would score.
"""

from functools import lru_cache
from itertools import product
from math import ceil

import numpy as np
from numpy.typing import ArrayLike


def hit_cells(grid: tuple[int, int], mask: ArrayLike, tolerance_cells: float = 0.5) -> np.ndarray:
    """Mark the cells whose centre lies within `tolerance_cells` of the mask.

    Args:
        grid (`tuple[int, int]`): Rows and columns of the map.
        mask (array of shape `(height, width)`): True or non-zero on the object, in image coordinates.
        tolerance_cells (`float`): Largest distance, in cells, between a cell's centre and the centre of the nearest
            pixel of the mask.

    Returns:
        `np.ndarray` of bool with shape `grid`.

    Raises:
        ValueError: if the mask is not two-dimensional or is empty, or if the tolerance is negative.
    """
    mask = np.asarray(mask).astype(bool)
    if mask.ndim != 2 or not mask.any():
        raise ValueError(f"a mask of shape {mask.shape} with {int(mask.sum())} pixels shows no object; leave hidden objects out")
    if tolerance_cells < 0:
        raise ValueError(f"tolerance_cells {tolerance_cells} is negative; 0 means no tolerance")
    return _hit_cells((int(grid[0]), int(grid[1])), mask.shape, np.packbits(mask).tobytes(), float(tolerance_cells)).copy()


@lru_cache(maxsize=256)  # one mask is asked for many maps
def _hit_cells(grid: tuple[int, int], shape: tuple[int, int], packed: bytes, tolerance_cells: float) -> np.ndarray:
    mask = np.unpackbits(np.frombuffer(packed, np.uint8), count=shape[0] * shape[1]).reshape(shape)
    rows, columns = grid
    y, x = ((axis + 0.5) * cells / size for axis, cells, size in zip(np.nonzero(mask), grid, mask.shape, strict=True))  # in cells
    hits = np.zeros(grid, dtype=bool)
    # Without tolerance a centre counts when it lies in a pixel of the mask, which is half a pixel away at most.
    slack = max(tolerance_cells, 0.5 * float(np.hypot(rows / mask.shape[0], columns / mask.shape[1])))
    reach = range(-ceil(slack), ceil(slack) + 1)
    for down, right in product(reach, reach):
        i, j = np.floor(y).astype(int) + down, np.floor(x).astype(int) + right
        near = (i + 0.5 - y) ** 2 + (j + 0.5 - x) ** 2 <= slack**2
        near &= (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
        hits[i[near], j[near]] = True
    return hits


def pointing(attribution: ArrayLike, mask: ArrayLike, tolerance_cells: float = 0.5) -> float:
    """1 if the maximum of a map points at the object, else 0; tied maxima share, so that a flat map scores what chance would.

    Args:
        attribution (array of shape `(rows, columns)`): The map on its own grid.
        mask (array of shape `(height, width)`): True on the object, in image coordinates.
        tolerance_cells (`float`): See [`hit_cells`].

    Raises:
        ValueError: if the map is not two-dimensional or not finite, or for an empty mask.
    """
    attribution = finite_map(attribution)
    hits = hit_cells((attribution.shape[0], attribution.shape[1]), mask, tolerance_cells)
    return float(hits[attribution == attribution.max()].mean())


def finite_map(attribution: ArrayLike) -> np.ndarray:
    """A map as float64; a ValueError where it has not two dimensions or is not finite."""
    attribution = np.asarray(attribution, dtype=np.float64)
    if attribution.ndim != 2 or not np.isfinite(attribution).all():
        raise ValueError(
            f"a map of shape {attribution.shape} must have two dimensions and finite values; give one phrase of one image, "
            "in the crop (maps in image coordinates are NaN outside of it)"
        )
    return attribution


def chance_pointing(grid: tuple[int, int], mask: ArrayLike, tolerance_cells: float = 0.5) -> float:
    """The probability that a cell drawn at random hits the object, which is the score of a map without knowledge.

    Arguments and errors are those of [`hit_cells`].
    """
    return float(hit_cells(grid, mask, tolerance_cells).mean())
