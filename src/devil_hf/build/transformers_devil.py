"""Backbones of transformers: their architecture from the description in a checkpoint, and how they hand out their stages.

A description names a class of transformers' own model files, and fields that its configuration declares: none that name code,
files or repositories. This file travels with such backbones only.
"""

import importlib
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from devil_hf.build.hooks_devil import read_output
from devil_hf.model.backbone_devil import BUILDERS, READERS
from devil_hf.model.checkpoint_devil import COMPANIONS
from devil_hf.model.configuration_devil import settings_of
from devil_hf.model.modeling_devil import DevilModel

COMPANIONS.update(dict.fromkeys(("transformers", "stages"), sys.modules[__name__]))
MODULE = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
MOST_PLACES = 48  # along an image's side, for what lists pairs of places one by one


def model_class_of(name: str) -> type[PreTrainedModel]:
    """The class of this full name; a ValueError for anything but a model of transformers' own that wraps no other library."""
    module, _, own_name = str(name).rpartition(".")
    found: Any = None
    if MODULE.fullmatch(module):
        found = getattr(transformers, own_name, None)  # by its own name first: modules of transformers move
        if found is None:
            with suppress(ImportError):
                found = getattr(importlib.import_module(module), own_name, None)
    # What was found is judged, not what was asked for: the module in the name need not be the one that it comes from.
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel) and MODULE.fullmatch(found.__module__)
    if not is_model or "timm" in found.__module__ or "timm" in getattr(found.config_class, "model_type", "timm"):
        raise ValueError(f"backbone class {name!r:.80} is not one of transformers; pass the module itself as `backbone=`")
    return found


def build(description: Mapping[str, Any]) -> nn.Module:
    """The architecture of a checkpoint's description, with random weights."""
    model_class: Any = model_class_of(description["model_class"])
    config_class = model_class.config_class
    config = config_class(**settings_of(config_class, description["model_config"]))
    if config.model_type == "levit" and not config.image_size <= MOST_PLACES * config.patch_size:
        raise ValueError(
            f"image_size={config.image_size!r:.20} is more than a LeViT has: it would list all pairs of its patches."
        )
    return model_class(config)


def read_stages(module: Any, pixel_values: Tensor, readers: list[dict]) -> list[Tensor]:
    """Stages of a transformers backbone, class tokens from its hidden states."""
    wants_token = any(reader["token"] for reader in readers)
    output = module(pixel_values, output_hidden_states=True) if wants_token else module(pixel_values)
    maps = []
    for reader in readers:
        names, found = module.out_features, output.feature_maps
        if reader["token"]:
            names, found = module.stage_names, output.hidden_states
        maps.append(read_output(found[names.index(reader["stage"])], reader, pixel_values))
    return maps


BUILDERS["transformers"], READERS["stages"] = build, read_stages

__all__ = ["DevilModel", "model_class_of", "read_stages"]
