"""How a training writes its checkpoints, and what becomes of the weights when there is no room for one.

A checkpoint of the run stays until the next one is whole. Weights that cannot be written where they belong go to the temporary
directory, which is often another disk, and the error says where they are.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from devil_hf.folders import DiskFull, is_full
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor


def write_checkpoint(
    folder: Path,
    model: DevilModel,
    processor: DevilProcessor,
    files: Mapping[str, str],
    slim: bool,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint that `AutoModel.from_pretrained` loads.

    Args:
        files: content by name of what else goes into it.
        slim: without the frozen parts, which have sources.
        state_dict: weights that were gathered, instead of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if slim and state_dict is not None:
        state_dict = model.trainable_state_dict(state_dict)
    model.save_pretrained(folder, slim=slim, state_dict=state_dict)
    processor.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def save_elsewhere(
    error: Exception, place: Path, kept: str, model: DevilModel, processor: DevilProcessor, files: Mapping[str, str], slim: bool
) -> NoReturn:
    """Write the weights to the temporary directory, and raise a `DiskFull` that says where they and the run are.

    Args:
        error: of writing to `place`; raised as it is when it does not come of a full disk.
        kept: what the folder of the run still holds.
    """
    if not (is_full(error) or isinstance(error, DiskFull)):
        raise error
    said = f"{place} cannot be written, the disk is full ({error.__cause__ or error})."
    try:
        folder = Path(tempfile.mkdtemp(prefix="devil-hf-"))
        write_checkpoint(folder, model, processor, files, slim)
        said += f" The weights are kept in {folder}, a checkpoint that loads."
    except Exception as other:
        if not (is_full(other) or isinstance(other, OSError)):
            raise
        said += f" Nor could they be kept in {tempfile.gettempdir()} (TMPDIR names another place): {other}."
    raise DiskFull(f"{said} {kept} Make room, and run the same again with --resume (quickstart does by itself)") from error


def newest_kept(output_dir: str | os.PathLike) -> str:
    """What a run's folder holds, as a sentence."""
    steps = sorted(int(folder.name.rpartition("-")[2]) for folder in Path(output_dir).glob("checkpoint-[0-9]*"))
    if not steps:
        return "No checkpoint was written before."
    return f"The newest whole checkpoint is {Path(output_dir) / f'checkpoint-{steps[-1]}'}."


__all__ = ["newest_kept", "save_elsewhere", "write_checkpoint"]
