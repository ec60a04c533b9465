"""Arrays in npy files that somebody else wrote: read without running anything, or named in an error."""

from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np


def read_array(path: str | PathLike, mapped: bool = False) -> np.ndarray:
    """The array of an npy file.

    Args:
        mapped: leave it on the disk until it is asked for.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no npy file, damaged, or of objects, which could hold code.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is absent")
    mode: Literal["r"] | None = "r" if mapped else None
    try:
        found = np.load(file, mmap_mode=mode, allow_pickle=False)
    except (EOFError, OSError, SyntaxError, TypeError, ValueError) as error:  # what its parser makes of a damaged header
        reason = str(error).partition(":")[0] or type(error).__name__  # behind a colon numpy shows what it found there
        raise ValueError(f"{file} is no npy file of numbers, or damaged ({reason}): write it anew with numpy.save") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "buif":
        raise ValueError(f"{file} holds no array of numbers: write it anew with numpy.save")
    return found


__all__ = ["read_array"]
