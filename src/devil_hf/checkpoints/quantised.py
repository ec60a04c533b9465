"""Language model and translator in whole numbers of 8 bits, for CPUs: faster answers that are not exact (opt-in).

Weights are rounded once, symmetrically, with one scale for each output; activations in every call, with one for each row. Their
products are whole numbers of 32 bits. torchao's layers compute the same, but are made for `torch.compile`: without it they are
slower than fp32 where there are few rows. `torch.ao.quantization` has one scale for all rows, and tensors that torch will drop.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from devil_hf.model.checkpoint_devil import LORA_NAME
from devil_hf.model.modeling_devil import DevilModel

REFUSED = "is rounded: it answers, and is neither trained nor saved; load it without."
LEAST = 2  # columns of weights
LARGEST = 127  # of a symmetric whole number of 8 bits


class Int8Linear(nn.Module):
    """A linear layer (N, ..., I) -> (N, ..., O) with int8 weights, on a CPU in fp32 alone: a ValueError says so of others.

    Args:
        weight: (O, I) in fp32, I of 2 or more: of one column, torch multiplies what lies behind it in memory.
        bias: (O,), or None.
    """

    weights: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        if weight.shape[1] < LEAST:
            raise ValueError(f"weights {tuple(weight.shape)} have too few columns to be multiplied as whole numbers: {LEAST}")
        whole, scales = _rounded(weight.detach())
        self.register_buffer("weights", whole.t())
        self.register_buffer("scales", scales[:, 0])
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dtype != torch.float32 or inputs.device.type != "cpu":
            asked = f"{inputs.dtype} on {inputs.device}"
            raise ValueError(f"a model of quantize='int8' answers in fp32 on a CPU, and not in {asked}: load it without.")
        rows, scales = _rounded(inputs.flatten(0, -2))
        outputs = torch._int_mm(rows, self.weights) * scales
        outputs = outputs.mul_(self.scales) if self.bias is None else torch.addcmul(self.bias, outputs, self.scales)
        return outputs.unflatten(0, inputs.shape[:-1])


def _rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, I) as int8, and their scales (N, 1)."""
    scales = (values.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(torch.finfo(values.dtype).tiny)
    return (values / scales).round_().to(torch.int8), scales


class RoundedDevilModel(DevilModel):
    """A model of which parts are rounded: it answers, and is neither trained nor saved."""

    def train(self, mode: bool = True) -> "RoundedDevilModel":
        """Refuse training; see `DevilModel.train`."""
        if mode:
            raise ValueError(f"a model of quantize='int8' {REFUSED}")
        return super().train(False)  # type: ignore[return-value]

    def save_pretrained(self, *_arguments: Any, **_options: Any) -> None:  # type: ignore[override]
        """Refuse saving."""
        raise ValueError(f"a model of quantize='int8' {REFUSED}")

    def push_to_hub(self, *_arguments: Any, **_options: Any) -> None:  # type: ignore[override]
        """Refuse publishing, before a repository is made for it."""
        raise ValueError(f"a model of quantize='int8' {REFUSED}")


def quantise(model: DevilModel) -> DevilModel:
    """Round the language model and the translator of a model, in place; adapters, embeddings and the backbone stay.

    Raises:
        ValueError: for a model that is not on a CPU in fp32; and from then on for saving or training it.
    """
    for part in (model.language_model, model.translator):
        for name, weight in part.named_parameters():
            if weight.device.type != "cpu" or weight.dtype != torch.float32:
                raise ValueError(
                    f"quantize='int8' is for models in fp32 on a CPU, but {name} is {weight.dtype} on {weight.device}: load the "
                    "model with device='cpu' and without dtype."
                )
        for name, module in list(part.named_modules()):
            linear = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
            if LORA_NAME in f".{name}" or not (linear or isinstance(module, Conv1D)):
                continue
            weight = module.weight if linear else module.weight.t()
            if weight.shape[1] >= LEAST:
                small = Int8Linear(weight, module.bias)
                # The head's hooks check what comes out of it.
                for before in module._forward_pre_hooks.values():
                    small.register_forward_pre_hook(before)
                for after in module._forward_hooks.values():
                    small.register_forward_hook(after)
                part.set_submodule(name, small)
    model.__class__ = RoundedDevilModel
    return model.eval()


__all__ = ["Int8Linear", "RoundedDevilModel", "quantise"]
