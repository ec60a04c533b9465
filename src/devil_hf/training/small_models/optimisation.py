"""How every small model is trained: one loop for networks of seconds to minutes, whose data are made as they are needed.

It is not transformers' Trainer, because a step here is a function of its number and of one generator: a backbone with heads
that are thrown away, scenes and documents that exist for one step, a curriculum. The Trainer would want a data set, a loader,
a model that returns its loss and a callback for each of them, and no small model goes on from a checkpoint.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from devil_hf.settings import option

logger = logging.get_logger(f"transformers.{__name__}")

BETAS = (0.9, 0.98)
GRADIENT_NORM = 1.0
SMOOTHING = 0.95  # of the loss that is reported


@dataclass
class OptimisationSettings:
    """How a small model is trained."""

    max_steps: int = option("optimiser steps", 2_500)
    batch_size: int = option("scenes or documents per step", 64)
    learning_rate: float = option("peak learning rate of AdamW, cosine decay to zero", 2e-3)
    warmup_steps: int = option("steps of linear warm-up", 200)
    weight_decay: float = option("weight decay of matrices; none on biases, norms and embeddings", 0.05)
    bf16: bool = option("compute in bfloat16 by autocast; the weights stay in float32", False)
    seed: int = option("seed of initialisation and of the drawn data", 0)
    logging_steps: int = option("steps between two rows of the history", 100)


def minimise(
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    settings: OptimisationSettings,
    measure: Callable[[], dict[str, float]] = dict,
) -> list[dict[str, float]]:
    """Train a module in place, by AdamW with warm-up, cosine decay and clipped gradients, and leave it in eval mode.

    Args:
        module: what is trained; parameters that need no gradient stay as they are.
        loss_of_step: the loss of a step, numbered from 1; the only thing that draws.
        measure: further figures for a row of the history; it must leave all generators alone.

    Returns:
        The history, a row per `logging_steps` and one for the last step: `step`, the running `loss`, `seconds`, and what
        `measure` gives.

    Raises:
        FloatingPointError: when the loss is no longer finite.
    """
    module.train()
    optimizer = torch.optim.AdamW(_groups(module, settings.weight_decay), lr=settings.learning_rate, betas=BETAS)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.max_steps)
    device = next(module.parameters()).device
    history: list[dict[str, float]] = []
    running, began = None, time.perf_counter()
    for step in trange(1, settings.max_steps + 1, desc="training", unit="step", leave=False):
        with _autocast(device, settings.bf16):
            loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}; lower learning_rate {settings.learning_rate}")
        running = value if running is None else SMOOTHING * running + (1 - SMOOTHING) * value
        if step % settings.logging_steps == 0 or step == settings.max_steps:
            seconds = time.perf_counter() - began
            history.append({"step": step, "loss": running, "seconds": seconds} | measure())
            logger.info(f"step {step}/{settings.max_steps}: {history[-1]}")
    module.eval()
    return history


def _groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: matrices decay; biases, norms and embeddings (and an output layer that is tied to them) do not."""
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    parameters = list(module.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2 and id(parameter) not in embeddings]
    plain = [parameter for parameter in parameters if parameter.ndim < 2 or id(parameter) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


__all__ = ["OptimisationSettings", "minimise"]
