"""Units whose concept is known: linear read-outs of the attributes of the shapes world, planted as channels.

For each attribute word (a colour, a texture, a shape) a linear probe is fitted on the feature map of a layer: which locations
lie on an object of that word? Its weights are a direction of the layer's feature space, and the read-out of the map a unit
that is known to look for the word. How well it does so, and how well natural channels happen to, is measured as the area
under the ROC curve over locations of held-out scenes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from devil_hf.data.shapes import ATTRIBUTE_WORDS, make_scene
from devil_hf.model.backbone_devil import FeatureBackbone
from devil_hf.model.image_processing_devil import DevilImageProcessor

CONCEPTS = tuple(word for words in ATTRIBUTE_WORDS.values() for word in words)
# A location is on an object when the object covers this share of its cell, and off it below the other.
ON, OFF = 0.5, 0.05


@torch.no_grad()
def concept_locations(
    backbone: FeatureBackbone,
    processor: DevilImageProcessor,
    layer: str,
    scenes: range,
    world: int,
    batch_size: int = 50,
) -> tuple[Tensor, Tensor]:
    """Features of locations and the words that are true of them.

    Args:
        scenes: indices of the scenes of `world` to look at.

    Returns:
        (n, C) features, and (n, 18) with 1 where the object at the location has the word of `CONCEPTS`, 0 where nothing
        there has it; locations on the edge of an object are left out.
    """
    features, truths = [], []
    for begin in range(scenes.start, scenes.stop, batch_size):
        batch = [make_scene(world, index) for index in range(begin, min(begin + batch_size, scenes.stop))]
        pixel_values = processor(images=[Image.fromarray(s.image) for s in batch], return_tensors="pt")["pixel_values"]
        (maps,) = [one for one in backbone(pixel_values, [backbone.layers.index(layer)]) if one is not None]
        for scene, feature_map in zip(batch, maps, strict=True):
            masks = torch.from_numpy(scene.masks).float()
            cover = F.interpolate(masks[None], feature_map.shape[1:], mode="area")[0].flatten(1)  # (objects, H * W)
            truth = torch.zeros(len(CONCEPTS), cover.shape[1])
            for item, covered in zip(scene.objects, cover, strict=True):
                for word in item.attributes.values():
                    truth[CONCEPTS.index(word), covered >= ON] = 1.0
            clear = ((cover >= ON) | (cover <= OFF)).all(dim=0)
            features.append(feature_map.flatten(1).T[clear])
            truths.append(truth.T[clear])
    return torch.cat(features), torch.cat(truths)


def fit_probes(features: Tensor, truths: Tensor, ridge: float = 1.0) -> tuple[Tensor, Tensor]:
    """Linear probes by ridge regression on standardised features.

    Args:
        features: (n, C).
        truths: (n, M), 0 or 1. Each probe weighs its ones and its zeros equally.
        ridge: strength of the penalty, in variances of a feature.

    Returns:
        Directions (M, C) and biases (M,): `features @ directions.T + biases` estimates the truths.
    """
    mean, deviation = features.mean(dim=0).double(), features.std(dim=0).double().clamp_min(1e-6)
    inputs = torch.cat([(features.double() - mean) / deviation, torch.ones(len(features), 1, dtype=torch.double)], dim=1)
    penalty = ridge * torch.eye(inputs.shape[1], dtype=torch.double)
    penalty[-1, -1] = 0
    directions, biases = [], []
    for truth in truths.double().T:
        share = truth.mean().clamp(1e-6, 1 - 1e-6)
        weights = torch.where(truth > 0, 0.5 / share, 0.5 / (1 - share))[:, None]
        gram = inputs.T @ (inputs * weights) + penalty * len(inputs) * 1e-3
        solution = torch.linalg.solve(gram, inputs.T @ (truth[:, None] * weights))[:, 0]
        scaled = solution[:-1] / deviation
        directions.append(scaled)
        biases.append(solution[-1] - scaled @ mean)
    return torch.stack(directions).float(), torch.stack(biases).float()


def selectivity(activations: Tensor, truths: Tensor) -> Tensor:
    """Area under the ROC curve of each unit for each concept.

    Args:
        activations: (n, U).
        truths: (n, M), 0 or 1.

    Returns:
        (U, M): the probability that a unit is higher at a location of the concept than at another one; ties count half.
    """
    ranks = torch.from_numpy(np.stack([_mean_ranks(column) for column in activations.T.numpy()]))  # (U, n)
    positive = truths.double().sum(dim=0)
    negative = len(truths) - positive
    return ((ranks @ truths.double() - positive * (positive + 1) / 2) / (positive * negative)).float()


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + 1 + last) / 2)[where]


def planted_probes(
    backbone: FeatureBackbone,
    processor: DevilImageProcessor,
    layers: Sequence[str],
    scenes: int = 400,
    world: int = 7,
    least_selectivity: float = 0.9,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[str]]]:
    """Directions, biases and their words by layer, for `UnitReader`.

    Only probes whose selectivity among the objects of other scenes is at least `least_selectivity` are planted: a layer that
    cannot tell a star from a cross holds no unit for stars, even where it tells both from the background.
    """
    directions, biases, concepts = {}, {}, {}
    for layer in layers:
        vectors, offsets = fit_probes(*concept_locations(backbone, processor, layer, range(scenes), world))
        features, truths = concept_locations(backbone, processor, layer, range(scenes, scenes + scenes // 4), world)
        objects = truths.any(dim=1)
        area = selectivity((features @ vectors.T + offsets)[objects], truths[objects]).diagonal()
        kept = torch.nonzero(area >= least_selectivity)[:, 0]
        directions[layer], biases[layer] = vectors[kept], offsets[kept]
        concepts[layer] = [CONCEPTS[at] for at in kept.tolist()]
    return directions, biases, concepts
