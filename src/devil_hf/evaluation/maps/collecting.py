"""Maps of many images and phrases, kept on disk: the part of `devil evaluate maps` that runs the model.

Per image one file holds the masks in the crop and every map on its own grid; a line of the record names it and holds the
phrases, their prior under the null prefix, and the curves of insertion and deletion. `scores.py` reads both and never asks
the model, so that a new measure costs no inference.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from devil_hf.data.decoding import BadImage, read_picture
from devil_hf.data.objects import LocalisedImage
from devil_hf.evaluation.maps.combining import combine_maps, layer_evidence, map_combinations
from devil_hf.evaluation.maps.gradcam import ClassMapper
from devil_hf.evaluation.maps.measures import centre_prior, tile_crops
from devil_hf.folders import written
from devil_hf.model.explaining_devil import INFORMED
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.model.processing_devil import DevilProcessor

logger = logging.get_logger(f"transformers.{__name__}")

DEFAULT_COMBINATION = "informed"  # points better than "mean" in the shapes world; on photographs not told apart
CENTRE, RANDOM, GRADCAM = "centre prior", "random", "Grad-CAM"
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # of the locations that insertion shows and deletion hides
TILES = (2, 3, 4)  # images on one board of the multi-object game


class Unusable(ValueError):
    """An image that cannot be mapped; the message says why."""


@dataclass(frozen=True)
class MapSettings:
    """What decides the maps.

    Args:
        layers: names or indices; None for all.
        carrier: neutral word read before every phrase, and not scored; None for none.
        joint: also ask all the layers together at every place, which costs as much again as the finest layer.
        seed: of the random order of deletion.
        windows: layer name -> side of the square pooled around each of its places; 1 for layers left out.
    """

    layers: tuple[str | int, ...] | None = None
    carrier: str | None = None
    joint: bool = True
    seed: int = 0
    windows: Mapping[str, int] = field(default_factory=dict)


@torch.no_grad()
def map_image(
    model: DevilModel,
    processor: DevilProcessor,
    example: LocalisedImage,
    folder: Path,
    settings: MapSettings,
    classes: ClassMapper | None = None,
) -> dict[str, Any]:
    """Map every phrase of an image that is visible in the crop.

    Args:
        folder: gets the arrays, in `maps/`.
        classes: Grad-CAM of the backbone's classifier, where wanted.

    Returns:
        The row of the record: see `_map_one`, with the `file` of the arrays and the `groups` of the phrases; without phrases,
        and with a `problem`, for an image that cannot be read, or whose masks cannot be drawn.
    """
    try:
        pixels, masks = _read(processor, example)
    except Unusable as error:
        return {"phrases": [], "groups": {}, "problem": str(error)}
    own = {phrase: mask for phrase, mask in masks.items() if mask.any()}
    row: dict[str, Any] = {"phrases": []}
    if own:
        names = asked_layers(model, settings)
        row = _map_one(model, processor, pixels, own, names, settings, example.key, classes)
        row |= _write(folder / "maps" / f"{_digest(example.key)}.npz", row.pop("arrays"))
    return row | {"groups": {phrase: example.groups[phrase] for phrase in row["phrases"]}}


@torch.no_grad()
def map_board(
    model: DevilModel, processor: DevilProcessor, board: "Board", folder: Path, settings: MapSettings
) -> dict[str, Any]:
    """Map a phrase of each image of a board; the row of the record has no phrases where one of them is not visible.

    It has a `problem`, and no phrases, where an image cannot be used; see `map_image`.
    """
    try:
        row = _map_board(model, processor, board.members, board.phrases, asked_layers(model, settings), settings)
    except Unusable as error:
        return {"board": len(board.members), "phrases": [], "problem": str(error)}
    if row:
        row |= _write(folder / "maps" / f"{board.key}.npz", row.pop("arrays"))
        row["groups"] = {p: one.groups[p] for one, p in zip(board.members, board.phrases, strict=True)}
    return {"board": len(board.members), "phrases": []} | row


def asked_layers(model: DevilModel, settings: MapSettings) -> list[str]:
    """The names of the layers that are mapped."""
    asked = resolve_layers(list(settings.layers) if settings.layers else None, model.layer_names)
    return [model.layer_names[index] for index in asked]


def decisions(model: DevilModel, settings: MapSettings, classes: ClassMapper | None) -> dict[str, Any]:
    """What decides the rows beside the weights and the data."""
    decides: dict[str, Any] = {
        "layers": asked_layers(model, settings),
        "carrier": settings.carrier,
        "joint": settings.joint,
        "informed": INFORMED,
        "seed": settings.seed,
        "random_orders": "by image",
        "gradcam": _digest(*(", ".join(one) for one in classes.names)) if classes else False,
    }
    return decides | ({"windows": dict(settings.windows)} if settings.windows else {})


def _read(processor: DevilProcessor, example: LocalisedImage) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Pixel values (1, 3, H, W) and the masks of the phrases in the same crop, (H, W) bool.

    Masks go the way of the image, and not maps the way back: nothing outside the crop was seen, every image then weighs the
    same number of pixels, and maps are enlarged once, as the paper does.

    Raises:
        Unusable: and a warning, for an image that cannot be read, and masks that cannot be drawn.
    """
    try:
        image = read_picture(example.read)
        masks = example.draw((image.height, image.width))
    except (OSError, ValueError) as error:
        what = "broken image" if isinstance(error, BadImage) else "broken region"
        problem = f"{what} ({' '.join(str(error).split()):.300})"
        logger.warning(f"{example.key} is left out: {problem}")
        raise Unusable(problem) from error
    names = [name for name in masks if name in example.groups]
    regions = processor.masks_to_regions([np.stack([masks[name] for name in names])])[0] >= 0.5
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    return pixels, {name: mask.numpy() for name, mask in zip(names, regions, strict=True)}


def _map_one(
    model, processor, pixels, masks, names, settings: MapSettings, key: str, classes: ClassMapper | None = None
) -> dict[str, Any]:
    """Maps, prior and curves of one image's phrases; `arrays` go to a file of their own.

    Returns:
        `phrases`; `tokens` and `null` (nats, summed over the tokens) per phrase; `whole`, evidence of the phrase for the whole
        image; `insertion` and `deletion`, order -> per phrase, evidence at each of `SHARES`; `classified`, the phrases with
        a Grad-CAM; `arrays`: masks (K, H, W) and `map:NAME` (K, rows, columns) in evidence.
    """
    phrases = list(masks)
    text = processor(text=phrases, carrier=settings.carrier, return_tensors="pt")
    features = model.extract_features(pixels, resolve_layers(names, model.layer_names))
    maps = _layer_and_combined_maps(model, features, text, names, settings)
    if settings.joint:
        joint = model.attribute(phrases=text, feature_maps=features, layers=names, combine="joint", window=settings.windows or 1)
        maps["joint"] = joint.maps["joint"].cpu()
    whole = model.score(feature_maps=features, layers=names, **text)
    scored = text.get("scored_mask", text["attention_mask"])
    arrays = {f"map:{name}": one[0].float().numpy() for name, one in maps.items()}
    orders = {DEFAULT_COMBINATION: maps[DEFAULT_COMBINATION][0]}
    grid = orders[DEFAULT_COMBINATION].shape[-2:]
    orders[CENTRE] = torch.tensor(centre_prior((grid[0], grid[1]))).float().expand(len(phrases), -1, -1)
    generator = torch.Generator().manual_seed((settings.seed << 32) ^ crc32(key.encode()))  # each image has orders of its own
    orders[RANDOM] = torch.rand(len(phrases), *grid, generator=generator)
    curves = location_curves(model, features, names, text, orders)
    row = {
        "phrases": phrases,
        "tokens": scored.sum(dim=1).tolist(),
        "null": whole.null_log_probs.tolist(),
        "whole": whole.evidence[0].tolist(),
        **curves,
    }
    if classes:
        found = classes.maps(pixels, phrases)
        row["classified"] = list(found)
        if found:
            arrays[f"map:{GRADCAM}"] = np.stack([found[phrase] for phrase in found])
    return row | {"arrays": arrays | {"masks": np.stack(list(masks.values()))}}


def _layer_and_combined_maps(model, features, text, names, settings: MapSettings) -> dict[str, Tensor]:
    """The map of every layer, and each of their `map_combinations`, (1, K, rows, columns) on the CPU."""
    found = model.attribute(phrases=text, feature_maps=features, layers=names, window=settings.windows or 1)
    layers = {name: one.cpu() for name, one in found.maps.items()}
    weighed = layer_evidence(model, features, text, names).cpu()
    return layers | {rule: combine_maps(layers, rule, weighed) for rule in map_combinations()}


def location_curves(
    model: DevilModel,
    features: Sequence[Tensor | None],
    names: Sequence[str],
    text: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
) -> dict[str, dict[str, list[list[float]]]]:
    """Evidence for each phrase while locations are shown, or hidden, in the order of its map; one batched call per phrase.

    A share of the locations of every layer, those with the highest values first, keeps its location weight (insertion) or loses
    it (deletion); the layers are read together. Source: Petsiuk et al., RISE, 2018, on locations instead of pixels.

    Args:
        features: of one image.
        orders: name -> (K, rows, columns) maps; coarser layers are ordered by the mean of the map in their cells.

    Returns:
        "insertion" and "deletion": name of the order -> per phrase, evidence (nats per token) at each of `SHARES`.
    """
    asked = resolve_layers(list(names), model.layer_names)
    phrases = next(iter(orders.values())).shape[0]
    shown: dict[int, Tensor] = {}  # (orders, K, steps, rows, columns)
    for index in asked:
        rows, columns = features[index].shape[-2:]  # type: ignore[union-attr]
        values = torch.stack([F.adaptive_avg_pool2d(one, (int(rows), int(columns))) for one in orders.values()])
        shown[index] = shown_weights(values.flatten(0, 1)).unflatten(0, (len(orders), phrases))
    found = []
    for at in range(phrases):
        weights = [shown[index][:, at].flatten(0, 1) if index in shown else None for index in range(len(model.layer_names))]
        own = {name: rows[at : at + 1] for name, rows in text.items()}
        evidence = model.score(feature_maps=features, location_weights=weights, layers=list(names), **own).evidence
        found.append(evidence.view(len(orders), -1).cpu())
    curves = torch.stack(found, dim=1)  # (orders, K, steps)
    half = len(SHARES)
    return {
        "insertion": {name: curve[:, :half].tolist() for name, curve in zip(orders, curves, strict=True)},
        "deletion": {name: curve[:, half:].tolist() for name, curve in zip(orders, curves, strict=True)},
    }


def shown_weights(values: Tensor) -> Tensor:
    """Location weights (N, 2 * shares, rows, columns) of maps (N, rows, columns): the best shares shown, then hidden.

    At least one location is shown.
    """
    rows, columns = values.shape[-2:]
    rank = values.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)[:, None]  # (N, 1, cells)
    counts = (torch.tensor(SHARES) * rows * columns).round().clamp(1, max(rows * columns - 1, 1))[:, None]
    shown = torch.cat([rank < counts, rank >= counts], dim=1).float()
    if rows * columns == 1:
        shown = torch.ones_like(shown)
    return (shown / shown.sum(dim=2, keepdim=True)).unflatten(2, (rows, columns))


@dataclass(frozen=True)
class Board:
    """Several images as one picture, each with a phrase that no other image of the board has."""

    key: str
    members: list[LocalisedImage]
    phrases: list[str]


def draw_boards(examples: Sequence[LocalisedImage], count: int, seed: int) -> list[Board]:
    """`count` boards for each number of images, drawn by the seed."""
    boards = []
    for size in TILES:
        generator = np.random.default_rng((seed, size))
        made: set[tuple[int, ...]] = set()
        for _ in range(20 * count):
            if len(made) == count or len(examples) < size:
                break
            members = [int(one) for one in generator.choice(len(examples), size, replace=False)]
            phrases = []
            pick = np.random.default_rng((seed, *members))  # the same board has the same phrases under any limit
            for one in members:
                others = frozenset().union(*(examples[other].present for other in members if other != one))
                own = sorted(set(examples[one].groups) - others)
                phrases.append(own[int(pick.integers(len(own)))] if own else "")
            if all(phrases) and tuple(members) not in made:
                of = _digest(*(examples[one].key for one in members), *phrases)
                boards.append(Board(f"board-{size}-{of}", [examples[one] for one in members], phrases))
                made.add(tuple(members))
    return boards


def _map_board(model, processor, members, phrases, names, settings: MapSettings) -> dict[str, Any]:
    """Layer and combined maps of a board: each phrase's mask lies in its own quarter."""
    crops, masks = zip(*(_read(processor, one) for one in members), strict=True)
    own = [one[phrase] for one, phrase in zip(masks, phrases, strict=True)]
    placed = np.stack(
        [tile_crops(np.stack([m if i == j else np.zeros_like(m) for j, m in enumerate(own)])) for i in range(len(own))]
    )
    placed = placed >= 0.5
    if not placed.any(axis=(1, 2)).all():
        return {}
    board = torch.tensor(tile_crops(torch.cat(crops).numpy()), dtype=torch.float32)[None]
    text = processor(text=list(phrases), carrier=settings.carrier, return_tensors="pt")
    features = model.extract_features(board, resolve_layers(names, model.layer_names))
    maps = _layer_and_combined_maps(model, features, text, names, settings)
    arrays = {f"map:{name}": one[0].float().numpy() for name, one in maps.items()} | {"masks": placed}
    return {"phrases": list(phrases), "arrays": arrays}


def _digest(*texts: str) -> str:
    """A file name of texts: positions change when images are added."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:20]


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed: dict[str, Any] = {name: np.packbits(one) if one.dtype == bool else one for name, one in arrays.items()}
    with written(path) as unfinished:
        np.savez_compressed(unfinished, mask_shape=np.array(arrays["masks"].shape), **packed)
    return {"file": path.name}


def read_arrays(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The masks (K, H, W) and the maps by name of the file of an image or board."""
    with np.load(path) as content:
        shape = tuple(int(edge) for edge in content["mask_shape"])
        masks = np.unpackbits(content["masks"], count=int(np.prod(shape))).reshape(shape).astype(bool)
        return masks, {name.removeprefix("map:"): content[name] for name in content.files if name.startswith("map:")}


__all__ = [
    "CENTRE",
    "DEFAULT_COMBINATION",
    "GRADCAM",
    "RANDOM",
    "SHARES",
    "MapSettings",
    "draw_boards",
    "location_curves",
    "map_board",
    "map_image",
    "read_arrays",
    "shown_weights",
]
