"""Layers and location weights: the one way in which every question about a part of the features is asked.

A feature map f (N, C, H, W) and location weights w (N, H, W), non-negative and summing to one, give the pooled feature
z = sum over locations of w * f (paper, section 3.2). The whole image, a place, a window, a region, a neuron's exemplar and
training dropout differ only in w. The weights are built here; nothing here knows the translator or the language model.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Layers = str | int | Sequence[str | int] | None  # as users ask for them, see `resolve_layers`


def resolve_layers(requested: Layers, names: Sequence[str], whole: str | None = None) -> list[int]:
    """The one rule by which layers are asked for: by name, or by index, negative from the deepest.

    Args:
        requested: a name, an index (any whole number: of Python, numpy or torch), or a sequence of either; None means all.
        names: the layers to choose from, shallow to deep.
        whole: a word that stands for all layers together, at position -1; None where there is no such thing.

    Returns:
        Positions in `names`, in the order requested.

    Raises:
        ValueError: if a layer is unknown, named twice, or none is requested.
    """
    if requested is None:
        return list(range(len(names)))
    # Arrays and tensors of a single number have the methods of a sequence as well.
    sequence = isinstance(requested, Iterable) and not isinstance(requested, str | bytes)
    items: list[Any] = list(cast(Any, requested)) if sequence and getattr(requested, "ndim", None) != 0 else [requested]
    positions = [-1 if isinstance(item, str) and item == whole else _position(item, names) for item in items]
    if not positions:
        raise ValueError(f"no layer requested; choose from {list(names)} or give None for all")
    if len(set(positions)) < len(positions):
        raise ValueError(f"layers {items} name one layer twice; choose each of {list(names)} at most once")
    return positions


def resolve_layer(requested: str | int, names: Sequence[str]) -> int:
    """The position of the one layer that is requested; a ValueError for more layers, and as `resolve_layers`."""
    positions = resolve_layers(requested, names)
    if len(positions) != 1:
        raise ValueError(f"one layer is needed here, not {len(positions)}; choose from {list(names)}")
    return positions[0]


def _position(item: Any, names: Sequence[str]) -> int:
    if isinstance(item, str):
        if item in names:
            return list(names).index(item)
        raise ValueError(f"unknown layer {item!r}; choose from {list(names)} or an index")
    # Truth values and tensors of floats would pass for whole numbers.
    kind = str(getattr(item, "dtype", type(item).__name__))
    if "int" not in kind or getattr(item, "ndim", 0) != 0:
        raise ValueError(f"layer {item!r} is neither a name nor an index; choose from {list(names)}")
    index = operator.index(item)
    if -len(names) <= index < len(names):
        return index % len(names)
    raise ValueError(f"layer index {index} is out of range for the {len(names)} layers {list(names)}")


def pool(feature_map: Tensor, weights: Tensor | None) -> Tensor:
    """Pool each of B maps with R location weights.

    Args:
        feature_map: (B, C, H, W).
        weights: (B, R, H, W), or (R, H, W) for the same questions about every image; None for uniform weights (R = 1).

    Returns:
        (B * R, C), rows by image, then by question.
    """
    if weights is None:
        return feature_map.mean(dim=(2, 3))
    weights = weights.to(feature_map)
    equation = "bchw,rhw->brc" if weights.ndim == 3 else "bchw,brhw->brc"
    return torch.einsum(equation, feature_map, weights).flatten(0, 1)


def read_locations(locations: Any, grid: tuple[int, int], layer: str) -> list[tuple[int, int]]:
    """(row, column) pairs on the grid of `layer`; a ValueError for none at all, for other things, and outside the grid."""
    try:
        places = [(operator.index(row), operator.index(column)) for row, column in locations]
    except TypeError as error:
        raise ValueError(f"locations {locations!r} are not (row, column) pairs of whole numbers, such as [(3, 4)].") from error
    if not places:
        raise ValueError("locations are empty: name at least one (row, column), or leave them out for the whole image.")
    for row, column in places:
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise ValueError(
                f"location ({row}, {column}) is outside the {grid[0]} x {grid[1]} grid of layer {layer!r}: "
                f"rows go from 0 to {grid[0] - 1}, columns from 0 to {grid[1] - 1}."
            )
    return places


def check_weights(weights: Tensor | None, images: int, grid: tuple[int, int], layer: str) -> None:
    """Raise an error for location weights of a wrong shape, and for weights that are no distribution over the grid."""
    if weights is None:
        return
    shape = tuple(weights.shape)
    if shape[-2:] != grid or not (len(shape) == 3 or (len(shape) == 4 and shape[0] == images)):
        raise ValueError(
            f"location weights of layer {layer!r} have the shape {shape}: expected (questions, {grid[0]}, {grid[1]}) or "
            f"({images}, questions, {grid[0]}, {grid[1]})."
        )
    mass = weights.float().sum(dim=(-2, -1))
    if weights.min() < 0 or (mass - 1).abs().max() > 1e-2:
        raise ValueError(
            f"location weights of layer {layer!r} must not be negative and must sum to one over the grid; they sum to "
            f"{mass.min().item():.3g} to {mass.max().item():.3g}: divide them by their sum."
        )


def check_window(window: Any) -> int:
    """The side of a window, in locations; a ValueError for anything else than an odd whole number."""
    side = operator.index(window) if hasattr(window, "__index__") else 0
    if side < 1 or side % 2 == 0:
        raise ValueError(f"window={window!r} must be an odd number of locations, 1 for a single place.")
    return side


def window_weights(locations: Sequence[tuple[int, int]], grid: tuple[int, int], window: int = 1) -> Tensor:
    """Weights (len(locations), H, W), uniform in the `window` x `window` square around each (row, column).

    The square is cut at the border of the grid; a window of 1 is one-hot.
    """
    weights = torch.zeros(len(locations), *grid)
    reach = check_window(window) // 2
    for index, (row, column) in enumerate(locations):
        weights[index, max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1] = 1.0
    return weights / weights.sum(dim=(1, 2), keepdim=True)


def region_weights(masks: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weights (B, R, H, W) of soft regions `masks` (B, R, H_in, W_in), and which of them vanish on this grid (B, R) bool.

    Masks are resized bilinearly and normalised (paper, section 4.4). A vanished one gets uniform weights and should be hidden.
    """
    resized = F.interpolate(masks.float(), grid, mode="bilinear", antialias=True, align_corners=False).clamp_min(0)
    mass = resized.sum(dim=(2, 3), keepdim=True)  # (B, R, 1, 1)
    empty = mass <= 1e-6
    uniform = torch.full_like(resized, 1.0 / (grid[0] * grid[1]))
    return torch.where(empty, uniform, resized / mass.clamp_min(1e-6)), empty.flatten(1)


def pool_every_location(feature_map: Tensor, window: int = 1) -> Tensor:
    """Pool `feature_map` (N, C, H, W) around every location to (N * H * W, C), rows by image, then row, then column.

    The same as `pool` with the `window_weights` of all locations, without ever building those weights.
    """
    if check_window(window) > 1:
        feature_map = F.avg_pool2d(feature_map, window, stride=1, padding=window // 2, count_include_pad=False)
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2)
