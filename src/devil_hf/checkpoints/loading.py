"""Models and processors by name, for the command line and the demo."""

import sys
from os import PathLike

import torch
from transformers import AutoModel, AutoProcessor

from devil_hf.checkpoints import locate
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor


def load(
    checkpoint: str | PathLike | None = None, device: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[DevilModel, DevilProcessor]:
    """Load a model and its processor.

    Args:
        checkpoint: a name, directory or Hub id, see `locate`; None for the checkpoint of the shapes world.
        device: None chooses CUDA where there is one.
    """
    source = locate(checkpoint)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise ValueError(f"device={device!r} is not there ({str(error).partition('.')[0]}): leave it out, or name cpu") from error
    model = AutoModel.from_pretrained(source, dtype=dtype).to(device).eval()
    return model, AutoProcessor.from_pretrained(source)


def open_checkpoint(checkpoint: str | PathLike | None = None, device: str | None = None) -> tuple[DevilModel, DevilProcessor]:
    """Load a model and its processor, see `load`, and say on stderr what the checkpoint knows, where it says so."""
    model, processor = load(checkpoint, device)
    if model.config.scope:
        print(f"note: {model.config.scope}", file=sys.stderr)
    return model, processor
