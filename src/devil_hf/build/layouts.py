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


def tokens_around(module: nn.Module, images: Tensor, layout: str, tokens: int) -> tuple[int, int]:
    """How many tokens of an output stand in front of its grid and behind it, by a probe of the network.

    Where a submodule first gives so many tokens, those that are the same for two images are no patches; and the token that
    changes most with a patch of the image is that patch's.

    Args:
        images: two different ones.
        layout: "NLC" or "LNC".
        tokens: number of them in the output.

    Raises:
        ValueError: where the probe does not tell them.
    """
    height, width = images.shape[-2:]
    fitting = [(n, m) for n in range(17) for m in range(17 - n) if tokens > n + m and token_grid(tokens - n - m, height, width)]
    if fitting == [(0, 0)] or any(parameter.is_meta for parameter in module.parameters()):
        return fitting[0]
    first = _first_tokens(module, images, layout, tokens)
    alike = (first[0] == first[1]).all(dim=-1)
    if alike.any():
        fitting = [(n, m) for n, m in fitting if alike.tolist() == [at < n or at >= tokens - m for at in range(tokens)]]
    found = [around for around in fitting if _answers(module, images, layout, first, *around)]
    if len(found) != 1:
        raise ValueError(
            f"which of {tokens} tokens are patches of a {height} x {width} image is not clear: say how many others stand in "
            'front and behind, by backbone_kwargs={"tokens_around": [1, 4]}, or register a layout (devil_hf.build.layouts).'
        )
    return found[0]


def _first_tokens(module: nn.Module, images: Tensor, layout: str, tokens: int) -> Tensor:
    """The first output of any submodule with so many tokens, as (images, tokens, channels)."""
    found: list[Tensor] = []
    batch = len(images)
    shape = (tokens, batch) if layout == "LNC" else (batch, tokens)

    def keep(_module, _inputs, output) -> None:
        tensor = first_tensor(output)
        if not found and tensor is not None and tensor.ndim == 3 and tensor.shape[:2] == shape:
            found.append(tensor.detach().float().clone())

    handles = [part.register_forward_hook(keep) for part in module.modules()]
    try:
        run(module, images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0].transpose(0, 1) if layout == "LNC" else found[0]


def _answers(module: nn.Module, images: Tensor, layout: str, before: Tensor, front: int, behind: int) -> bool:
    """Whether the tokens of three patches of the first image change most when these patches do."""
    tokens = before.shape[1]
    height, width = images.shape[-2:]
    rows, columns = token_grid(tokens - front - behind, height, width) or (1, 1)
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, columns // 2)):
        changed = images.clone()
        y, x = (slice(at * edge // n, (at + 1) * edge // n) for at, edge, n in ((row, height, rows), (column, width, columns)))
        changed[0, :, y, x] = 3 - changed[0, :, y, x]
        change = (_first_tokens(module, changed, layout, tokens)[0] - before[0]).norm(dim=-1)
        if int(change.argmax()) != front + row * columns + column:
            return False
    return True


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
