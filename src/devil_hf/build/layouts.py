"""Guessing how a module lays its outputs out: which of its submodules give feature maps, and in which layout.

A layout is inferred once, from a probe of known size, and recorded by name, so that loading a checkpoint needs no forward
pass; `LAYOUTS` of `devil_hf.build.hooks_devil` reads each of them into (B, C, H, W). To add one, register it here:

```python
def recognise(shape, batch, height, width):  # of the output for a probe of `batch` images of `height` x `width` pixels
    return {"prefix": 0} if len(shape) == 4 and shape[1] == batch and shape[0] != batch else None

register_layout("CNHW", recognise, lambda tensor, prefix, height, width: tensor.transpose(0, 1))
```
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from devil_hf.build.hooks_devil import LAYOUTS, aspect_skew, first_tensor, run, token_grid

# (shape, images in the probe, their height and width) -> the settings of the layout's reader, or None.
Recogniser = Callable[[torch.Size, int, int, int], dict[str, Any] | None]
RECOGNISERS: dict[str, Recogniser] = {}


def register_layout(name: str, recognise: Recogniser, read: Callable[[Tensor, int, int, int], Tensor]) -> None:
    """Teach a layout: how an output of it is recognised, and how it is read into (B, C, rows, columns).

    Layouts registered here are tried before the built-in ones, the latest first. A checkpoint records a layout by its
    name only: whoever loads one with a layout of your own has to register it, too.

    Args:
        name: what checkpoints record.
        recognise: (shape, batch, height, width) of the output for a probe of `batch` images -> `{"prefix": number of tokens in
            front of the grid}`, or None for an output that is not of this layout.
        read: (output, prefix, height, width) -> (B, C, rows, columns).
    """
    RECOGNISERS[name] = recognise
    LAYOUTS[name] = read


def infer_layout(shape: torch.Size, batch: int, height: int, width: int) -> dict | None:
    """Name the layout of an output whose probe was `batch` images of `height` x `width` pixels.

    Returns:
        `{"layout": name, "prefix": number of tokens in front of the grid}`, or None if this is no feature map.
    """
    for name, recognise in reversed(RECOGNISERS.items()):
        settings = recognise(shape, batch, height, width)
        if settings is not None:
            return {"layout": name} | settings
    if len(shape) == 4 and shape[0] == batch:
        channels_last = aspect_skew(*shape[1:3], height, width) < aspect_skew(*shape[2:], height, width)
        return {"layout": "NHWC" if channels_last else "NCHW", "prefix": 0}
    if len(shape) == 3 and batch in shape[:2]:
        layout, tokens = ("NLC", shape[1]) if shape[0] == batch else ("LNC", shape[0])
        # The fewest leading tokens without which the rest is a grid; published models have at most 16.
        prefix = next((n for n in range(min(tokens, 17)) if token_grid(tokens - n, height, width)), None)
        return None if prefix is None else {"layout": layout, "prefix": prefix}
    if len(shape) == 2 and shape[0] == batch:
        return {"layout": "NC", "prefix": 0}
    return None


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


def candidate_layers(module: nn.Module) -> list[str]:
    """Names of the submodules that are likely layers: the elements of lists of blocks, else the children."""
    return _block_names(module, "") or [name for name, _ in module.named_children()]


def _block_names(module: nn.Module, prefix: str) -> list[str]:
    names = []
    for name, child in module.named_children():
        in_list = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        names += [prefix + name] if in_list else _block_names(child, f"{prefix}{name}.")
    return names
