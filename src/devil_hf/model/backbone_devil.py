"""Any vision network as a frozen source of feature maps (B, C, H, W), one per chosen layer.

timm models are read by `forward_intermediates`, transformers backbones by their own feature maps, everything else (and
any further submodule, such as `layer3.5.conv2`) by forward hooks, in the layout that was recorded when the checkpoint was
built. The network is kept whole, so that its weights can be compared with their source by a hash. Here an architecture is
made from its recorded description, which `devil_hf.build` writes; slim checkpoints load its weights by `slim_devil.py`.

`NAME:class` is the class token of layer NAME, a map of one location, as the paper uses CLIP-ViT's.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import timm
import transformers
from torch import Tensor, nn


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
            raise ValueError(f"pixel_values must have the shape (batch, 3, height, width), got {tuple(pixel_values.shape)}")
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
        names, found = module.out_features, output.feature_maps
        if reader["token"]:
            names, found = module.stage_names, output.hidden_states
        maps.append(_read(found[names.index(reader["stage"])], reader, pixel_values))
    return maps


def read_hooks(module: Any, pixel_values: Tensor, readers: list[dict]) -> list[Tensor]:
    """Submodules of any network, which is left after the deepest of them."""
    outputs = capture(module, pixel_values, {reader["module"]: reader["call"] for reader in readers})
    return [_read(outputs[reader["module"]], reader, pixel_values) for reader in readers]


def _read(output: Tensor, reader: dict, pixel_values: Tensor) -> Tensor:
    if reader["token"]:
        return to_token(output, reader["layout"])
    return to_map(output, reader["layout"], reader["prefix"], *pixel_values.shape[-2:])


READERS = {"intermediates": read_intermediates, "stages": read_stages, "hook": read_hooks}


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
    """First tensor of the output of named submodules, in its own layout, in one pass that ends as soon as all are there.

    `calls` says which call of each submodule is meant, from 1: shared modules are called several times in a pass.
    """
    outputs: dict[str, Any] = {}
    missing = dict(calls)

    def keep(name: str, output: Any) -> None:
        missing[name] = missing.get(name, 0) - 1
        if missing[name] == 0:
            outputs[name] = first_tensor(output)
            if len(outputs) == len(calls):
                raise _DeepestReached
            # A later in-place operation (an activation, a residual sum) would change what was captured.
            outputs[name] = outputs[name].clone()

    handles = [
        module.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name in calls
    ]
    try:
        run(module, pixel_values)
    except _DeepestReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if unused := sorted(calls.keys() - outputs.keys()):
        raise ValueError(f"layers {unused} are not used in the backbone's forward pass; choose other layers")
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


def to_token(output: Tensor, layout: str) -> Tensor:
    """The first token of an output, (B, tokens, C) unless its layout is `LNC` -> one location `(batch_size, channels, 1, 1)`."""
    return (output[0] if layout == "LNC" else output[:, 0])[:, :, None, None]


def build_module(description: dict[str, Any]) -> nn.Module:
    """The architecture of a description, with random weights, on the current default device."""
    if description["kind"] == "timm":
        name = description["architecture"].split(":")[-1]  # neither a repository nor a directory, and no file of weights
        return timm.create_model(name, pretrained=False, checkpoint_path="", **description["kwargs"])
    if description["kind"] == "custom":
        raise ValueError("a custom backbone cannot be built from its configuration; pass the module itself as `backbone=`")
    module, _, name = description["model_class"].rpartition(".")
    if not module.startswith("transformers."):
        raise ValueError(f"backbone class {name!r} is not one of transformers; pass the module itself as `backbone=`")
    # By its own name first: modules of transformers move.
    model_class = getattr(transformers, name, None) or getattr(importlib.import_module(module), name)
    return model_class(model_class.config_class.from_dict(description["model_config"]))
