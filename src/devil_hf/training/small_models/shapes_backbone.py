"""The backbone of the embedded world: a narrow ResNet of timm that names the attributes of objects.

It names them where they are, from `layer2` on, and for the whole picture after mean pooling. Shape is asked for from `layer3` on
only, so that it emerges with depth as in large networks. Pairs and triples of attributes are asked for too: without them a pooled
feature tells that red and stripes are there, but not that the red thing is striped. Deep cells see most of the picture and, left
alone, tell of objects that are not there; activity on cells without any object has a price, so that a map of a layer means its
places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import nn

from devil_hf.data.rendering import SCENE_SIZE, SceneObject
from devil_hf.data.shapes import ATTRIBUTE_WORDS, Scene, sample_scene
from devil_hf.settings import option
from devil_hf.training.small_models.optimisation import OptimisationSettings, minimise, state_of

BACKBONE_ARCHITECTURE = "resnet10t"
BACKBONE_ARGUMENTS: dict[str, Any] = {"stem_width": 12, "channels": [32, 64, 128, 256], "layers": [1, 1, 2, 1], "num_classes": 0}
PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
BACKBONE_DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, SCENE_SIZE, SCENE_SIZE),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": PIXEL_MEAN,
    "std": PIXEL_STD,
    "num_classes": 0,
    "pool_size": (4, 4),
    "first_conv": "conv1.0",
    "classifier": "fc",
    "license": "apache-2.0",
}
DENSE_GRID = 16  # cells per side of layer2; deeper layers have halves of it


@dataclass
class ShapesBackboneSettings(OptimisationSettings):
    """How the backbone of the embedded world is trained, on scenes that are each seen once."""

    learning_rate: float = option("peak learning rate of AdamW, cosine decay to zero", 3e-3)
    quiet_weight: float = option("price of activity on cells of layer3 and layer4 that no object touches", 0.1)
    bf16: bool = option("compute in bfloat16 by autocast; the weights stay in float32", True)


class AttributeLabels:
    """Numbers attribute words, their pairs, their triples: 18 + 104 + 192 labels of which an object has 3 + 3 + 1."""

    def __init__(self):
        self.words = list(ATTRIBUTE_WORDS.values())
        self.subsets = [subset for size in (1, 2, 3) for subset in combinations(range(len(self.words)), size)]
        sizes = [prod(len(self.words[axis]) for axis in subset) for subset in self.subsets]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.singles, self.pairs, self.count = int(self.starts[3]), int(self.starts[6]), int(self.starts[-1])

    def of(self, item: SceneObject) -> list[int]:
        """The labels of one object."""
        places = [words.index(value) for words, value in zip(self.words, item.attributes.values(), strict=True)]
        return [int(start) + self._rank(subset, places) for start, subset in zip(self.starts[:-1], self.subsets, strict=True)]

    def _rank(self, subset: tuple[int, ...], places: Sequence[int]) -> int:
        rank = 0
        for axis in subset:
            rank = rank * len(self.words[axis]) + places[axis]
        return rank


def build_shapes_backbone() -> ResNet:
    """Build the untrained backbone; its preprocessing is in `pretrained_cfg`."""
    backbone: Any = timm.create_model(BACKBONE_ARCHITECTURE, pretrained_cfg=BACKBONE_DATA_CONFIG, **BACKBONE_ARGUMENTS)
    return backbone


def scene_pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """The normalised pictures (B, 3, 128, 128) in float32, as the backbone's evaluation preprocessing gives them."""
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (pixels - mean) / std


def scene_targets(scenes: Sequence[Scene], labels: AttributeLabels) -> torch.Tensor:
    """How much of each cell of the finest grid shows an object with each label: (B, labels, 16, 16), 0 to 1."""
    step = SCENE_SIZE // DENSE_GRID
    shares = np.zeros((len(scenes), labels.count, DENSE_GRID, DENSE_GRID), dtype=np.float32)
    for row, scene in enumerate(scenes):
        cells = scene.masks.reshape(-1, DENSE_GRID, step, DENSE_GRID, step).mean((2, 4))
        for item, share in zip(scene.objects, cells, strict=True):
            shares[row, labels.of(item)] += share
    return torch.from_numpy(shares)


class AttributeHeads(nn.Module):
    """Linear readers of the feature maps of layer2, layer3 and layer4, and of layer4's mean; only used in training."""

    def __init__(self, channels: Sequence[int], labels: AttributeLabels):
        super().__init__()
        early = labels.singles - len(ATTRIBUTE_WORDS["shape"])
        self.dense = nn.ModuleList(
            nn.Conv2d(width, size, 1) for width, size in zip(channels, (early, labels.pairs, labels.count), strict=True)
        )
        self.whole = nn.Linear(channels[-1], labels.count)
        for head in (*self.dense, self.whole):
            nn.init.constant_(head.bias, -4.0)  # labels are rare: from 0 the first hundred steps would only learn that

    def forward(self, features: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, summed over labels, for three maps (B, C_l, H_l, W_l) and `shares` (B, 314, 16, 16)."""
        loss = features[0].new_zeros(())
        for head, feature, full in zip(self.dense, features, (0.5, 0.4, 0.25), strict=True):
            target = F.adaptive_avg_pool2d(shares[:, : head.out_channels], (feature.shape[-2], feature.shape[-1]))
            # A cell counts in full once an object fills the share `full` of it: objects are smaller than deep cells.
            target = (target / full).clamp(max=1.0)
            cells = F.binary_cross_entropy_with_logits(head(feature).float(), target, reduction="none")
            loss = loss + cells.sum(1).mean()
        present = (shares.amax((2, 3)) > 0).float()
        whole = self.whole(features[-1].mean((2, 3))).float()
        return loss + F.binary_cross_entropy_with_logits(whole, present, reduction="none").sum(1).mean()


def stray_activity(features: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
    """Activity on cells that no object touches: summed over channels and maps (B, C_l, H_l, W_l), mean over such cells."""
    covered = shares.amax(1, keepdim=True)  # (B, 1, 16, 16)
    total = features[0].new_zeros((), dtype=torch.float32)
    for feature in features:
        empty = (F.adaptive_max_pool2d(covered, (feature.shape[-2], feature.shape[-1])) == 0).float()
        total = total + (feature.float().abs() * empty).sum() / empty.sum().clamp(min=1)
    return total


def train_shapes_backbone(
    settings: ShapesBackboneSettings, device: str | torch.device = "cpu", unfinished: Path | None = None
) -> tuple[ResNet, list[dict[str, float]]]:
    """Train the backbone on scenes that are made as they are needed.

    Args:
        unfinished: file in which a stopped training goes on; the caller removes it in the end.

    Returns:
        The backbone in eval mode, and the history of `minimise`, in nats per scene.

    Raises:
        Diverged: when the loss or the weights are no longer finite.
    """
    torch.manual_seed(settings.seed)
    labels = AttributeLabels()
    backbone = build_shapes_backbone().to(torch.device(device)).to(memory_format=torch.channels_last)
    heads = AttributeHeads(BACKBONE_ARGUMENTS["channels"][1:], labels).to(device)
    rng = np.random.default_rng((settings.seed, 1))

    def loss_of_step(step: int) -> torch.Tensor:
        scenes = [sample_scene(rng) for _ in range(settings.batch_size)]
        pixels = scene_pixels(scenes).to(device, memory_format=torch.channels_last)
        features: Any = backbone.forward_intermediates(pixels, indices=[2, 3, 4], intermediates_only=True)
        shares = scene_targets(scenes, labels).to(device)
        return heads(features, shares) + settings.quiet_weight * stray_activity(features[1:], shares)

    state = state_of(unfinished, settings, rng) if unfinished else None
    history = minimise(nn.ModuleList([backbone, heads]), loss_of_step, settings, unfinished=state)
    return backbone.to(memory_format=torch.contiguous_format), history


@torch.inference_mode()
def pooled_features(backbone: ResNet, scenes: Sequence[Scene], batch_size: int = 64) -> dict[str, torch.Tensor]:
    """Mean-pooled features (scenes, C_l) of `layer1` to `layer4`, by layer."""
    parts = []
    for start in range(0, len(scenes), batch_size):
        pixels = scene_pixels(scenes[start : start + batch_size])
        maps: Any = backbone.forward_intermediates(pixels, indices=[1, 2, 3, 4], intermediates_only=True)
        parts.append([feature.mean((2, 3)) for feature in maps])
    return {f"layer{depth}": torch.cat(part) for depth, part in enumerate(zip(*parts, strict=True), 1)}


def probe_shapes_backbone(
    backbone: ResNet, train_scenes: int = 4000, test_scenes: int = 1000, seed: int = 99
) -> dict[str, dict[str, float]]:
    """Ask linear probes which attribute words a scene's mean-pooled features tell.

    Returns:
        Micro F1 on held-out scenes, by layer and attribute.
    """
    rng = np.random.default_rng(seed)
    labels = AttributeLabels()
    scenes = [sample_scene(rng) for _ in range(train_scenes + test_scenes)]
    present = torch.zeros(len(scenes), labels.singles, dtype=torch.bool)
    for row, scene in enumerate(scenes):
        present[row, [label for item in scene.objects for label in labels.of(item)[: len(ATTRIBUTE_WORDS)]]] = True
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features = pooled_features(backbone, scenes)
        return {layer: _probe(feature, present, train_scenes, labels) for layer, feature in features.items()}


def _probe(features: torch.Tensor, present: torch.Tensor, train: int, labels: AttributeLabels) -> dict[str, float]:
    mean, std = features[:train].mean(0), features[:train].std(0) + 1e-6
    inputs = ((features - mean) / std).clone()
    probe = nn.Linear(inputs.shape[1], present.shape[1])
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = 1e-5 * probe.weight.square().sum()
        loss = F.binary_cross_entropy_with_logits(probe(inputs[:train]), present[:train].float()) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    guess, truth = probe(inputs[train:]) > 0, present[train:]
    scores = {}
    for attribute, start, stop in zip(ATTRIBUTE_WORDS, labels.starts[:3], labels.starts[1:4], strict=True):
        hits = (guess & truth)[:, start:stop].sum()
        scores[attribute] = float(2 * hits / (guess[:, start:stop].sum() + truth[:, start:stop].sum()))
    return scores


__all__ = [
    "AttributeLabels",
    "ShapesBackboneSettings",
    "build_shapes_backbone",
    "pooled_features",
    "probe_shapes_backbone",
    "scene_pixels",
    "scene_targets",
    "train_shapes_backbone",
]
