"""Whether an image is like those that a checkpoint was trained on, told by a cheap statistic of its features.

Four numbers of each layer: mean and spread over the channels of the pooled feature, spread over the places, and size of the
feature vectors. The distance of an image is Mahalanobis's, divided by the root of their number: how many standard deviations its
numbers lie from those of training images, correlations taken out. `config.scope_statistics` holds what that needs, and the
distance within which 99 of 100 training images lie; `devil` says a word, once, where an image is beyond it.

That catches what looks different to the network: rendered scenes, flat colours and noise by a photographs' checkpoint,
photographs by that of the shapes world. It does not catch photographs of things that nobody trained on: their features are
much like any others.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from devil_hf.model.modeling_devil import DevilModel

SHARE = 0.99  # of the training images, whose distance counts as near
RIDGE = 1e-3  # of each variance, against numbers that nothing but noise tells apart


def image_statistics(feature_maps: Sequence[Tensor]) -> Tensor:
    """Numbers (B, 4 * L) of the feature maps (B, C_l, H_l, W_l) of L layers."""
    numbers = []
    for maps in feature_maps:
        places = maps.float().flatten(2)  # (B, C, places)
        pooled = places.mean(dim=2)
        spread = places.std(dim=2, correction=0).mean(dim=1)
        numbers += [pooled.mean(dim=1), pooled.std(dim=1, correction=0), spread, places.norm(dim=1).mean(dim=1)]
    return torch.stack(numbers, dim=1)


@torch.no_grad()
def measure_scope(model: DevilModel, batches: Iterable[Tensor]) -> dict[str, Any]:
    """What `config.scope_statistics` holds, from pixel values (B, 3, H, W) of some hundred training images.

    Returns:
        `mean` (4 * L numbers) and the rows of `whitening` (a lower triangle) as texts, and `most`, the distance within which 99
        of 100 of these images lie.
    """
    read = [image_statistics(cast(list[Tensor], model.extract_features(pixel_values))).cpu() for pixel_values in batches]
    numbers = torch.cat(read).double()
    variance = numbers.var(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    covariance = torch.cov(numbers.T) + torch.diag(RIDGE * variance)
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance))
    most = _distances(numbers, numbers.mean(dim=0), whitening).quantile(SHARE)
    return {
        "mean": _text(numbers.mean(dim=0)),
        "whitening": [_text(row[: at + 1]) for at, row in enumerate(whitening)],
        "most": round(float(most), 3),
    }


def _text(row: Tensor) -> str:
    return " ".join(f"{value:.8g}" for value in row.tolist())


def _distances(numbers: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    return ((numbers - mean) @ whitening.T).square().mean(dim=1).sqrt()


def distances(model: DevilModel, feature_maps: Sequence[Tensor]) -> Tensor | None:
    """How far images are from the training images, (B,) in standard deviations; None where the checkpoint does not say.

    Raises:
        ValueError: for statistics that are not those of the checkpoint's layers.
    """
    known = model.config.scope_statistics
    if known is None:
        return None
    numbers = image_statistics(feature_maps).double().cpu()
    try:
        mean, *rows = ([float(number) for number in row.split()] for row in (known["mean"], *known["whitening"]))
        whitening = torch.tensor([row + [0.0] * (len(mean) - len(row)) for row in rows], dtype=torch.float64)
        return _distances(numbers, torch.tensor(mean, dtype=torch.float64), whitening)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        layers = len(model.layer_names)
        raise ValueError(
            f"scope_statistics of this checkpoint do not fit its {layers} layers ({error}): set them to None"
        ) from error


def out_of_scope(model: DevilModel, feature_maps: Sequence[Tensor], names: Sequence[str]) -> str | None:
    """A sentence for a user whose images (by name) are unlike those of the training, None for images that are like them."""
    found = distances(model, feature_maps)
    if found is None:
        return None
    most = float(model.config.scope_statistics["most"])
    far = [(distance, name) for name, distance in zip(names, found.tolist(), strict=True) if not distance <= most]
    if not far:
        return None
    distance, name = max(far)
    count = f"{len(far)} of {len(names)} images are" if len(names) > 1 else f"{name} is"
    worst = f" ({name} the farthest)" if len(names) > 1 else ""
    return (
        f"{count} unlike the images of the training: features {distance:.1f} standard deviations away{worst}, where 99 of 100 "
        f"training images are within {most:.1f}. {model.config.scope or ''}".rstrip()
    )


__all__ = ["distances", "image_statistics", "measure_scope", "out_of_scope"]
