"""When a training has diverged: it ends with an error, and nothing that is not finite is kept.

A loss is looked at where it is on the host anyway, and weights before they are written, so that every checkpoint on the disk is
finite.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Diverged(FloatingPointError, RuntimeError):
    """A loss or weights of a training are not finite any more."""


def check_loss(loss: float, step: int, remedy: str) -> None:
    """Raise `Diverged` when a loss is not finite.

    Args:
        remedy: what to do about it.
    """
    if not math.isfinite(loss):
        raise Diverged(f"the training has diverged: the loss is {loss} at step {step}. {remedy}")


def check_weights(weights: Mapping[str, Tensor], step: int, remedy: str) -> None:
    """Raise `Diverged` when weights are not finite, before they are written anywhere."""
    wrong = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise Diverged(
            f"the training has diverged: {len(wrong)} of {len(weights)} weights are not finite at step {step}, {wrong[0]} among "
            f"them. {remedy}"
        )


__all__ = ["Diverged", "check_loss", "check_weights"]
