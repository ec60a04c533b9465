"""Directions of a layer's feature space, from wherever they come.

A direction is any vector of a layer's C channels: a row of a classifier's weights, a linear probe, a difference of means, a
principal or non-negative component, the decoder row of a sparse autoencoder. `DevilModel.describe_directions` says what it
looks like (`sweep` at several strengths), `map_directions` where it is, and `UnitReader` makes a unit of it.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from devil_hf.data.arrays import read_array


def read_directions(path: str | PathLike, channels: int, tensor: str | None = None) -> Tensor:
    """Directions (M, C) from a safetensors or npy file.

    Args:
        channels: C of the layer that they belong to. A matrix (C, M) is turned around; a square one is read as (M, C).
        tensor: name of the tensor in a safetensors file, such as `W_dec` or `decoder.weight`; None where only one fits.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another kind of file, an unknown name, several tensors that fit, or shapes that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of directions at {path}")
    if path.suffix == ".npy":
        found = {path.name: torch.from_numpy(read_array(path))}
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as content:
                names = list(content.keys())
                found = {name: content.get_tensor(name) for name in names if tensor in (None, name)}
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or damaged ({error}): fetch it anew") from error
        if tensor is not None and not found:
            raise ValueError(f"{path} holds no tensor {tensor!r}; it holds {names}")
    else:
        raise ValueError(f"{path} is neither .safetensors nor .npy; other formats may hold code and are not read")
    fitting = {name: value for name, value in found.items() if value.ndim == 2 and channels in value.shape}
    if len(fitting) != 1:
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        remedy = "name one of them" if fitting else "choose the layer that they belong to"
        raise ValueError(f"{len(fitting)} tensors of {path} have {channels} channels, among {shapes}: {remedy}")
    (vectors,) = fitting.values()
    vectors = vectors.float()
    return vectors if vectors.shape[1] == channels else vectors.T.contiguous()


def sweep(
    vectors: Tensor,
    strengths: Sequence[float] = (1.0,),
    base: Tensor | None = None,
    both_signs: bool = False,
    length: float | None = None,
) -> tuple[Tensor, list[float]]:
    """Points along directions, for `DevilModel.describe_directions`.

    Args:
        vectors: (M, C) directions.
        strengths: each vector is multiplied by each of these; negative ones turn it around.
        base: (C,) or (M, C) point that the directions start from (a mean feature, say); None for the origin.
        both_signs: take every strength twice, as it is and turned around, from the lowest to the highest.
        length: vectors are brought to this length first (see `typical_length`); None leaves them as they are.

    Returns:
        Points (M * S, C), by vector, then by strength; and the S factors.

    Raises:
        ValueError: without a strength, for a vector of zero that should have a length, and a base of another shape.
    """
    vectors = vectors.float()
    if length is not None:
        norms = vectors.norm(dim=1, keepdim=True)
        if zero := torch.nonzero(norms[:, 0] == 0)[:5, 0].tolist():
            raise ValueError(f"vectors {zero} are zero: they have no direction.")
        vectors = vectors * (length / norms)
    if not strengths:
        raise ValueError("strengths are empty: name at least one factor, such as 1.0.")
    factors = sorted({sign * float(one) for one in strengths for sign in (-1, 1)}) if both_signs else list(strengths)
    points = vectors[:, None] * torch.tensor(factors, device=vectors.device)[:, None]  # (M, S, C)
    if base is not None:
        M, C = vectors.shape
        if base.shape not in ((C,), (1, C), (M, C)):
            raise ValueError(f"base of shape {tuple(base.shape)}: expected ({C},) or ({M}, {C}).")
        points = points + base.to(points).view(-1, 1, C)
    return points.flatten(0, 1), factors


def classifier_directions(module: nn.Module) -> Tensor:
    """Class vectors (classes, C) of a network's linear classifier: timm's `get_classifier()`, or its last linear layer.

    Raises:
        ValueError: if the network has no linear layer.
    """
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    get_classifier: Any = getattr(module, "get_classifier", None)
    own = get_classifier() if get_classifier else None
    head = own if isinstance(own, nn.Linear) else (linear[-1] if linear else None)
    if head is None:
        raise ValueError(f"{type(module).__name__} has no linear classifier: its directions must come from elsewhere")
    return head.weight.detach().clone()


def difference_of_means(features: Tensor, labels: Tensor) -> Tensor:
    """The direction (1, C) from the mean of `features` (n, C) where `labels` (n,) is false to the mean where it is true."""
    labels = labels.bool()
    if not 0 < int(labels.sum()) < len(labels):
        raise ValueError(f"{int(labels.sum())} of {len(labels)} labels are true: a difference needs both kinds")
    return features[labels].mean(dim=0, keepdim=True) - features[~labels].mean(dim=0, keepdim=True)


def principal_directions(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Principal components (count, C) of features (n, C), each as long as one standard deviation along it, and the mean (C,)."""
    if not 1 <= count <= min(features.shape):
        raise ValueError(f"count={count} must be 1 to {min(features.shape)} for features of shape {tuple(features.shape)}")
    mean = features.double().mean(dim=0)
    _, scale, components = torch.linalg.svd(features.double() - mean, full_matrices=False)
    deviation = scale / max(len(features) - 1, 1) ** 0.5
    return (components[:count] * deviation[:count, None]).float(), mean.float()


def typical_length(features: Tensor) -> float:
    """Median length of features (n, C): the `length` at which directions are about as strong as real features."""
    return float(features.float().norm(dim=1).median())


def map_directions(vectors: Tensor, feature_map: Tensor, base: Tensor | None = None) -> Tensor:
    """Where directions are: the component of a layer's features along each of them, at every location.

    Args:
        vectors: (M, C) directions of the layer.
        feature_map: (B, C, H, W), the layer's of what `DevilModel.extract_features` returned.
        base: (C,) point that features are measured from (their mean, say); None for the origin.

    Returns:
        (B, M, H, W), in units of the layer's features, each direction taken at length one.

    Raises:
        ValueError: for directions or a base of another layer.
    """
    C = feature_map.shape[1]
    if vectors.ndim != 2 or vectors.shape[1] != C or (base is not None and base.numel() != C):
        raise ValueError(
            f"vectors of shape {tuple(vectors.shape)}: a map of {C} channels needs (directions, {C}), a base ({C},)."
        )
    units = nn.functional.normalize(vectors.to(feature_map.device).float(), dim=1)
    maps = torch.einsum("bchw,mc->bmhw", feature_map.float(), units)
    return maps if base is None else maps - (units @ base.to(units).flatten())[:, None, None]
