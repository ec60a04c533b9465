"""Slim checkpoints: the frozen parts come from where they were first loaded, at the recorded revision, verified by a hash.

Every source, of a backbone or a language model, becomes one folder by `source_folder`, and networks are made from what lies there
by descriptions that were checked. This file travels with slim checkpoints only, so that the code of self-contained ones has
nothing that fetches weights.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from devil_hf.model.backbone_devil import build_module
from devil_hf.model.checkpoint_devil import COMPANIONS, building_within, companion, weights_hash
from devil_hf.model.configuration_devil import DevilConfig, config_class_of, settings_of
from devil_hf.model.modeling_devil import DevilModel

COMPANIONS["slim"] = sys.modules[__name__]
QUANTISED = ("quantization_config", "compression_config")
WEIGHTS = (".safetensors", ".bin")
# Of what a repository of timm's says of its weights: not where they lie.
TIMM_FACTS = (
    "architecture", "classifier", "crop_mode", "crop_pct", "first_conv", "fixed_input_size", "input_size", "interpolation",
    "label_offset", "mean", "num_classes", "pool_size", "std", "tag", "test_crop_mode", "test_crop_pct", "test_input_size",
)  # fmt: skip


def frozen_weights(path: Any, config: Any, backbone: Any, language_model: Any, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the frozen parts of a slim checkpoint from their sources, verified, by their names in the whole model.

    Args:
        path: directory or Hub id of the checkpoint, `config` its configuration.
        backbone, language_model: see `DevilModel.from_pretrained`.
        hub: download options; `revision` and `subfolder` are those of the checkpoint alone.

    Raises:
        OSError: when a source is not there.
        ValueError: when a source holds other weights than those of the hash, or a checkpoint of the Hub names a folder.
    """
    download = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    source = dict(config.language_model_source)
    named = [part["source"] for part, other in ((config.backbone_config, backbone), (source, language_model)) if other is None]
    if folders := [] if os.path.isdir(path) else [place for place in named if os.path.isdir(str(place))]:
        raise ValueError(f"{path} names {folders} of this machine as sources: a checkpoint of the Hub names repositories.")
    vision = source_state_dict(config.backbone_config, backbone, **download)
    if language_model is not None:
        source |= {"source": str(language_model), "revision": None}
    model, _ = load_language_model(source["source"], source.get("revision"), **download)
    found = weights_hash(model)
    if found != source["sha256"]:
        raise ValueError(
            f"the weights of the language model {source['source']!r} have sha256 {found}, but this checkpoint was trained "
            f"with {source['sha256']}: load the revision {source.get('revision')}, or name the right one with language_model=..."
        )
    if config.lora is not None:
        # The hash is one of the weights without adapters; with them, the same weights have longer names.
        companion("lora").add_lora(model, config.lora)
    weights = {f"backbone.{name}": tensor for name, tensor in vision.items()}
    return weights | {f"language_model.{name}": tensor for name, tensor in model.state_dict().items()}


def check_sources(without: Sequence[str]) -> None:
    """A ValueError when parts have no source: a slim checkpoint needs one of each."""
    if without:
        why = f"a slim checkpoint needs a source of the {without[0]}, but it was given as a module"
        raise ValueError(f"{why}: build the model from an id or a directory, or save with slim=False.")


def load_language_model(
    source: str, revision: str | None = None, attn_implementation: str | None = None, **download: Any
) -> tuple[PreTrainedModel, str | None]:
    """The language model of an id or directory, in fp32, and the commit that it came from (None for a directory).

    Raises:
        OSError: with the remedy, where it cannot be loaded.
        ValueError: where its weights are quantised, or not all there.
    """
    try:
        folder = source_folder(source, revision, **download)
        options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with building_within(_bytes_of_weights(folder)):
            config = read_config(folder)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **options
            )
        model, info = loaded
        _check_loaded(source, model, info)
    except ValueError:
        raise
    except Exception as error:
        raise OSError(
            f"the language model {source!r} (revision {revision}) could not be loaded: "
            f"name another place of the same weights with language_model=... ({error})"
        ) from error
    return model, None if os.path.isdir(source) else os.path.basename(folder)


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
        download: see `source_folder`.

    Raises:
        OSError: if there is no such source, or it cannot be reached.
    """
    name, kwargs = os.fspath(source), dict(description.get("kwargs") or {})
    try:
        if is_timm := is_timm_name(name):
            repository = timm.models.get_pretrained_cfg(name, allow_unregistered=False).hf_hub_id
            if not repository:
                raise ValueError("timm has no repository of it on the Hub")
            folder = source_folder(repository, revision, **download)
        else:
            folder = source_folder(name, revision, **download)
        with building_within(_bytes_of_weights(folder)):
            if "readers" in description:  # of a checkpoint: what it asks for is counted before any memory is taken
                with torch.device("meta"):
                    build_module(dict(description))
            if description["kind"] == "timm":
                return _timm_network(name if is_timm else description["architecture"], kwargs, folder, registered=is_timm)
            return _transformers_network(description, read_config(folder, kwargs), folder)
    except Exception as error:
        raise OSError(
            f"the weights of backbone {name!r} cannot be loaded ({error}); pass as `backbone=` where they lie"
        ) from error


def _timm_network(architecture: str, kwargs: Mapping[str, Any], folder: str, registered: bool) -> nn.Module:
    """A network of timm's with the weights in a folder; what its config.json says of them, where timm has not registered it."""
    files = sorted(name for name in os.listdir(folder) if name.endswith(WEIGHTS))
    files.sort(key=lambda name: (not name.endswith(".safetensors"), name != "model.safetensors"))
    if not files:
        raise OSError(f"{folder} has no weights ({' or '.join(WEIGHTS)})")
    facts = None
    if not registered:
        settings = DevilConfig.get_config_dict(folder)[0]
        facts = {key: value for key, value in settings.get("pretrained_cfg", settings).items() if key in TIMM_FACTS}
    return companion("timm").create_network(architecture, kwargs, os.path.join(folder, files[0]), facts)


def _transformers_network(description: Mapping[str, Any], config: PreTrainedConfig, folder: str) -> nn.Module:
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        if "model_config" in description:
            config.out_features = description["model_config"]["out_features"]
        kind = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        return kind.from_pretrained(folder, config=config, dtype=torch.float32)
    module = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
    return module.get_encoder(modality="image") if hasattr(config, "vision_config") else module


def read_config(folder: str | PathLike, changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The configuration of a network of transformers in a folder, with changes: the fields that its class declares, checked.

    Raises:
        ValueError: for settings that are none, and for weights that are quantised: they are not the numbers of a network.
    """
    settings = DevilConfig.get_config_dict(folder)[0] | dict(changes or {})
    if any(settings.get(name) for name in QUANTISED) or (kinds := _strange_types(folder)):
        found = next((name for name in QUANTISED if settings.get(name)), None) or ", ".join(kinds)
        raise ValueError(f"{folder} holds quantised weights ({found}): load the network yourself, and pass the module.")
    config_class = config_class_of(settings.get("model_type"))
    return config_class(**settings_of(config_class, settings))


def _strange_types(folder: str | PathLike) -> list[str]:
    """Names and types of weights that are no floating-point numbers of 16, 32 or 64 bits."""
    found = []
    for file in (name for name in os.listdir(folder) if name.endswith(".safetensors")):
        with safe_open(os.path.join(folder, file), "pt") as tensors:
            types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        floats = ("BF16", "F16", "F32", "F64")
        strange = {name: kind for name, kind in types.items() if kind[0] == "F" or name.endswith("weight")}
        found += [f"{kind} in {name}" for name, kind in strange.items() if kind not in floats]
    return sorted(found)[:3]


def _check_loaded(source: str, model: nn.Module, info: Mapping[str, Any]) -> None:
    """A ValueError where weights of a model are missing, or others lie beside them, such as scales of quantised ones."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} weights of a language model, {missing[0]} among them.")
    held = {name.rpartition(".")[0] for name in model.state_dict()}
    if beside := sorted(name for name in info["unexpected_keys"] if name.rpartition(".")[0] in held):
        raise ValueError(f"{source} holds {beside[0]} beside the weights: load the language model yourself, and pass the module.")


def _bytes_of_weights(folder: str) -> int:
    """How much the files of weights in a folder hold: no fewer bytes than weights."""
    return sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder) if name.endswith(WEIGHTS))


def is_timm_name(source: str) -> bool:
    """Whether a source is an architecture of timm's, with or without a tag of weights."""
    return not os.path.isdir(source) and "/" not in source and timm.is_model(source.split(".")[0])


def source_folder(source: str, revision: str | None = None, **download: Any) -> str:
    """The local directory of a source; a Hub repository is downloaded, pickled weights only where there are no others.

    Args:
        download: `token`, `cache_dir`, `local_files_only`, `force_download`, for Hub repositories.
    """
    if os.path.isdir(source):
        return source
    download.pop("proxies", None)  # huggingface_hub has them from the environment
    wanted = {"revision": revision, "ignore_patterns": ["*/*", "adapter*"]} | download
    try:
        folder = snapshot_download(source, allow_patterns=["*.json", "*.safetensors"], **wanted)
    except HFValidationError as error:
        raise OSError(f"{source!r:.200} is neither a directory nor the id of a repository") from error
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        folder = snapshot_download(source, allow_patterns=["*.json", "*.bin"], **wanted)
    return folder


__all__ = [
    "DevilModel",
    "frozen_weights",
    "is_timm_name",
    "load_language_model",
    "load_network",
    "read_config",
    "source_folder",
    "source_state_dict",
]
