"""What a person sees of a training: one line with its loss and the time that is left; the records of the run have all numbers."""

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

SHOWN = {"loss": "loss", "eval_loss": "validation loss"}  # of what is logged, and how it is called


class Progress(TrainerCallback):
    """A bar of the steps with the newest losses behind it, drawn by the first process of each machine."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.losses: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.losses = {}
        if state.is_local_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses |= {SHOWN[name]: f"{value:.3f}" for name, value in (logs or {}).items() if name in SHOWN}
        if self.bar is not None:
            self.bar.set_postfix(self.losses, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


__all__ = ["Progress"]
