"""Which attention trainings compute with."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def short_attention(device: torch.device) -> AbstractContextManager:
    """Attention for sequences as short as captions, around a forward pass.

    In bf16 on a CPU, a small language model's step on 128 captions of 24 positions takes .64 s with matrix products, .76 with the
    fused kernel; in fp32, and elsewhere, nothing is gained.
    """
    plain = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


__all__ = ["short_attention"]
