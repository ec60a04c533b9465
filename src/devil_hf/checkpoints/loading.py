"""Models and processors by name, for the command line and the demo."""

import sys
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoProcessor

from devil_hf.checkpoints import locate
from devil_hf.checkpoints.quantised import quantise
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor

PROCESSOR_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def load(
    checkpoint: str | PathLike | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    token: bool | str | None = None,
    quantize: str | None = None,
) -> tuple[DevilModel, DevilProcessor]:
    """Load a model and its processor.

    Args:
        checkpoint: a name, directory or Hub id, see `locate`; None for that of photographs.
        device: None chooses CUDA where there is one.
        token: for the Hub; None for this machine's own where there is one, False for none, whatever the checkpoint names.
        quantize: "int8" rounds language model and translator, for faster answers on a CPU that are not exact, see `quantised.py`;
            where nothing is said of the device, it is the CPU.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} is neither None nor 'int8'.")
    source = locate(checkpoint)
    device = device or ("cuda" if torch.cuda.is_available() and quantize is None else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise ValueError(f"device={device!r} is not there ({str(error).partition('.')[0]}): leave it out, or name cpu") from error
    model = AutoModel.from_pretrained(source, dtype=dtype, token=token).to(device).eval()
    model = model if quantize is None else quantise(model)
    if token is False and not Path(source).is_dir():
        # transformers asks for a repository's list of templates with whatever token there is.
        source = snapshot_download(str(source), allow_patterns=PROCESSOR_FILES, token=False)
    return model, AutoProcessor.from_pretrained(source, token=token)


def open_checkpoint(
    checkpoint: str | PathLike | None = None, device: str | None = None, quantize: str | None = None
) -> tuple[DevilModel, DevilProcessor]:
    """Load a model and its processor, see `load`; say on stderr what the checkpoint knows, where only a reader can compare."""
    model, processor = load(checkpoint, device, quantize=quantize)
    if model.config.scope and model.config.scope_statistics is None:
        print(f"note: {model.config.scope}", file=sys.stderr)
    return model, processor
