"""Where a backbone comes from: a timm or transformers id, a local directory, or an already built module.

Each way ends in the whole network and a JSON-serialisable description from which `build_module` makes the same
architecture again, on any device (transformers builds models on the meta device before it loads their weights).
"""

import difflib
import importlib
import itertools
import json
import os
from os import PathLike
from pathlib import Path
from typing import Any, cast

import timm
import torch
import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor, nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from .layouts_devil import first_tensor, run

logger = logging.get_logger(f"transformers.{__name__}")

PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# What the weights of an architecture decide about its layers; the rest of timm's pretrained_cfg is about preprocessing.
TIMM_OVERLAY = ("input_size", "fixed_input_size", "global_pool")


def load_source(
    source: str | PathLike,
    kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
    model_config: dict[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The pretrained network of a timm or transformers id or local directory, with its description.

    Args:
        source: `resnet50.a1_in1k`, a Hub id (`timm/resnet50.a1_in1k`, `facebook/dinov2-small`, also with `hf-hub:` in
            front), or a directory written by `timm.models.save_for_hf` or by `save_pretrained` of transformers.
        kwargs: further arguments of the architecture; for transformers, changes of its configuration.
        revision: branch, tag or commit of a Hub repository.
        token: access token for private Hub repositories.
        model_config: for transformers, the recorded configuration, in place of the source's own.

    Raises:
        OSError: if there is no such source, or it cannot be reached.
    """
    name = os.fspath(source).removeprefix("local-dir:")
    if name.startswith("hf-hub:"):
        name, _, pinned = name.removeprefix("hf-hub:").partition("@")
        revision = revision or pinned or None
    kwargs = dict(kwargs or {})
    if not os.path.isdir(name) and timm.is_model(name.split(".")[0]) and "/" not in name:
        return _load_timm_name(name, kwargs, revision)
    folder, commit = _folder(name, revision, token)
    source = os.path.abspath(folder) if commit is None else name
    if not (folder / "config.json").is_file():
        raise OSError(f"backbone {source!r} has no config.json; give a directory written by timm or transformers")
    settings = json.loads((folder / "config.json").read_text())
    if "architecture" in settings:
        module, description = _load_timm_folder(folder, settings, kwargs)
    else:
        module, description = _load_transformers(folder, kwargs, model_config)
    return module, description | {"source": source, "revision": commit}


def _folder(name: str, revision: str | None, token: str | None) -> tuple[Path, str | None]:
    """The local directory of a source, and the commit if it is a Hub repository."""
    if os.path.isdir(name):
        return Path(name), None
    try:
        patterns = ["*.json", "*.safetensors"]
        folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=["*.json", "*.bin"]))
    except Exception as error:
        close = difflib.get_close_matches(name.rsplit("/")[-1].split(".")[0], timm.list_models(), n=3)
        raise OSError(
            f"backbone {name!r} is neither a timm architecture{f' (similar: {close})' if close else ''}, a local "
            f"directory nor a Hub repository within reach ({type(error).__name__}); pass as `backbone=` where it lies"
        ) from error
    return folder, folder.name


def _load_timm_name(name: str, kwargs: dict[str, Any], revision: str | None) -> tuple[nn.Module, dict[str, Any]]:
    try:
        cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # the architecture has no such tag
        cfg = None
    if cfg is None or not cfg.has_weights:
        known = timm.list_pretrained(f"{name.split('.')[0]}*")[:8]
        raise OSError(
            f"timm has no weights {name!r} (it has {known}); for a network without pretrained weights pass the module "
            f"itself, `timm.create_model({name.split('.')[0]!r}, num_classes=0)`"
        )
    settings = {"num_classes": 0} | kwargs
    overlay = dict(settings.pop("pretrained_cfg_overlay", None) or {})
    if revision and cfg.hf_hub_id:
        overlay["hf_hub_id"] = f"{cfg.hf_hub_id}@{revision}"
    try:
        module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay or None, **settings)
    except Exception as error:
        raise OSError(
            f"the weights of backbone {name!r} cannot be loaded ({error}); pass as `backbone=` where they lie"
        ) from error
    full_name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else name
    return module, _timm_description(module, settings) | {
        "source": full_name,
        "revision": _cached_commit(cfg, revision),
    }


def _cached_commit(cfg, revision: str | None) -> str | None:
    """The commit from which timm took the weights, read off the Hub's cache."""
    names = [cfg.hf_hub_filename, "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"]
    for name in filter(None, names if cfg.hf_hub_id else []):
        path = try_to_load_from_cache(cfg.hf_hub_id, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _load_timm_folder(
    folder: Path, settings: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    kwargs = {"num_classes": 0} | settings.get("model_args", {}) | kwargs
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    module = timm.create_model(f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    return module, _timm_description(module, kwargs)


def _timm_description(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    cfg = module.pretrained_cfg
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


def _load_transformers(
    folder: Path, kwargs: dict[str, Any], model_config: dict[str, Any] | None
) -> tuple[nn.Module, dict[str, Any]]:
    config = AutoConfig.from_pretrained(folder, **kwargs)
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        if model_config is not None:
            config.out_features = model_config["out_features"]
        module = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(folder, config=config, dtype=torch.float32)
    else:
        module = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
        if hasattr(config, "vision_config"):
            module = module.get_encoder(modality="image")
    return module, _transformers_description(module, kwargs) | {"data_config": _processor_data_config(folder, module)}


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
    size = (
        list(size.values()) if isinstance(size, dict) else list(size) if isinstance(size, list | tuple) else [size] * 2
    )
    return {
        "input_size": [3, *size],
        "interpolation": "bicubic",
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "crop_pct": 0.875,
        "crop_mode": "center",
    }


def _processor_data_config(folder: Path, module: nn.Module) -> dict[str, Any]:
    """The image processor saved beside a transformers model, in timm's terms."""
    try:
        settings = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    except OSError:
        logger.warning(f"{folder} has no image processor; images will be normalised as ImageNet's")
        return _default_data_config(module)
    found = _default_data_config(module)
    if settings.get("do_normalize", True):
        found |= {"mean": settings.get("image_mean", found["mean"]), "std": settings.get("image_std", found["std"])}
    else:
        found |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    found["interpolation"] = PIL_FILTERS[settings.get("resample", 3)]
    return found | _processor_crop(settings, found["input_size"])


def _processor_crop(settings: dict[str, Any], default: list[int]) -> dict[str, Any]:
    """Resize and crop of an image processor as timm's input_size, crop_pct and crop_mode."""
    size, crop = ({"shortest_edge": s} if isinstance(s, int) else s for s in map(settings.get, ("size", "crop_size")))
    squash = bool(size) and "height" in size
    given = [size["height"], size["width"]] if squash else [size["shortest_edge"]] * 2 if size else default[1:]
    if crop and settings.get("do_center_crop"):
        crop = [crop["height"], crop["width"]] if "height" in crop else [crop["shortest_edge"]] * 2
        return {"input_size": [3, *crop], "crop_pct": crop[0] / given[0], "crop_mode": "squash" if squash else "center"}
    return {
        "input_size": [3, *given],
        "crop_pct": settings.get("crop_pct", 1.0),
        "crop_mode": "squash" if squash else "center",
    }


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


def build_module(description: dict[str, Any]) -> nn.Module:
    """The architecture of a description, with random weights, on the current default device."""
    if description["kind"] == "timm":
        return timm.create_model(description["architecture"], pretrained=False, **description["kwargs"])
    if description["kind"] == "transformers":
        model_class = _transformers_class(description["model_class"])
        return model_class(model_class.config_class.from_dict(description["model_config"]))
    raise ValueError("a custom backbone cannot be built from its configuration; pass the module itself as `backbone=`")


def _transformers_class(path: str) -> type[PreTrainedModel]:
    module, _, name = path.rpartition(".")
    if hasattr(transformers, name):
        return getattr(transformers, name)
    if not module.startswith("transformers."):
        raise ValueError(f"backbone class {path!r} is not one of transformers; pass the module itself as `backbone=`")
    return getattr(importlib.import_module(module), name)


def stage_module(module: Any, stages: list[str]) -> Any:
    """A transformers backbone that returns the feature maps of `stages`: `module`, or one with its weights."""
    if set(stages) <= set(module.out_features):
        return module
    config = type(module.config).from_dict(module.config.to_dict())
    config.out_features = [stage for stage in module.stage_names if stage in stages]
    rebuilt = type(module)(config).to(next(module.parameters()))
    missing = rebuilt.load_state_dict(module.state_dict(), strict=False, assign=True).missing_keys
    # Some backbones normalise the maps they return, each with a norm of its own that others do not have.
    if any("norm" not in name for name in missing):
        raise ValueError(f"stages {stages} need weights {missing} that the backbone does not have")
    return rebuilt.train(module.training)


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
        raise ValueError(
            _rebuild_message(description, f"{len(wrong)} weights differ in name or shape, such as {wrong[0]!r}")
        )
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
    if found.shape != wanted.shape or not torch.allclose(
        found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item()
    ):
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


def probe_images(description: dict[str, Any], batch: int, module: nn.Module) -> Tensor:
    """Random images of the backbone's input size, with the device and dtype of its weights."""
    like = next(itertools.chain(module.parameters(), [torch.empty(0)]))
    size = description["data_config"]["input_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *size, generator=generator, device="cpu")
    return images.to(device=like.device, dtype=like.dtype)
