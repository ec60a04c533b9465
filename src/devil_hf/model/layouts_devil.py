"""Reading feature maps (B, C, H, W) out of modules that keep them in any layout.

A module's output is captured by a forward hook. Its layout is inferred once, from a probe of known size, and recorded
by name, so that loading a checkpoint needs no forward pass:

`NCHW`, `NHWC`  maps; `NLC`, `LNC`  tokens in row order, after `prefix` class or register tokens; `NC`  one location.
"""

import math

import torch
from torch import Tensor, nn


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


def observe(module: nn.Module, pixel_values: Tensor, names: list[str]) -> dict[str, list[torch.Size]]:
    """Shape of the first output tensor of each named submodule, one entry per call, in one whole forward pass."""
    shapes: dict[str, list[torch.Size]] = {}

    def note(name: str):
        def hook(_module, _inputs, output):
            tensor = first_tensor(output)
            shapes.setdefault(name, []).append(torch.Size() if tensor is None else tensor.shape)

        return hook

    handles = [module.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        run(module, pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid (rows, columns) of `tokens` square patches of a `height` x `width` image; None if there is none."""
    pairs = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    pairs = [pair for pair in pairs if _is_patch_grid(*pair, height, width)]
    return min(pairs, key=lambda pair: _skew(pair[0], pair[1], height, width), default=None)


def _is_patch_grid(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether one patch size, rounding incomplete patches either down or up in both directions, gives this grid."""
    down = max(height / (rows + 1), width / (columns + 1)) < min(height / rows, width / columns)
    patch = max(height / rows, width / columns)
    up = patch * (rows - 1) < height and patch * (columns - 1) < width
    return down or up


def _skew(rows: int, columns: int, height: int, width: int) -> float:
    """How far the aspect of a grid is from that of the image."""
    return abs(math.log(rows * width / (columns * height)))


def infer_layout(shape: torch.Size, batch: int, height: int, width: int) -> dict | None:
    """Name the layout of an output whose probe was `batch` images of `height` x `width` pixels.

    Returns:
        `{"layout": name, "prefix": number of tokens in front of the grid}`, or None if this is no feature map.
    """
    if len(shape) == 4 and shape[0] == batch:
        channels_last = _skew(*shape[1:3], height, width) < _skew(*shape[2:], height, width)
        return {"layout": "NHWC" if channels_last else "NCHW", "prefix": 0}
    if len(shape) == 3 and batch in shape[:2]:
        layout, tokens = ("NLC", shape[1]) if shape[0] == batch else ("LNC", shape[0])
        # The fewest leading tokens without which the rest is a grid; published models have at most 16.
        prefix = next((n for n in range(min(tokens, 17)) if token_grid(tokens - n, height, width)), None)
        return None if prefix is None else {"layout": layout, "prefix": prefix}
    if len(shape) == 2 and shape[0] == batch:
        return {"layout": "NC", "prefix": 0}
    return None


def to_map(tensor: Tensor, layout: str, prefix: int, height: int, width: int) -> Tensor:
    """`tensor` in `layout` -> feature map of shape `(batch_size, channels, rows, columns)`.

    Args:
        prefix: number of class and register tokens in front of the grid.
        height, width: size of the images in pixels, which tells the grid of a row of tokens.
    """
    if layout == "NCHW":
        return tensor
    if layout == "NHWC":
        return tensor.permute(0, 3, 1, 2).contiguous()
    if layout == "NC":
        return tensor[:, :, None, None]
    tokens = (tensor if layout == "NLC" else tensor.transpose(0, 1))[:, prefix:]  # (B, H * W, C)
    grid = token_grid(tokens.shape[1], height, width)
    if grid is None:
        raise ValueError(f"{tokens.shape[1]} tokens are no grid of the aspect of a {height} x {width} image")
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


def to_token(tensor: Tensor, layout: str) -> Tensor:
    """The first token of `tensor` in `layout` `NLC` or `LNC` -> one location `(batch_size, channels, 1, 1)`."""
    return (tensor[:, 0] if layout == "NLC" else tensor[0])[:, :, None, None]


def candidate_layers(module: nn.Module) -> list[str]:
    """Names of the submodules that are likely layers: the elements of lists of blocks, else the children."""
    return _block_names(module, "") or [name for name, _ in module.named_children()]


def _block_names(module: nn.Module, prefix: str) -> list[str]:
    names = []
    for name, child in module.named_children():
        in_list = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        names += [prefix + name] if in_list else _block_names(child, f"{prefix}{name}.")
    return names
