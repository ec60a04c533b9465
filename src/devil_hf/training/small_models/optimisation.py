"""How every small model is trained: one loop for networks of seconds to minutes, whose data are made as they are needed.

It is not transformers' Trainer, because a step here is a function of its number and of one generator: a backbone with heads
that are thrown away, scenes and documents that exist for one step, a curriculum. The Trainer would want a data set, a loader,
a model that returns its loss and a callback for each of them. A stopped training goes on from one file, exactly.
"""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from devil_hf.folders import need_room, written
from devil_hf.settings import option
from devil_hf.training.attention import short_attention
from devil_hf.training.divergence import check_loss, check_weights

logger = logging.get_logger(f"transformers.{__name__}")

BETAS = (0.9, 0.98)
GRADIENT_NORM = 1.0
SMOOTHING = 0.95  # of the loss that is reported
STATES = 7  # times the weights: two states, each with two moments of every weight, and the model in the end
SAVE_SECONDS = 30.0  # between two states of an unfinished training


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


@dataclass
class Unfinished:
    """Where a training that was stopped goes on; the caller removes the file once he has kept what came out.

    Args:
        file: its state.
        key: what decides the training, as JSON: a state of another one is refused.
        draws: what has to be kept of whatever draws the data, as JSON.
        redraw: brings that back.
    """

    file: Path
    key: dict[str, Any]
    draws: Callable[[], Any]
    redraw: Callable[[Any], None]

    def save(self, parts: dict[str, Any], passed: dict[str, Any]) -> None:
        """Write the state of the parts of a training, and what it has come to."""
        content = passed | {name: part.state_dict() for name, part in parts.items()}
        more = {"key": json.dumps(self.key, sort_keys=True), "draws": json.dumps(self.draws()), "random": torch.get_rng_state()}
        with written(self.file, "The state of before is kept") as unfinished:
            torch.save(content | more, unfinished)

    def load(self, parts: dict[str, Any]) -> dict[str, Any] | None:
        """Bring parts and draws back to the state in the file, if there is one; what the training had come to.

        Raises:
            ValueError: for that of another training.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in parts["module"].state_dict().values())
        need_room(self.file.parent, STATES * size, "the training", "name another folder")
        if not self.file.is_file():
            return None
        content = torch.load(self.file, map_location="cpu", weights_only=True)
        if json.loads(content["key"]) != json.loads(json.dumps(self.key)):
            before = json.loads(content["key"])
            changed = sorted(name for name in {*before, *self.key} if before.get(name) != self.key.get(name))
            raise ValueError(f"{self.file} is of a training with other values of {changed}: remove it, or name another folder")
        for name, part in parts.items():
            part.load_state_dict(content[name])
        self.redraw(json.loads(content["draws"]))
        torch.set_rng_state(content["random"])
        return content


def state_of(file: Path, settings: OptimisationSettings, generator: np.random.Generator) -> Unfinished:
    """That of a training whose settings and generator decide everything."""

    def redraw(state: Any) -> None:
        generator.bit_generator.state = state

    return Unfinished(file, asdict(settings), lambda: generator.bit_generator.state, redraw)


def minimise(
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    settings: OptimisationSettings,
    measure: Callable[[], dict[str, float]] = dict,
    unfinished: Unfinished | None = None,
) -> list[dict[str, float]]:
    """Train a module in place, by AdamW with warm-up, cosine decay and clipped gradients, and leave it in eval mode.

    Args:
        module: what is trained; parameters that need no gradient stay as they are.
        loss_of_step: the loss of a step, numbered from 1; the only thing that draws.
        measure: further figures for a row of the history; it must leave all generators alone.
        unfinished: where a stopped training goes on.

    Returns:
        The history, a row per `logging_steps` and one for the last step: `step`, the running `loss`, `seconds`, and what
        `measure` gives.

    Raises:
        Diverged: when the loss or the weights are no longer finite.
    """
    module.train()
    optimizer = torch.optim.AdamW(_groups(module, settings.weight_decay), lr=settings.learning_rate, betas=BETAS)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.max_steps)
    device = next(module.parameters()).device
    history: list[dict[str, float]] = []
    running, began, first = None, time.perf_counter(), 1
    parts = {"module": module, "optimizer": optimizer, "schedule": schedule}
    if unfinished and (state := unfinished.load(parts)) is not None:
        history, running, first, began = state["history"], state["running"], state["step"] + 1, began - state["seconds"]
        logger.warning(f"going on at step {first} of {settings.max_steps}")
    remedy, saved = f"Lower learning_rate {settings.learning_rate}", time.perf_counter()
    steps = range(first, settings.max_steps + 1)
    for step in tqdm(steps, desc="training", unit="step", initial=first - 1, total=settings.max_steps, leave=False):
        optimizer.zero_grad()
        with _autocast(device, settings.bf16), short_attention(device):
            loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        value = float(loss.detach())
        check_loss(value, step, remedy)
        running = value if running is None else SMOOTHING * running + (1 - SMOOTHING) * value
        if step % settings.logging_steps == 0 or step == settings.max_steps:
            seconds = time.perf_counter() - began
            history.append({"step": step, "loss": running, "seconds": seconds} | measure())
            logger.info(f"step {step}/{settings.max_steps}: {history[-1]}")
        if unfinished and (step == settings.max_steps or time.perf_counter() - saved >= SAVE_SECONDS):
            check_weights(module.state_dict(), step, remedy)
            saved = time.perf_counter()
            unfinished.save(parts, {"history": history, "running": running, "step": step, "seconds": saved - began})
    check_weights(module.state_dict(), settings.max_steps, remedy)
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


__all__ = ["OptimisationSettings", "Unfinished", "minimise", "state_of"]
