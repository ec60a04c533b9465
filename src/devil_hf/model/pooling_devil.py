"""Layers and location weights: the one way in which every question about a part of the features is asked.

A feature map f (N, C, H, W) and location weights w (N, H, W), non-negative and summing to one, give the pooled feature
z = sum over locations of w * f (paper, section 3.2). The whole image, a place, a window, a region, a neuron's exemplar and
training dropout differ only in w. The weights are built here; nothing here knows the translator or the language model.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Layers = str | int | Sequence[str | int] | None  # as users ask for them, see `resolve_layers`


def read_tensor(value: Any, name: str) -> Tensor:
    """A tensor of what a user gave as one: a tensor, an array, or nested lists; a TypeError that names what is none."""
    try:
        return value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor, an array or nested lists of numbers, got {value!r:.100}.") from error


def read_number(value: Any, name: str, least: float, whole: bool = True) -> Any:
    """A number of Python, numpy or torch; a ValueError for what is none, is not finite, or is less than `least`."""
    try:
        number = operator.index(value) if whole else float(value / 1)  # text is no number
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not least <= number < math.inf:
        raise ValueError(f"{name}={value!r:.100} must be a {'whole' if whole else 'finite'} number, at least {least}.")
    return number


def read_masks(masks: Any, name: str) -> Tensor:
    """Soft masks of any form and type as fp32, of the same shape; a ValueError for values outside of [0, 1]."""
    values = read_tensor(masks, name).float()
    if values.numel() and not (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):
        low, high = values.aminmax()
        raise ValueError(f"{name} must lie in [0, 1], not from {low:.3g} to {high:.3g}: divide them by their highest value.")
    return values


def resolve_layers(requested: Layers, names: Sequence[str], whole: str | None = None) -> list[int]:
    """The one rule by which layers are asked for: by name, or by index, negative from the deepest.

    Args:
        requested: a name, an index (any whole number: of Python, numpy or torch), or a sequence of either; None means all.
        names: the layers to choose from, shallow to deep.
        whole: a word that stands for all layers together, at position -1; None where there is no such thing.

    Returns:
        Positions in `names`, in the order requested; a ValueError if one is unknown or named twice, or there is none.
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
    """Pool B maps (B, C, H, W) with R location weights -> (B * R, C), rows by image, then by question.

    The weights are (B, R, H, W), or (R, H, W) for the same questions about every image; None for uniform ones (R = 1).
    """
    if weights is None:
        return feature_map.mean(dim=(2, 3))
    weights = weights.to(feature_map)
    equation = "bchw,rhw->brc" if weights.ndim == 3 else "bchw,brhw->brc"
    return torch.einsum(equation, feature_map, weights).flatten(0, 1)


def one_per_layer(given: Any, name: str, names: Sequence[str]) -> list[Any]:
    """What a user gave for every layer, or None for some, as tensors; a ValueError for another number of them."""
    if isinstance(given, Tensor | Mapping) or not hasattr(given, "__len__") or len(given) != len(names):
        raise ValueError(f"{name} must hold one for each of {list(names)}, or None.")
    return [None if one is None else read_tensor(one, name) for one in given]


def only_one(**given: Any) -> None:
    """A ValueError where more than one of several arguments says where to look."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} both say where to look: give one of them.")


def read_locations(locations: Any, layer: str, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, column) pairs on the grid of `layer`; a ValueError for none at all, for other things, and outside the grid."""
    try:
        places = [(operator.index(row), operator.index(column)) for row, column in locations]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"locations {locations!r:.100} are not (row, column) pairs of whole numbers, such as [(3, 4)]."
        ) from error
    if not places:
        raise ValueError("locations are empty: name at least one (row, column), or leave them out for the whole image.")
    for row, column in places:
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise ValueError(
                f"location ({row}, {column}) is outside the {grid[0]} x {grid[1]} grid of layer {layer!r}: "
                f"rows go from 0 to {grid[0] - 1}, columns from 0 to {grid[1] - 1}."
            )
    return places


def read_weights(weights: Any, images: int, layer: str, grid: tuple[int, int]) -> Tensor | None:
    """Location weights as a tensor; a ValueError for a wrong shape, and for weights that are no distribution over the grid."""
    if weights is None:
        return None
    weights = read_tensor(weights, "location_weights")
    shape = tuple(weights.shape)
    if 0 in shape or shape[-2:] != grid or not (len(shape) == 3 or (len(shape) == 4 and shape[0] == images)):
        raise ValueError(
            f"location weights of layer {layer!r} have the shape {shape}: expected (questions, {grid[0]}, {grid[1]}) or "
            f"({images}, questions, {grid[0]}, {grid[1]})."
        )
    mass = weights.float().sum(dim=(-2, -1))
    if not (weights.min() >= 0 and (mass - 1).abs().max() <= 1e-2):
        raise ValueError(
            f"location weights of layer {layer!r} must not be negative and must sum to one over the grid; they sum to "
            f"{mass.min().item():.3g} to {mass.max().item():.3g}: divide them by their sum."
        )
    return weights


def check_window(window: Any) -> int:
    """The side of a window, in locations; a ValueError for anything else than an odd whole number."""
    side = read_number(window, "window", 1)
    if side % 2 == 0:
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


def place_weights(names, seen, pixel_values, locations=None, window=1, regions=None, location_weights=None) -> tuple[Any, Any]:
    """Where a question looks, as `DevilModel.ask` takes it, in the maps `seen` of visible layers, by index of `names`.

    Returns:
        By layer index, weights (R, H_l, W_l) or (B, R, H_l, W_l), None for uniform ones; and where regions vanish, (B * R, L).
    """
    only_one(locations=locations, regions=regions, location_weights=location_weights)
    if regions is not None:
        return _region_weights(names, seen, pixel_values, regions)
    grids = {names[index]: (maps.shape[-2], maps.shape[-1]) for index, maps in seen.items()}
    if location_weights is not None:
        given, images = one_per_layer(location_weights, "location_weights", names), len(next(iter(seen.values())))
        return {index: read_weights(given[index], images, names[index], grids[names[index]]) for index in seen}, None
    if locations is None:
        if check_window(window) != 1:
            raise ValueError(f"window={window!r} is a square around places: give locations, too, or leave it out.")
        return dict.fromkeys(seen), None
    if len(set(grids.values())) > 1:
        raise ValueError(f"locations need one grid, but the visible layers have {grids}: name one layer, or use regions.")
    name, grid = next(iter(grids.items()))
    return dict.fromkeys(seen, window_weights(read_locations(locations, name, grid), grid, window)), None


def _region_weights(names, seen, pixel_values, regions) -> tuple[dict[int, Tensor], Tensor]:
    like = next(iter(seen.values()))
    regions = read_masks(regions, "regions").to(like.device)
    size = tuple(regions.shape[-2:] if pixel_values is None else read_tensor(pixel_values, "pixel_values").shape[-2:])
    expected = ((len(like), *size), (len(like), *regions.shape[1:2], *size))
    H, W = like.shape[-2:]
    if regions.shape not in expected or 0 in regions.shape:
        raise ValueError(
            f"regions of shape {tuple(regions.shape)} for {len(like)} images: expected {expected[0]} or {expected[1]}, over "
            "the pixel values, as `processor.masks_to_regions` makes them."
        )
    # A map has about the aspect of the pixel values, and so must what lies over them; a single place says nothing of it.
    tolerance = math.log((H + 1) * (W + 1) / (H * W))
    if pixel_values is None and H * W > 1 and abs(math.log(size[0] * W / (size[1] * H))) > tolerance:
        raise ValueError(
            f"regions of {size} on {H} x {W} maps do not lie over the pixel values: mend them, or give pixel_values, too."
        )
    regions = regions.view(len(like), -1, *size)
    vanished = torch.zeros(regions[:, :, 0, 0].numel(), len(names), dtype=torch.bool, device=like.device)
    weights = {}
    for index, maps in seen.items():
        weights[index], empty = region_weights(regions, (maps.shape[-2], maps.shape[-1]))
        vanished[:, index] = empty.flatten()
    return weights, vanished


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
