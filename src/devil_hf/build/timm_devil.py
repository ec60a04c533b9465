"""Backbones of timm: their architecture from the description in a checkpoint, and how timm hands out their layers.

A description names an architecture that timm has registered, and arguments of that architecture alone: none of `create_model`'s
own, which open files and repositories, and no text that could be a path. This file travels with such backbones only.
"""

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from devil_hf.model.backbone_devil import BUILDERS, READERS
from devil_hf.model.checkpoint_devil import COMPANIONS
from devil_hf.model.configuration_devil import check_setting
from devil_hf.model.modeling_devil import DevilModel

COMPANIONS.update(dict.fromkeys(("timm", "intermediates"), sys.modules[__name__]))
# What the weights of an architecture decide about its layers; the rest of timm's pretrained_cfg is about preprocessing.
TIMM_OVERLAY = ("input_size", "fixed_input_size", "global_pool")
MOST_WINDOW = 64  # some list all pairs of places in a window one by one, which takes minutes beyond this
# What timm takes for itself, and does not hand on to the architecture.
RESERVED = {
    *inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters,
    "features_only", "feature_cls", "device", "dtype",
}  # fmt: skip


def create_network(
    name: str, kwargs: Mapping[str, Any], weights: str | None = None, pretrained_cfg: dict[str, Any] | None = None
) -> nn.Module:
    """A network of timm's.

    Args:
        name: an architecture, with or without a tag of weights (`resnet50.a1_in1k`).
        kwargs: arguments of the architecture; `pretrained_cfg_overlay` in it holds `TIMM_OVERLAY`.
        weights: a file of this machine with its weights, safetensors or read with `weights_only`; None for random ones.
        pretrained_cfg: what else timm should know of these weights; None for what it has registered.

    Raises:
        ValueError: for an unknown architecture, and for arguments that are not ones of an architecture.
    """
    name, settings = str(name), dict(kwargs)
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"architecture {name!r:.80} is not one that this timm has registered: upgrade timm, or name another.")
    overlay = dict(settings.pop("pretrained_cfg_overlay", None) or {})
    if refused := sorted({*settings} & RESERVED | {*overlay} - {*TIMM_OVERLAY}):
        raise ValueError(f"{refused} are no arguments of the architecture {name!r}: leave them out of its kwargs.")
    settings = {key: check_setting(key, value) for key, value in settings.items()}
    for key in (key for key in settings if "window" in key):
        if wide := [side for side in re.findall(r"\d+", str(settings[key])) if int(side) > MOST_WINDOW]:
            raise ValueError(
                f"{key}={', '.join(wide)!s:.80} is more than {MOST_WINDOW}: no architecture of timm's has such windows."
            )
    overlay = {key: check_setting(key, value) for key, value in overlay.items()} | ({"file": weights} if weights else {})
    return timm.create_model(
        name, pretrained=weights is not None, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay or None, **settings
    )


def build(description: Mapping[str, Any]) -> nn.Module:
    """The architecture of a checkpoint's description, with random weights."""
    return create_network(description["architecture"], description["kwargs"])


def read_intermediates(module: Any, pixel_values: Tensor, readers: list[dict]) -> list[Tensor]:
    """Layers of a timm model, which stops after the deepest of them."""
    indices = sorted({reader["index"] for reader in readers})
    prefix = {"return_prefix_tokens": True} if any(reader["token"] for reader in readers) else {}
    found = module.forward_intermediates(
        pixel_values, indices=indices, intermediates_only=True, norm=False, output_fmt="NCHW", stop_early=True, **prefix
    )
    maps = []
    for reader in readers:
        item = found[indices.index(reader["index"])]
        grid, tokens = item if isinstance(item, tuple) else (item, None)
        maps.append(tokens[:, :1].transpose(1, 2)[..., None] if reader["token"] else grid)
    return maps


BUILDERS["timm"], READERS["intermediates"] = build, read_intermediates

__all__ = ["TIMM_OVERLAY", "DevilModel", "create_network", "read_intermediates"]
