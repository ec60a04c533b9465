"""Any vision network as a frozen source of feature maps (B, C, H, W), one per chosen layer.

timm models are read by `forward_intermediates`, transformers backbones by their own feature maps, everything else (and
any further submodule, such as `layer3.5.conv2`) by forward hooks. The network is kept whole, so that its weights can be
compared with their source by a hash. What must be known to read the layers again (architecture, layouts, preprocessing)
is collected once, with the weights at hand, in a JSON-serialisable `config`; building from it runs nothing.

`NAME:class` is the class token of layer NAME, a map of one location, as the paper uses CLIP-ViT's.
"""

import hashlib
import inspect
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layouts_devil import candidate_layers, capture, first_tensor, infer_layout, observe, to_map, to_token
from .sources_devil import build_module, describe_module, load_source, probe_images, stage_module

CLASS_SUFFIX = ":class"
DEFAULT_LAYERS = 4


def resolve_layers(requested: str | int | Sequence[str | int] | None, names: Sequence[str]) -> list[int]:
    """The one rule by which layers are asked for: by name, or by index, negative from the deepest.

    Args:
        requested: a name, an index, or a sequence of either; None means all.
        names: the layers to choose from, shallow to deep.

    Returns:
        Positions in `names`, in the order requested.

    Raises:
        ValueError: if a layer is unknown, named twice, or none is requested.
    """
    if requested is None:
        return list(range(len(names)))
    items = [requested] if isinstance(requested, str) or not isinstance(requested, Iterable) else list(requested)
    positions = [_position(item, names) for item in items]
    if not positions:
        raise ValueError(f"no layer requested; choose from {list(names)} or give None for all")
    if len(set(positions)) < len(positions):
        raise ValueError(f"layers {items} name one layer twice; choose each of {list(names)} at most once")
    return positions


def _position(item: str | int, names: Sequence[str]) -> int:
    if isinstance(item, str):
        if item in names:
            return list(names).index(item)
        raise ValueError(f"unknown layer {item!r}; choose from {list(names)} or an index")
    if isinstance(item, bool):
        raise ValueError(f"layer {item!r} is neither a name nor an index; choose from {list(names)}")
    index = operator.index(item)
    if -len(names) <= index < len(names):
        return index % len(names)
    raise ValueError(f"layer index {index} is out of range for the {len(names)} layers {list(names)}")


def weights_hash(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every persistent tensor, sorted by name."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


class FeatureBackbone(nn.Module):
    """A frozen vision network that returns feature maps of chosen layers.

    Attributes:
        module: the whole network; its weights are this module's state dict, each name starting with `module.`.
        config: JSON-serialisable description, see `from_source` and `from_config`:
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
    def from_source(
        cls,
        backbone: str | PathLike | nn.Module,
        layers: str | int | Sequence[str | int] | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        class_tokens: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> "FeatureBackbone":
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
                its configuration); `data_config` in it overrides the preprocessing.

        Raises:
            OSError: if the source cannot be loaded.
            ValueError: if a layer is unknown or no feature map, or a given module cannot be rebuilt from its config.
        """
        kwargs = dict(backbone_kwargs or {})
        data_config = kwargs.pop("data_config", {})
        if isinstance(backbone, nn.Module):
            module, config = backbone, describe_module(backbone, kwargs)
        else:
            module, config = load_source(backbone, kwargs, revision, token)
        config["data_config"] |= data_config
        config["input_size"] = list(config["data_config"]["input_size"])
        module.eval()
        with torch.no_grad():
            offered = offered_layers(module, config)
            chosen = choose_layers(module, config, offered, layers, class_tokens)
        if stages := [layer["reader"]["stage"] for layer in chosen if layer["reader"]["by"] == "stages"]:
            module = stage_module(module, stages)
            config["model_config"] = json.loads(module.config.to_json_string(use_diff=False))
        config["layer_names"] = [layer["name"] for layer in offered]
        config["layers"] = [layer["name"] for layer in chosen]
        config["channels"] = [layer["channels"] for layer in chosen]
        config["readers"] = [layer["reader"] for layer in chosen]
        on_meta = any(tensor.is_meta for tensor in module.state_dict().values())
        config["sha256"] = None if on_meta else weights_hash(module)
        return cls(module, config)

    @classmethod
    def from_config(cls, config: dict[str, Any], module: nn.Module | None = None) -> "FeatureBackbone":
        """The architecture of `config`, without its weights; a custom backbone needs its `module`."""
        return cls(build_module(config) if module is None else module, config)

    def select(self, layers: str | int | Sequence[str | int]) -> "FeatureBackbone":
        """The same network, read at some of the chosen layers only."""
        positions = resolve_layers(layers, self.layers)
        chosen = {name: [self.config[name][at] for at in positions] for name in ("layers", "channels", "readers")}
        return FeatureBackbone(self.module, self.config | chosen)

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


def offered_layers(module: nn.Module, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers that a network offers, shallow to deep, seen in a probe at its own input size.

    Returns:
        One dict per layer: `name`, `channels`, `grid` (rows, columns), `reader`, and the number of tokens in front.
    """
    if config["kind"] == "timm" and hasattr(module, "forward_intermediates"):
        return _timm_layers(module, config)
    if getattr(module, "stage_names", None) and hasattr(module, "out_features"):
        return _stage_layers(module, config)
    layers, blocks = _maps_and_blocks(module, config, candidate_layers(module))
    while len(blocks) == 1:
        # One container around everything (`features`) says too little: its children are the layers.
        (block,) = blocks
        children = [f"{block}.{name}" for name, _ in module.get_submodule(block).named_children()]
        opened = [layer["name"] for layer in layers]
        position = opened.index(block)
        opened[position : position + 1] = children
        layers, blocks = _maps_and_blocks(module, config, opened)
    return [layer for layer in layers if layer["name"] in blocks] if blocks else layers


def _maps_and_blocks(module: nn.Module, config: dict, names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The named submodules that return maps, and the names of those among them that have parts of their own."""
    layers = [layer for layer in hook_layers(module, config, names) if layer["grid"] != (1, 1)]
    return layers, [layer["name"] for layer in layers if any(module.get_submodule(layer["name"]).children())]


def _timm_layers(module: Any, config: dict[str, Any]) -> list[dict[str, Any]]:
    infos = module.feature_info
    plain = [info["module"] for info in infos]
    # Branches of one module (CrossViT, CoaT) share its name; their stride tells them apart.
    names = [
        f"{name}@{info['reduction']}" if plain.count(name) > 1 else name
        for name, info in zip(plain, infos, strict=True)
    ]
    # Networks without such tokens may fail when asked for them.
    takes_prefix = "return_prefix_tokens" in inspect.signature(module.forward_intermediates).parameters
    carries_prefix = bool(getattr(module, "num_prefix_tokens", 0))
    prefix = {"return_prefix_tokens": True} if takes_prefix and carries_prefix else {}
    images = probe_images(config, 1, module)
    found = module.forward_intermediates(images, norm=False, intermediates_only=True, output_fmt="NCHW", **prefix)
    layers = []
    for index, (name, item) in enumerate(zip(names, found, strict=True)):
        grid, tokens = item if isinstance(item, tuple) else (item, None)
        reader = {"by": "intermediates", "index": index, "token": False}
        layers.append(_layer(name, grid.shape, reader, 0 if tokens is None else tokens.shape[1]))
    return layers


def _stage_layers(module: Any, config: dict[str, Any]) -> list[dict[str, Any]]:
    names = list(module.stage_names)
    try:
        staged = stage_module(module, names)
    except ValueError:  # some do not hand out their stem
        staged = stage_module(module, names[1:])
    images = probe_images(config, 2, module)
    output = staged(images, output_hidden_states=True)
    layers = []
    for name, feature_map in zip(staged.out_features, output.feature_maps, strict=True):
        hidden = cast(Tensor, first_tensor(output.hidden_states[names.index(name)]))
        layout = infer_layout(feature_map.shape, *images.shape[:1], *images.shape[2:])
        if layout is None:
            continue
        grid = to_map(feature_map, **layout, height=images.shape[2], width=images.shape[3]).shape
        tokens = hidden.shape[1] - grid[2] * grid[3] if hidden.ndim == 3 else 0
        layers.append(_layer(name, grid, {"by": "stages", "stage": name, "token": False} | layout, tokens))
    return layers


def hook_layers(module: nn.Module, config: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Those of the named submodules whose output is a feature map."""
    images = probe_images(config, 2, module)
    batch, _, height, width = images.shape
    layers = []
    for name, shapes in observe(module, images, names).items():
        layout = infer_layout(shapes[-1], batch, height, width)
        if layout is not None:
            reader = {"by": "hook", "module": name, "call": len(shapes), "token": False} | layout
            grid = to_map(torch.empty(shapes[-1], device="meta"), **layout, height=height, width=width).shape
            layers.append(_layer(name, grid, reader, layout["prefix"]))
    return layers


def _layer(name: str, shape: torch.Size, reader: dict[str, Any], prefix: int) -> dict[str, Any]:
    return {"name": name, "channels": shape[1], "grid": tuple(shape[2:]), "reader": reader, "prefix": prefix}


def choose_layers(
    module: nn.Module,
    config: dict[str, Any],
    offered: list[dict[str, Any]],
    requested: str | int | Sequence[str | int] | None,
    class_tokens: bool,
) -> list[dict[str, Any]]:
    """The requested layers, offered or any other submodule, with their class tokens."""
    names = [layer["name"] for layer in offered]
    if requested is None:
        chosen = _default_layers(offered, config["input_size"][1])
    else:
        items = [requested] if isinstance(requested, str) or not isinstance(requested, Iterable) else list(requested)
        chosen = [_requested_layer(module, config, offered, item) for item in items]
        resolve_layers([layer["name"] for layer in chosen], list(dict.fromkeys(layer["name"] for layer in chosen)))
    if not class_tokens:
        return chosen
    with_tokens = []
    for layer in chosen:
        with_tokens.append(layer)
        token = _class_token(module, layer)
        if token is not None and token["name"] not in [other["name"] for other in chosen]:
            with_tokens.append(token)
    if len(with_tokens) == len(chosen):
        raise ValueError(
            f"class_tokens=True, but layers {[layer['name'] for layer in chosen]} of {names} have no class token"
        )
    return with_tokens


def _requested_layer(module: nn.Module, config: dict, offered: list[dict], item: str | int) -> dict[str, Any]:
    names = [layer["name"] for layer in offered]
    base = item.removesuffix(CLASS_SUFFIX) if isinstance(item, str) else item
    if base in names or not isinstance(base, str):
        layer = offered[_position(base, names)]
    elif base in dict(module.named_modules()) and base:
        found = hook_layers(module, config, [base])
        if not found:
            raise ValueError(f"the output of {base!r} is no feature map; choose from {names} or another submodule")
        layer = found[0]
    else:
        raise ValueError(
            f"unknown layer {item!r}; choose from {names}, an index into these, or the name of any submodule"
        )
    if base is item:
        return layer
    token = _class_token(module, layer)
    if token is None:
        raise ValueError(f"layer {base!r} has no class token; choose {base!r} itself, or from {names}")
    return token


def _class_token(module: nn.Module, layer: dict[str, Any]) -> dict[str, Any] | None:
    """The class token of a layer as a layer of its own, if there is one in front of the register tokens."""
    if layer["reader"]["token"] or layer["prefix"] <= _register_tokens(module):
        return None
    return layer | {
        "name": layer["name"] + CLASS_SUFFIX,
        "grid": (1, 1),
        "reader": layer["reader"] | {"token": True},
    }


def _register_tokens(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    registers = getattr(module, "num_reg_tokens", getattr(config, "num_register_tokens", None))
    if isinstance(registers, int):
        return registers
    parameter = getattr(module, "reg_token", None)
    return 0 if parameter is None else parameter.shape[1]


def _default_layers(offered: list[dict[str, Any]], height: int) -> list[dict[str, Any]]:
    """The last layer of each stage, the four deepest, without the stem; of equal blocks, four evenly spaced."""
    if not offered:
        raise ValueError("the backbone offers no layers by itself; name submodules of it as `layers`")
    layers = [layer for layer in offered if layer["grid"][0] * 2 < height and layer["name"] != "stem"] or offered
    if len(layers) <= DEFAULT_LAYERS + 1:
        return layers[-DEFAULT_LAYERS:]
    stages = list({layer["grid"]: layer for layer in layers}.values())
    if len(stages) > 1:
        return stages[-DEFAULT_LAYERS:]
    return [layers[len(layers) * (part + 1) // DEFAULT_LAYERS - 1] for part in range(DEFAULT_LAYERS)]
