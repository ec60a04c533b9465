"""Any vision network as a frozen source of feature maps (B, C, H, W), one per chosen layer.

timm models are read by `forward_intermediates`, transformers backbones by their own feature maps, everything else (and
any further submodule, such as `layer3.5.conv2`) by forward hooks, in the layout that was recorded when the checkpoint was
built. The network is kept whole, so that its weights can be compared with their source by a hash. Here an architecture is
made from its recorded description and its weights are loaded from their source; `devil_hf.build` writes the description.

`NAME:class` is the class token of layer NAME, a map of one location, as the paper uses CLIP-ViT's.
"""

import difflib
import hashlib
import importlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from torch import Tensor, nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoModel, PreTrainedModel


def weights_hash(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every persistent tensor, sorted by name."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureBackbone(nn.Module):
    """A frozen vision network that returns feature maps of chosen layers.

    Attributes:
        module: the whole network; its weights are this module's state dict, each name starting with `module.`.
        config: JSON-serialisable description, as `devil_hf.build.backbone_from_source` writes it:
            `kind` ("timm", "transformers" or "custom"), `architecture` or `model_class` and `model_config`, `kwargs`;
            `source`, `revision` (commit) and `sha256` of the weights; `data_config`, the evaluation preprocessing in
            timm's terms; `input_size` (3, height, width); `layer_names`, all layers offered; `layers`, `channels` and
            `readers` (how each is read), for the chosen layers.
        layers, channels: name and number of channels of each chosen layer.
        layer_names: the layers that the network offers, shallow to deep.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any]):
        super().__init__()
        self.module = module
        self.config = config
        self.layers: list[str] = config["layers"]
        self.channels: list[int] = config["channels"]
        self.layer_names: list[str] = config["layer_names"]
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_config(cls, config: dict[str, Any], module: nn.Module | None = None) -> "FeatureBackbone":
        """The architecture of `config`, without its weights; a custom backbone needs its `module`."""
        return cls(build_module(config) if module is None else module, config)

    def train(self, mode: bool = True) -> "FeatureBackbone":
        """Stay in evaluation mode: a frozen network has neither dropout nor running statistics."""
        return super().train(False)

    def forward(self, pixel_values: Tensor, layers: Sequence[int] | None = None) -> list[Tensor | None]:
        """Feature maps of images.

        Args:
            pixel_values: preprocessed images of shape `(batch_size, 3, height, width)`.
            layers: positions in `self.layers`; None means all. Nothing deeper is computed where the network allows it.

        Returns:
            One map of shape `(batch_size, channels, rows, columns)` per chosen layer, None where not asked for.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values must have the shape (batch, 3, height, width), got {tuple(pixel_values.shape)}"
            )
        wanted = range(len(self.layers)) if layers is None else layers
        maps: list[Tensor | None] = [None] * len(self.layers)
        for way, read in READERS.items():
            picked = [index for index in wanted if self.config["readers"][index]["by"] == way]
            if picked:
                readers = [self.config["readers"][index] for index in picked]
                for index, feature_map in zip(picked, read(self.module, pixel_values, readers), strict=True):
                    maps[index] = feature_map
        return maps


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
        maps.append(to_token(tokens, "NLC") if reader["token"] else grid)
    return maps


def read_stages(module: Any, pixel_values: Tensor, readers: list[dict]) -> list[Tensor]:
    """Stages of a transformers backbone, class tokens from its hidden states."""
    wants_token = any(reader["token"] for reader in readers)
    output = module(pixel_values, output_hidden_states=True) if wants_token else module(pixel_values)
    maps = []
    for reader in readers:
        if reader["token"]:
            maps.append(to_token(output.hidden_states[module.stage_names.index(reader["stage"])], "NLC"))
        else:
            tensor = output.feature_maps[module.out_features.index(reader["stage"])]
            maps.append(to_map(tensor, reader["layout"], reader["prefix"], *pixel_values.shape[-2:]))
    return maps


def read_hooks(module: Any, pixel_values: Tensor, readers: list[dict]) -> list[Tensor]:
    """Submodules of any network, which is left after the deepest of them."""
    outputs = capture(module, pixel_values, {reader["module"]: reader["call"] for reader in readers})
    return [
        to_token(outputs[reader["module"]], reader["layout"])
        if reader["token"]
        else to_map(outputs[reader["module"]], reader["layout"], reader["prefix"], *pixel_values.shape[-2:])
        for reader in readers
    ]


READERS = {"intermediates": read_intermediates, "stages": read_stages, "hook": read_hooks}


# ------------------------------------------------------------------------------------------------ outputs of modules


class _DeepestReached(Exception):
    """Leaves a forward pass of which nothing more is needed."""


def first_tensor(output) -> Tensor | None:
    """The tensor that a module's output is, or starts with (tuples, lists, dicts and `ModelOutput`s)."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, list | tuple):
        return next((tensor for tensor in map(first_tensor, output) if tensor is not None), None)
    return None


def run(module: nn.Module, pixel_values: Tensor):
    """One forward pass of any module; transformers models take their input by name."""
    name = getattr(module, "main_input_name", None)
    return module(**{name: pixel_values}) if isinstance(name, str) else module(pixel_values)


def capture(module: nn.Module, pixel_values: Tensor, calls: dict[str, int]) -> dict[str, Tensor]:
    """Outputs of named submodules in one forward pass, which ends as soon as all are there.

    Args:
        module: the whole network.
        pixel_values: images of shape `(batch_size, 3, height, width)`.
        calls: which call of each submodule is meant, from 1 (shared modules are called several times in a pass).

    Returns:
        The first tensor of each output, in the module's own layout.
    """
    outputs, missing = {}, dict(calls)

    def keep(name: str):
        def hook(_module, _inputs, output):
            if name not in missing:
                return
            missing[name] -= 1
            if missing[name]:
                return
            del missing[name]
            outputs[name] = first_tensor(output)
            if not missing:
                raise _DeepestReached
            # A later in-place operation (an activation, a residual sum) would change what was captured.
            outputs[name] = outputs[name].clone()

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in calls]
    try:
        run(module, pixel_values)
    except _DeepestReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing:
        raise ValueError(f"layers {sorted(missing)} are not used in the backbone's forward pass; choose other layers")
    return outputs


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid (rows, columns) of `tokens` square patches of a `height` x `width` image; None if there is none."""
    pairs = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    pairs = [pair for pair in pairs if _is_patch_grid(*pair, height, width)]
    return min(pairs, key=lambda pair: aspect_skew(pair[0], pair[1], height, width), default=None)


def _is_patch_grid(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether one patch size, rounding incomplete patches either down or up in both directions, gives this grid."""
    down = max(height / (rows + 1), width / (columns + 1)) < min(height / rows, width / columns)
    patch = max(height / rows, width / columns)
    up = patch * (rows - 1) < height and patch * (columns - 1) < width
    return down or up


def aspect_skew(rows: int, columns: int, height: int, width: int) -> float:
    """How far the aspect of a grid is from that of the image."""
    return abs(math.log(rows * width / (columns * height)))


# How an output becomes a map: (output, tokens in front of the grid, height and width of the images) -> (B, C, rows, columns).
# Register more with `devil_hf.build.layouts.register_layout`.
LAYOUTS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "NCHW": lambda output, prefix, height, width: output,
    "NHWC": lambda output, prefix, height, width: output.permute(0, 3, 1, 2).contiguous(),
    "NLC": lambda output, prefix, height, width: _tokens_to_map(output, prefix, height, width),
    "LNC": lambda output, prefix, height, width: _tokens_to_map(output.transpose(0, 1), prefix, height, width),
    "NC": lambda output, prefix, height, width: output[:, :, None, None],
}


def to_map(output: Tensor, layout: str, prefix: int, height: int, width: int) -> Tensor:
    """A module's output in one of the `LAYOUTS` -> feature map of shape `(batch_size, channels, rows, columns)`.

    Args:
        prefix: number of class and register tokens in front of the grid.
        height, width: size of the images in pixels, which tells the grid of a row of tokens.

    Raises:
        ValueError: for a layout that is not registered, and for tokens that are no grid.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"this backbone's features have the layout {layout!r}, of which only {sorted(LAYOUTS)} are registered here: import "
            "the code that registers it first."
        )
    return LAYOUTS[layout](output, prefix, height, width)


def _tokens_to_map(tokens: Tensor, prefix: int, height: int, width: int) -> Tensor:
    tokens = tokens[:, prefix:]  # (B, rows * columns, C)
    grid = token_grid(tokens.shape[1], height, width)
    if grid is None:
        raise ValueError(f"{tokens.shape[1]} tokens are no grid of the aspect of a {height} x {width} image")
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


def to_token(tensor: Tensor, layout: str) -> Tensor:
    """The first token of an output in layout `NLC` or `LNC` -> one location `(batch_size, channels, 1, 1)`."""
    return (tensor[:, 0] if layout == "NLC" else tensor[0])[:, :, None, None]


# ------------------------------------------------------------------------------------------ architectures and weights


def source_state_dict(
    config: dict[str, Any], backbone_override: str | PathLike | nn.Module | None = None, *, token: str | None = None
) -> dict[str, Tensor]:
    """Weights of a backbone from where they were first loaded, checked against the recorded hash.

    Args:
        config: `FeatureBackbone.config`.
        backbone_override: where the weights lie now, if not at `config["source"]`; or the module itself.
        token: access token for private Hub repositories.

    Returns:
        Tensors named as in `FeatureBackbone.state_dict()`.

    Raises:
        OSError: if the source cannot be loaded.
        ValueError: if no source is recorded, or if its weights are not those that the hash was taken of.
    """
    source = config["source"] if backbone_override is None else backbone_override
    if source is None:
        raise ValueError(
            "the backbone was given as a module, so no source of its weights is known; pass `backbone=...`"
        )
    if isinstance(source, nn.Module):
        module = source
    else:
        revision = config["revision"] if backbone_override is None else None
        module = load_source(source, config.get("kwargs"), revision, token, config.get("model_config"))[0]
    found = weights_hash(module)
    if found != config["sha256"]:
        raise ValueError(
            f"the weights of backbone {type(source).__name__ if module is source else source!r} have SHA-256 {found}, "
            f"but the checkpoint was made with {config['sha256']}; pass the original weights as `backbone=`"
        )
    return {f"module.{name}": tensor for name, tensor in module.state_dict().items()}


def load_source(
    source: str | PathLike,
    kwargs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The pretrained network of a timm or transformers id or local directory, and where exactly it came from.

    Args:
        source: `resnet50.a1_in1k`, a Hub id (`timm/resnet50.a1_in1k`, `facebook/dinov2-small`, also with `hf-hub:` in
            front), or a directory written by `timm.models.save_for_hf` or by `save_pretrained` of transformers.
        kwargs: further arguments of the architecture; for transformers, changes of its configuration.
        revision: branch, tag or commit of a Hub repository.
        token: access token for private Hub repositories.
        model_config: for transformers, the recorded configuration, in place of the source's own.

    Returns:
        The network, and a dict of `source`, `revision` (commit, None for a directory), the `kwargs` that it was made with, and
        the `folder` of its files (None for a timm name).

    Raises:
        OSError: if there is no such source, or it cannot be reached.
    """
    name = os.fspath(source).removeprefix("local-dir:")
    if name.startswith("hf-hub:"):
        name, _, pinned = name.removeprefix("hf-hub:").partition("@")
        revision = revision or pinned or None
    kwargs = dict(kwargs or {})
    if not os.path.isdir(name) and timm.is_model(name.split(".")[0]) and "/" not in name:
        return _load_timm_name(name, {"num_classes": 0} | kwargs, revision)
    folder, commit = _folder(name, revision, token)
    source = os.path.abspath(folder) if commit is None else name
    if not (folder / "config.json").is_file():
        raise OSError(f"backbone {source!r} has no config.json; give a directory written by timm or transformers")
    settings = json.loads((folder / "config.json").read_text())
    if "architecture" in settings:
        kwargs = {"num_classes": 0} | settings.get("model_args", {}) | kwargs
        module = timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)
    else:
        module = _load_transformers(folder, kwargs, model_config)
    return module, {"source": source, "revision": commit, "kwargs": kwargs, "folder": folder}


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
        similar = difflib.get_close_matches(name.rsplit("/")[-1].split(".")[0], timm.list_models(), n=3)
        raise OSError(
            f"backbone {name!r} is neither a timm architecture{f' (similar: {similar})' if similar else ''}, a local "
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
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    if revision and cfg.hf_hub_id:
        overlay["hf_hub_id"] = f"{cfg.hf_hub_id}@{revision}"
    try:
        module = timm.create_model(name, pretrained=True, **kwargs | {"pretrained_cfg_overlay": overlay or None})
    except Exception as error:
        raise OSError(
            f"the weights of backbone {name!r} cannot be loaded ({error}); pass as `backbone=` where they lie"
        ) from error
    full_name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else name
    commit = _cached_commit(cfg, revision)
    return module, {"source": full_name, "revision": commit, "kwargs": kwargs, "folder": None}


def _cached_commit(cfg, revision: str | None) -> str | None:
    """The commit from which timm took the weights, read off the Hub's cache."""
    names = [cfg.hf_hub_filename, "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"]
    for name in filter(None, names if cfg.hf_hub_id else []):
        path = try_to_load_from_cache(cfg.hf_hub_id, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _load_transformers(folder: Path, kwargs: Mapping[str, Any], model_config: Mapping[str, Any] | None) -> nn.Module:
    config = AutoConfig.from_pretrained(folder, **kwargs)
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        if model_config is not None:
            config.out_features = model_config["out_features"]
        return MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(folder, config=config, dtype=torch.float32)
    module = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
    return module.get_encoder(modality="image") if hasattr(config, "vision_config") else module


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


__all__ = ["FeatureBackbone", "source_state_dict", "weights_hash"]
