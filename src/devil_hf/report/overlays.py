"""An image under a map, and a map in colours. The processor's own `overlay` is a plain one for everybody."""

import numpy as np
from PIL import Image

from devil_hf.report.colours import DIVERGING, SEQUENTIAL


def _scale_position(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    low, high = value_range
    return np.clip((np.nan_to_num(values, nan=low) - low) / (high - low), 0.0, 1.0)


def colorize(values: np.ndarray, value_range: tuple[float, float], symmetric: bool = True) -> np.ndarray:
    """Colours of `values` (any shape) on the shared scale -> uint8 (..., 3); blue to red, or dark to light."""
    anchors = np.array(DIVERGING if symmetric else SEQUENTIAL, dtype=np.float64)
    position = _scale_position(values, value_range) * (len(anchors) - 1)
    lower = np.minimum(position.astype(int), len(anchors) - 2)
    share = (position - lower)[..., None]
    return np.round(anchors[lower] * (1 - share) + anchors[lower + 1] * share).astype(np.uint8)


def overlay_map(
    image: Image.Image, values: np.ndarray, value_range: tuple[float, float], *, symmetric: bool = True, opacity: float = 0.8
) -> Image.Image:
    """One image under one map.

    The image fades to grey; colour grows with the distance from zero (`symmetric`) or from the lowest value, so that
    what says nothing stays readable as a photograph. Where the map is NaN (outside the crop) the image is dark.

    Args:
        image: RGB picture of size (W, H).
        values: map of shape (H, W), NaN outside the crop.
        value_range: (lowest, highest) value of the colour scale.
        symmetric: whether zero is the neutral middle of the scale.
        opacity: weight of the colour at the ends of the scale.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=-1)
    base = 0.25 * np.asarray(image, dtype=np.float64) + 0.75 * (40 + grey * 0.84)
    position = _scale_position(values, value_range)
    strength = np.abs(2 * position - 1) if symmetric else 0.35 + 0.65 * position
    weight = (opacity * np.sqrt(strength))[..., None]
    picture = (1 - weight) * base + weight * colorize(values, value_range, symmetric)
    unseen = np.isnan(values)
    picture[unseen] = 0.45 * base[unseen]
    return Image.fromarray(np.round(picture).clip(0, 255).astype(np.uint8))


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a bool mask (H, W) that have a neighbour outside of it."""
    inside = np.pad(mask, 1)
    core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return mask & ~core


__all__ = ["colorize", "outline", "overlay_map"]
