"""The layers of a network: which it offers, which are chosen, and how each of them is read."""

import inspect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from devil_hf.build.hooks_devil import first_tensor, to_map
from devil_hf.build.layouts import candidate_layers, infer_layout, observe, tokens_around
from devil_hf.model.pooling_devil import resolve_layers

CLASS_SUFFIX = ":class"
DEFAULT_LAYERS = 4


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
    names = [f"{name}@{info['reduction']}" if plain.count(name) > 1 else name for name, info in zip(plain, infos, strict=True)]
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
    """Those of the named submodules whose output is a feature map.

    Raises:
        ValueError: where a single name is asked for, and which of its tokens are patches is not clear.
    """
    images = probe_images(config, 2, module)
    batch, _, height, width = images.shape
    layers = []
    known: dict[tuple[str, int], Any] = {}
    for name, shapes in observe(module, images, names).items():
        layout = infer_layout(shapes[-1], batch, height, width)
        if layout is None:
            continue
        if layout["layout"] in ("NLC", "LNC"):
            tokens = shapes[-1][0 if layout["layout"] == "LNC" else 1]
            place = (layout["layout"], tokens)
            if place not in known:
                known[place] = config.get("tokens_around") or _tokens_around(module, images, *place, strict=len(names) == 1)
            if known[place] is None:
                continue
            front, behind = known[place]
            layout |= {"prefix": front} | ({"behind": behind} if behind else {})
        reader = {"by": "hook", "module": name, "call": len(shapes), "token": False} | layout
        grid = to_map(torch.empty(shapes[-1], device="meta"), **layout, height=height, width=width).shape
        layers.append(_layer(name, grid, reader, layout["prefix"]))
    return layers


def _tokens_around(module: nn.Module, images: Tensor, layout: str, tokens: int, strict: bool) -> tuple[int, int] | None:
    try:
        return tokens_around(module, images, layout, tokens)
    except ValueError:
        if strict:
            raise
        return None


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
        raise ValueError(f"class_tokens=True, but layers {[layer['name'] for layer in chosen]} of {names} have no class token")
    return with_tokens


def _requested_layer(module: nn.Module, config: dict, offered: list[dict], item: str | int) -> dict[str, Any]:
    names = [layer["name"] for layer in offered]
    base = item.removesuffix(CLASS_SUFFIX) if isinstance(item, str) else item
    if base in names or not isinstance(base, str):
        layer = offered[resolve_layers(base, names)[0]]
    elif base in dict(module.named_modules()) and base:
        found = hook_layers(module, config, [base])
        if not found:
            raise ValueError(f"the output of {base!r} is no feature map; choose from {names} or another submodule")
        layer = found[0]
    else:
        raise ValueError(f"unknown layer {item!r}; choose from {names}, an index into these, or the name of any submodule")
    if base is item:
        return layer
    token = _class_token(module, layer)
    if token is None:
        raise ValueError(f"layer {base!r} has no class token; choose {base!r} itself, or from {names}")
    return token


def _class_token(module: nn.Module, layer: dict[str, Any]) -> dict[str, Any] | None:
    """The class token of a layer as a layer of its own, if there is one in front of the register tokens."""
    if layer["reader"]["token"] or layer["prefix"] <= max(_register_tokens(module) - layer["reader"].get("behind", 0), 0):
        return None
    return layer | {"name": layer["name"] + CLASS_SUFFIX, "grid": (1, 1), "reader": layer["reader"] | {"token": True}}


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


def probe_images(description: dict[str, Any], batch: int, module: nn.Module) -> Tensor:
    """Random images of the backbone's input size, with the device and dtype of its weights."""
    like = next(itertools.chain(module.parameters(), [torch.empty(0)]))
    size = description["data_config"]["input_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *size, generator=generator, device="cpu")
    return images.to(device=like.device, dtype=like.dtype)
