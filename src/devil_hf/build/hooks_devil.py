"""Layers of any network by forward hooks, in the layout that was recorded when the checkpoint was built.

Here is also how an output becomes a feature map (B, C, H, W), whichever way it was read. This file travels with backbones that
are read so.
"""

import math
import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from devil_hf.model.backbone_devil import READERS
from devil_hf.model.checkpoint_devil import COMPANIONS
from devil_hf.model.modeling_devil import DevilModel

COMPANIONS["hook"] = sys.modules[__name__]


def read_hooks(module: Any, pixel_values: Tensor, readers: list[dict]) -> list[Tensor]:
    """Submodules of any network, which is left after the deepest of them."""
    outputs = capture(module, pixel_values, {reader["module"]: reader["call"] for reader in readers})
    return [read_output(outputs[reader["module"]], reader, pixel_values) for reader in readers]


def read_output(output: Tensor, reader: dict, pixel_values: Tensor) -> Tensor:
    """What a module returned, as the map or the class token that its layer is."""
    if reader["token"]:
        return to_token(output, reader["layout"])
    height, width = pixel_values.shape[-2:]
    return to_map(output, reader["layout"], reader["prefix"], height, width, behind=reader.get("behind", 0))


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

    `calls` says which call of each submodule is meant, from 1: shared modules are called several times in a pass. Several threads
    may read one module, each its own images.
    """
    outputs: dict[str, Any] = {}
    missing, reader = dict(calls), threading.get_ident()

    def keep(name: str, output: Any) -> None:
        if threading.get_ident() != reader:  # another thread's pass through the same modules
            return
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


def to_map(output: Tensor, layout: str, prefix: int, height: int, width: int, behind: int = 0) -> Tensor:
    """A module's output in one of the `LAYOUTS` -> feature map of shape `(batch_size, channels, rows, columns)`.

    Args:
        prefix: number of class and register tokens in front of the grid.
        height, width: size of the images in pixels, which tells the grid of a row of tokens.
        behind: number of tokens behind the grid.

    Raises:
        ValueError: for a layout that is not registered, and for tokens that are no grid.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"this backbone's features have the layout {layout!r}, of which only {sorted(LAYOUTS)} are registered here: import "
            "the code that registers it first."
        )
    if behind:
        axis = 0 if layout == "LNC" else 1
        output = output.narrow(axis, 0, output.shape[axis] - behind)
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


READERS["hook"] = read_hooks

__all__ = [
    "LAYOUTS",
    "DevilModel",
    "aspect_skew",
    "capture",
    "first_tensor",
    "read_output",
    "run",
    "to_map",
    "to_token",
    "token_grid",
]
