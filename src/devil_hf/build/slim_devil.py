"""Slim checkpoints: the frozen parts come from where they were first loaded, at the recorded revision, verified by a hash.

This file travels with slim checkpoints only, so that the code of self-contained ones has nothing that fetches weights.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from os import PathLike
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from devil_hf.model.checkpoint_devil import COMPANIONS, companion
from devil_hf.model.modeling_devil import DevilModel

WEIGHTS_FILE = "model.safetensors"
COMPANIONS["slim"] = sys.modules[__name__]


def slim_state_dict(path: Any, config: Any, backbone: Any, language_model: Any, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every weight of a slim checkpoint: what was trained from its own file, the rest from its sources.

    Args:
        path: directory or Hub id of the checkpoint, `config` its configuration.
        backbone, language_model: see `DevilModel.from_pretrained`.
        hub: download options; `revision` and `subfolder` are those of the checkpoint alone.

    Raises:
        OSError: when the checkpoint has no weights, or a source is not there.
        ValueError: when a source holds other weights than those of the hash.
    """
    download = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    frozen = _frozen_weights(config, backbone, language_model, **download)
    file = cached_file(path, WEIGHTS_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        raise OSError(f"{path} has no {WEIGHTS_FILE}: a slim checkpoint keeps its translator there.")
    # Trained weights come last: those of fresh adapters give way to them.
    return frozen | load_file(file)


def _frozen_weights(config, backbone, language_model, **download) -> dict[str, Tensor]:
    """Weights of the frozen parts from their sources, verified, by their names in the whole model."""
    vision = source_state_dict(config.backbone_config, backbone, **download)
    source = dict(config.language_model_source)
    if language_model is not None:
        source |= {"source": str(language_model), "revision": None}
    model = load_language_model(source, **download)
    found = weights_hash(model)
    if found != source["sha256"]:
        raise ValueError(
            f"the weights of the language model {source['source']!r} have sha256 {found}, but this checkpoint was trained "
            f"with {source['sha256']}: load the revision {source.get('revision')}, or name the right one with language_model=..."
        )
    if config.lora is not None:
        # The hash is one of the weights without adapters; with them, the same weights have longer names.
        companion("lora").add_lora(model, config.lora)
    named = {f"backbone.{name}": tensor for name, tensor in vision.items()}
    return named | {f"language_model.{name}": tensor for name, tensor in model.state_dict().items()}


def load_language_model(source: Mapping, **kwargs) -> PreTrainedModel:
    """The language model of `{"source", "revision"}`, in fp32; an OSError that names the remedy where it cannot be loaded."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            source["source"], revision=source.get("revision") or "main", dtype=torch.float32, **kwargs
        )
    except OSError as error:
        raise OSError(
            f"the language model {source['source']!r} (revision {source.get('revision')}) could not be loaded: "
            f"name another place of the same weights with language_model=... ({error})"
        ) from error


def source_state_dict(
    config: Mapping[str, Any], backbone_override: str | PathLike | nn.Module | None = None, **download: Any
) -> dict[str, Tensor]:
    """Weights of a backbone from where they were first loaded, named as in `FeatureBackbone.state_dict()`.

    Args:
        config: `FeatureBackbone.config`.
        backbone_override: where the weights lie now, if not at `config["source"]`; or the module itself.
        download: see `load_network`.

    Raises:
        OSError: if the source cannot be loaded.
        ValueError: if no source is recorded, or if its weights are not those that the hash was taken of.
    """
    module: Any = backbone_override
    if not isinstance(module, nn.Module):
        source = module or config["source"]
        if source is None:
            raise ValueError("the backbone was given as a module, so no source of its weights is known; pass `backbone=...`")
        module = load_network(config, source, None if module else config["revision"], **download)
    found = weights_hash(module)
    if found != config["sha256"]:
        raise ValueError(
            f"the weights of backbone {backbone_override or config['source']!s:.80} have SHA-256 {found}, "
            f"but the checkpoint was made with {config['sha256']}; pass the original weights as `backbone=`"
        )
    return {f"module.{name}": tensor for name, tensor in module.state_dict().items()}


def load_network(
    description: Mapping[str, Any], source: str | PathLike, revision: str | None = None, **download: Any
) -> nn.Module:
    """The network of a description with the pretrained weights of a source.

    Args:
        description: `kind`, `kwargs` and, for transformers, the recorded `model_config`, as in `FeatureBackbone.config`.
        source: a name of timm's (`resnet50.a1_in1k`), a Hub id (`timm/resnet50.a1_in1k`, `facebook/dinov2-small`), or a
            directory written by `timm.models.save_for_hf` or by `save_pretrained` of transformers.
        revision: branch, tag or commit of a Hub repository.
        download: `token`, `cache_dir`, `local_files_only`, `force_download` for Hub repositories.

    Raises:
        OSError: if there is no such source, or it cannot be reached.
    """
    name, kwargs = os.fspath(source), dict(description.get("kwargs") or {})
    try:
        if description["kind"] == "timm" and is_timm_name(name):
            overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
            repository = timm.models.get_pretrained_cfg(name, allow_unregistered=False).hf_hub_id
            if revision and repository:
                overlay["hf_hub_id"] = f"{repository}@{revision}"
            cache = download.get("cache_dir")
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay or None, cache_dir=cache, **kwargs)
        folder = source_folder(name, revision, **download)
        if description["kind"] == "timm":
            return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)
        config = AutoConfig.from_pretrained(folder, **kwargs)
        if type(config) in MODEL_FOR_BACKBONE_MAPPING:
            if "model_config" in description:
                config.out_features = description["model_config"]["out_features"]
            kind = MODEL_FOR_BACKBONE_MAPPING[type(config)]
            return kind.from_pretrained(folder, config=config, dtype=torch.float32)
        module = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
        return module.get_encoder(modality="image") if hasattr(config, "vision_config") else module
    except Exception as error:
        raise OSError(
            f"the weights of backbone {name!r} cannot be loaded ({error}); pass as `backbone=` where they lie"
        ) from error


def is_timm_name(source: str) -> bool:
    """Whether a source is an architecture of timm's, with or without a tag of weights."""
    return not os.path.isdir(source) and "/" not in source and timm.is_model(source.split(".")[0])


def source_folder(source: str, revision: str | None, **download: Any) -> str:
    """The local directory of a source; a Hub repository is downloaded, pickled weights only where there are no others."""
    if os.path.isdir(source):
        return source
    folder = snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"], **download)
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        folder = snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.bin"], **download)
    return folder


def weights_hash(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every persistent tensor, sorted by name."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


__all__ = [
    "DevilModel",
    "is_timm_name",
    "load_language_model",
    "load_network",
    "source_folder",
    "source_state_dict",
    "weights_hash",
]
