"""A backbone from a timm or transformers id, a local directory, or an already built module.

Each way ends in the whole network and a JSON-serialisable description from which the travelling code makes the same
architecture again, on any device (transformers builds models on the meta device before it loads their weights).
"""

import difflib
import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, logging

from devil_hf.build.hooks_devil import first_tensor, run
from devil_hf.build.layers import choose_layers, offered_layers, probe_images, stage_module
from devil_hf.build.preprocessing import data_config_of
from devil_hf.build.slim_devil import is_timm_name, load_network, source_folder
from devil_hf.build.timm_devil import TIMM_OVERLAY
from devil_hf.model.backbone_devil import FeatureBackbone, build_module
from devil_hf.model.checkpoint_devil import weights_hash
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.text_files import read_json

logger = logging.get_logger(f"transformers.{__name__}")


def backbone_from_source(
    backbone: str | PathLike | nn.Module,
    layers: str | int | Sequence[str | int] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    class_tokens: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
) -> FeatureBackbone:
    """A pretrained backbone with its weights.

    Args:
        backbone: a timm name (`resnet50.a1_in1k`), a Hub id or local directory of timm or transformers, or an
            already built module, which is then frozen and used as it is.
        layers: names or indices of the layers offered, or names of any submodules; `NAME:class` for class tokens.
            None takes the last layer of each of the (at most four) deepest stages, or four evenly spaced blocks.
        revision: branch, tag or commit of a Hub repository.
        token: access token for private Hub repositories.
        class_tokens: also take the class token of each chosen layer that has one.
        backbone_kwargs: further arguments of the architecture (`img_size`, `pad_type`; for transformers, fields of
            its configuration); `data_config` in it overrides the preprocessing, and `tokens_around` says how many tokens that
            are no patches stand in front of the grid and behind it, where a probe does not find out.

    Raises:
        OSError: if the source cannot be loaded.
        ValueError: if a layer is unknown or no feature map, or a given module cannot be rebuilt from its config.
    """
    kwargs = dict(backbone_kwargs or {})
    data_config = kwargs.pop("data_config", {})
    around = kwargs.pop("tokens_around", None)
    if around is not None and (
        not isinstance(around, list | tuple) or [type(n) for n in around] != [int, int] or min(around) < 0
    ):
        raise ValueError(f"tokens_around={around!r} must be two numbers of tokens, in front of the grid and behind it.")
    if isinstance(backbone, nn.Module):
        module, config = backbone, describe_module(backbone, kwargs)
    else:
        module, config = load_source(backbone, kwargs, revision, token)
    config["data_config"] |= data_config
    config["input_size"] = list(config["data_config"]["input_size"])
    module.eval()
    with torch.no_grad():
        probed = config | {"tokens_around": around}
        offered = offered_layers(module, probed)
        chosen = choose_layers(module, probed, offered, layers, class_tokens)
    if stages := [layer["reader"]["stage"] for layer in chosen if layer["reader"]["by"] == "stages"]:
        module = stage_module(module, stages)
        config["model_config"] = json.loads(module.config.to_json_string(use_diff=False))
    config["layer_names"] = [layer["name"] for layer in offered]
    config["layers"] = [layer["name"] for layer in chosen]
    config["channels"] = [layer["channels"] for layer in chosen]
    config["readers"] = [layer["reader"] for layer in chosen]
    on_meta = any(tensor.is_meta for tensor in module.state_dict().values())
    config["sha256"] = None if on_meta else weights_hash(module)
    return FeatureBackbone(module, config)


def select_layers(backbone: FeatureBackbone, layers: str | int | Sequence[str | int]) -> FeatureBackbone:
    """The same network, read at some of its chosen layers only."""
    positions = resolve_layers(layers, backbone.layers)
    chosen = {name: [backbone.config[name][at] for at in positions] for name in ("layers", "channels", "readers")}
    return FeatureBackbone(backbone.module, backbone.config | chosen)


def load_source(
    source: str | PathLike, kwargs: dict[str, Any], revision: str | None = None, token: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The pretrained network of a timm or transformers id or local directory, with its description.

    Args:
        source: `resnet50.a1_in1k`, a Hub id (`timm/resnet50.a1_in1k`, `facebook/dinov2-small`, also with `hf-hub:` in
            front), or a directory written by `timm.models.save_for_hf` or by `save_pretrained` of transformers.
        kwargs: further arguments of the architecture; for transformers, changes of its configuration.
        revision: branch, tag or commit of a Hub repository.
        token: access token for private Hub repositories.

    Raises:
        OSError: if there is no such source, or it cannot be reached.
        ValueError: if its `config.json` cannot be read.
    """
    name = os.fspath(source).removeprefix("local-dir:")
    if name.startswith("hf-hub:"):
        name, _, pinned = name.removeprefix("hf-hub:").partition("@")
        revision = revision or pinned or None
    if is_timm_name(name):
        return _load_timm_name(name, {"num_classes": 0} | kwargs, revision, token)
    folder = _existing_folder(name, revision, token)
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / 'config.json'} describes no network: it holds no JSON object")
    timms = "architecture" in settings
    if timms:
        kwargs = {"num_classes": 0} | settings.get("model_args", {}) | kwargs
    found = {"kind": "timm", "architecture": settings["architecture"]} if timms else {"kind": "transformers"}
    module: Any = load_network(found | {"kwargs": kwargs}, folder)
    if timms:
        description = _timm_description(module, kwargs)
    else:
        description = _transformers_description(module, kwargs) | {"data_config": _processor_data_config(folder, module)}
    local = os.path.isdir(name)
    place = os.path.abspath(name) if local else name
    return module, description | {"source": place, "revision": None if local else folder.name}


def _existing_folder(name: str, revision: str | None, token: str | None) -> Path:
    """The local directory of a source, which must have a configuration."""
    try:
        folder = Path(source_folder(name, revision, token=token))
    except Exception as error:
        close = difflib.get_close_matches(name.rsplit("/")[-1].split(".")[0], timm.list_models(), n=3)
        raise OSError(
            f"backbone {name!r} is neither a timm architecture{f' (similar: {close})' if close else ''}, a local "
            f"directory nor a Hub repository within reach ({type(error).__name__}); pass as `backbone=` where it lies"
        ) from error
    if not (folder / "config.json").is_file():
        raise OSError(f"backbone {name!r} has no config.json; give a directory written by timm or transformers")
    return folder


def _load_timm_name(
    name: str, kwargs: dict[str, Any], revision: str | None, token: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # the architecture has no such tag
        cfg = None
    if cfg is None or not cfg.hf_hub_id:
        known = timm.list_pretrained(f"{name.split('.')[0]}*")[:8]
        raise OSError(
            f"timm has no weights {name!r} on the Hub (it has {known}); for others pass the module "
            f"itself, `timm.create_model({name.split('.')[0]!r}, num_classes=0)`"
        )
    commit = os.path.basename(_existing_folder(cfg.hf_hub_id, revision, token))
    module: Any = load_network({"kind": "timm", "kwargs": kwargs}, name, commit, token=token)
    full_name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else name
    return module, _timm_description(module, kwargs) | {"source": full_name, "revision": commit}


def describe_module(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Description of an already built module: timm's, transformers', or the user's own.

    Raises:
        ValueError: if the architecture cannot be built again as it is from what is known.
    """
    architecture = (getattr(module, "pretrained_cfg", None) or {}).get("architecture")
    origin = {"source": None, "revision": None}
    # Not the pruned networks of `features_only=True`, whose weights have other names.
    if architecture and timm.is_model(architecture) and hasattr(module, "forward_features"):
        classes = {"num_classes": module.num_classes} if hasattr(module, "num_classes") else {}
        # timm keeps the arguments of `create_model` on the model (since 1.0.31).
        kwargs = dict(getattr(module, "_model_args", {})) | classes | kwargs
        description = _timm_description(module, kwargs)
    elif isinstance(module, PreTrainedModel) and type(module).__module__.startswith("transformers."):
        description = _transformers_description(module, kwargs)
    else:
        return {"kind": "custom", "kwargs": _as_json(kwargs), "data_config": _default_data_config(module)} | origin
    _check_rebuild(module, description)
    return description | origin


def _timm_description(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    cfg = module.pretrained_cfg
    kwargs = {name: value for name, value in kwargs.items() if name != "pretrained_cfg_overlay"}
    overlay = {key: cfg[key] for key in TIMM_OVERLAY if cfg.get(key) is not None}
    data_config = {key: list(v) if isinstance(v, tuple) else v for key, v in resolve_model_data_config(module).items()}
    size = kwargs.get("img_size")
    if size is not None:
        data_config["input_size"] = [3, *(size if isinstance(size, list | tuple) else (size, size))]
    return {
        "kind": "timm",
        "architecture": cfg["architecture"],
        "kwargs": _as_json(kwargs | {"pretrained_cfg_overlay": overlay}),
        "data_config": data_config,
    }


def _as_json(kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(kwargs))
    except TypeError as error:
        raise ValueError(f"backbone_kwargs {kwargs} cannot be written to a configuration: {error}") from error


def _transformers_description(module: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "transformers",
        "model_class": f"{type(module).__module__}.{type(module).__qualname__}",
        "model_config": json.loads(module.config.to_json_string(use_diff=False)),
        "kwargs": _as_json(kwargs),
        "data_config": _default_data_config(module),
    }


def _default_data_config(module: nn.Module) -> dict[str, Any]:
    size = getattr(getattr(module, "config", None), "image_size", None) or 224
    size = list(size.values()) if isinstance(size, dict) else list(size) if isinstance(size, list | tuple) else [size] * 2
    return {
        "input_size": [3, *size],
        "interpolation": "bicubic",
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "crop_pct": 0.875,
        "crop_mode": "center",
    }


def _processor_data_config(folder: Path, module: nn.Module) -> dict[str, Any]:
    """The image processor saved beside a transformers model, in timm's terms; a ValueError where its file cannot be read."""
    default = _default_data_config(module)
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
        if (file := folder / name).is_file():
            settings = read_json(file)
            if name == PROCESSOR_NAME and isinstance(settings, dict):
                settings = settings.get("image_processor")
            if name == PROCESSOR_NAME and settings is None:
                continue  # of the text alone
            try:
                return data_config_of(settings, default)
            except ValueError as error:
                remedy = "mend it, or take the file away and give data_config"
                raise ValueError(f"the image processor in {file}: {error}; {remedy}") from error
    logger.warning(f"{folder} has no image processor; images will be normalised as ImageNet's")
    return default


def _check_rebuild(module: nn.Module, description: dict[str, Any]) -> None:
    """Make sure that a checkpoint would compute the same features as the given module."""
    weights = module.state_dict()
    on_meta = any(tensor.is_meta for tensor in weights.values())
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
            rebuilt = build_module(description).eval()
    except Exception as error:
        raise ValueError(_rebuild_message(description, f"building it raises {error!r}")) from error
    shapes, expected = ({k: v.shape for k, v in state.items()} for state in (rebuilt.state_dict(), weights))
    wrong = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
    if wrong:
        raise ValueError(_rebuild_message(description, f"{len(wrong)} weights differ in name or shape, such as {wrong[0]!r}"))
    if on_meta:
        return
    reference = next(module.parameters())
    rebuilt.load_state_dict(weights)
    rebuilt.to(device=reference.device, dtype=reference.dtype)
    images = probe_images(description, 1, module)
    before = module.training
    with torch.no_grad():
        found, wanted = (_last_features(network.eval(), images) for network in (rebuilt, module))
    module.train(before)
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item()):
        raise ValueError(_rebuild_message(description, "its features differ"))


def _rebuild_message(description: dict[str, Any], found: str) -> str:
    name = description.get("architecture") or description["model_class"]
    return (
        f"the given module is not what {name!r} with {description['kwargs']} builds: {found}; pass the arguments that "
        "it was created with as backbone_kwargs, such as backbone_kwargs={'pad_type': 'same'}"
    )


def _last_features(module: nn.Module, images: Tensor) -> Tensor:
    """What the network says about images, as much of it as every kind of network has."""
    if hasattr(module, "forward_features"):
        return cast(Tensor, first_tensor(module.forward_features(images)))
    return cast(Tensor, first_tensor(run(module, images)))
