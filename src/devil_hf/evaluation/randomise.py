"""Random weights in place of learned ones: the backbone from the top down, or the translator (Adebayo et al., NeurIPS 2018).

A backbone's stages follow from what its layers depend on: the stage of a layer is every parameter that changes its feature
map and that of no shallower layer, found by differentiation, so any network will do. Each parameter tensor is drawn anew from
the normal distribution of its own mean and standard deviation: everything learned beyond these two numbers is gone, and
activations keep their scale. Statistics of batch norms describe the old weights; in a randomised stage they are estimated anew
on images of the evaluation. Everything is put back afterwards.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from devil_hf.model.backbone_devil import FeatureBackbone
from devil_hf.model.modeling_devil import DevilModel

Stage = tuple[int, list[str]]


def weight_stages(backbone: FeatureBackbone, pixel_values: Tensor) -> list[Stage]:
    """Index of each layer that adds weights, and the names of the parameters that it adds, shallowest first.

    Parameters that no layer depends on (a classifier) are in no stage.

    Args:
        pixel_values: (B, 3, H, W), one image is enough.
    """
    parameters = dict(backbone.named_parameters())
    backbone.requires_grad_(True)
    try:
        stages, known = [], set()
        for index in range(len(backbone.layers)):
            with torch.enable_grad():
                output = backbone(pixel_values[:1], [index])[index]
                used = torch.autograd.grad(output.float().sum(), list(parameters.values()), allow_unused=True)
            names = [name for name, gradient in zip(parameters, used, strict=True) if gradient is not None]
            added = [name for name in names if name not in known]
            known.update(added)
            if added:
                stages.append((index, added))
    finally:
        backbone.requires_grad_(False)
    return stages


@contextmanager
def randomised_backbone(model: DevilModel, stages: Sequence[Stage], batches: Sequence[Tensor], seed: int = 0) -> Iterator[None]:
    """The model with the parameters of `stages` drawn anew.

    Args:
        stages: of `weight_stages`.
        batches: pixel values (B, 3, H, W) of images that statistics of batch norms are estimated on, two images or more.
        seed: a tensor's draw depends on it and on the tensor's name alone.
    """
    backbone = model.backbone
    intact = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    names = [name for _, added in stages for name in added]
    try:
        _draw_anew(backbone, names, seed)
        _estimate_statistics(backbone, names, batches)
        yield
    finally:
        backbone.load_state_dict(intact)


@torch.no_grad()
def _draw_anew(backbone: FeatureBackbone, names: Sequence[str], seed: int) -> None:
    for name in names:
        tensor = backbone.get_parameter(name)
        generator = torch.Generator().manual_seed((seed << 32) ^ crc32(name.encode()))
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        old = tensor.float()
        tensor.copy_(old.mean() + old.std(correction=0) * drawn)


@torch.no_grad()
def _estimate_statistics(backbone: FeatureBackbone, names: Sequence[str], batches: Sequence[Tensor]) -> None:
    changed = {name.rpartition(".")[0] for name in names}
    norms = [
        module
        for name, module in backbone.named_modules()
        if name in changed and isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
        norm.training = True
    try:
        for pixel_values in batches:
            backbone(pixel_values)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.training = False


@contextmanager
def untrained_translator(model: DevilModel, seed: int = 0) -> Iterator[None]:
    """The model with a translator of the same shape that has learned nothing."""
    trained = model.translator
    model.translator = copy.deepcopy(trained)
    parts: list[Any] = [*model.translator.modules(), *model.translator.parameters()]
    for part in parts:
        part._is_hf_initialized = False  # what was loaded would be left as it is
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.translator.reset_parameters()
        yield
    finally:
        model.translator = trained
