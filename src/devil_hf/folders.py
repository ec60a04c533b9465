"""Folders that work writes to: claimed by one run at a time, written whole or not at all, and asked for room before long work.

A claim is a file, made in one step where it is not there, so that it needs no locks of the file system. It names process, host
and start; one whose process is gone is taken over. A file or folder that is written appears under its name when it is whole.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLAIM = ".claimed"
YOUNG = 10.0  # seconds in which a claim without content is being written
# What writers say when there is no room: the system itself, and libraries that hand on its text alone.
FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = ("no space left", "file too large", "quota exceeded", "file write failed", "unexpected pos")

_held: Counter[Path] = Counter()  # by this process


class FolderInUse(OSError):
    """Another run works in the folder."""


class DiskFull(OSError):
    """There is no room for what is to be written."""


@contextlib.contextmanager
def claimed(folder: str | os.PathLike, work: str, mine: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be; work within work of one process shares its claim.

    Args:
        work: what is done there, for the other run's message.
        mine: whether this process claims it; of several processes of a run, the main one does.

    Raises:
        FolderInUse: when another run works there, on this host or perhaps on another one.
    """
    place = Path(folder).resolve()
    if not mine or _held[place]:
        with _counted(place, mine):
            yield
        return
    place.mkdir(parents=True, exist_ok=True)
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_of(os.getpid()), "token": uuid.uuid4().hex}
    own |= {"work": work, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    file = place / CLAIM
    while not _create(file, own):
        _remove_if_stale(file, place)
    try:
        with _counted(place, mine):
            yield
    finally:
        if _read(file).get("token") == own["token"]:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _counted(place: Path, mine: bool) -> Iterator[None]:
    _held[place] += mine
    try:
        yield
    finally:
        _held[place] -= mine


def _create(file: Path, own: dict[str, Any]) -> bool:
    """Whether the claim could be made: it was not there."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            json.dump(own, stream)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise _told(error, file) from error
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove_if_stale(file: Path, folder: Path) -> None:
    """Take a claim away whose process is gone; a `FolderInUse` where it is there, or on a host that cannot be asked."""
    found = _read(file)
    if not found:  # it is being written this moment, or its writer was killed in that
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime < YOUNG:
                time.sleep(0.05)
                return
    elif found.get("host") != socket.gethostname():
        raise FolderInUse(
            f"{folder} is in use: {_who(found)}. Whether it still runs cannot be seen from this host ({socket.gethostname()}): "
            f"wait for it, name another folder, or, if it is gone, remove {file}"
        )
    elif _runs(found):
        raise FolderInUse(f"{folder} is in use: {_who(found)}. Wait for it, end it, or name another folder")
    # Renamed first: of two runs that see the same dead claim, one takes it away, and none takes away the other's new one.
    taken = file.with_name(f"{CLAIM}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(file, taken)
        if _read(taken) != found:
            os.rename(taken, file)
        taken.unlink(missing_ok=True)


def _who(found: dict[str, Any]) -> str:
    return f"{found.get('work')} since {found.get('since')} (process {found.get('pid')} on {found.get('host')})"


def _runs(found: dict[str, Any]) -> bool:
    """Whether the process of a claim is there, and no later one that got its number."""
    pid = found.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    if sys.platform != "win32":  # where the signal 0 is none
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    started = _start_of(pid)
    return started is None or found.get("started") in (None, started)


def _start_of(pid: int) -> str | None:
    """When a process began, where the system says it; a dead one that nobody has waited for has not."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return "gone" if state in "ZX" else f"{_boot()} {fields[18]}"


@functools.cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


@contextlib.contextmanager
def written(path: str | os.PathLike, kept: str = "") -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which takes the name `path` when the block has ended well.

    Whatever was there before stays until then. In a folder that several processes write to, their names must differ.

    Args:
        kept: what there is all the same, for the message of a full disk.

    Raises:
        DiskFull: when there was no room; nothing is left of the attempt.
    """
    path = Path(path)
    unfinished = path.with_name(f".unfinished-{path.name}")  # the suffix stays: some writers add theirs
    _remove(unfinished)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        if unfinished.is_dir() and path.is_dir():
            _swap(unfinished, path)
        else:
            os.replace(unfinished, path)
    except Exception as error:
        _remove(unfinished)
        if is_full(error):
            raise _told(error, path, kept) from error
        raise


def _swap(new: Path, old: Path) -> None:
    """Put a folder in another one's place: the old one goes when the new one is there."""
    aside = old.with_name(f".{old.name}.old")
    _remove(aside)
    os.rename(old, aside)
    os.rename(new, old)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 1) -> None:
    """Write JSON to a file, whole or not at all.

    Raises:
        DiskFull: when there is no room.
    """
    with written(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def is_full(error: BaseException) -> bool:
    """Whether an error of writing says that there is no room (a full disk, a quota, a limit on the size of files)."""
    if isinstance(error, DiskFull | FolderInUse):
        return False  # told already
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_CODES
    return any(text in str(error).lower() for text in FULL_TEXTS)


def _told(error: BaseException, path: Path, kept: str = "") -> OSError:
    rest = f" {kept}." if kept else ""
    return DiskFull(f"{path} cannot be written, the disk is full ({error}).{rest} Make room, and run the same again")


def need_room(folder: str | os.PathLike, needed: float, what: str, remedy: str) -> None:
    """Raise a `DiskFull` when `needed` bytes do not fit on the disk of `folder`, which is made if need be.

    Args:
        what: is to be written, for the message.
        remedy: what else than making room would help.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DiskFull(f"{place} has {free / 1e9:.1f} GB free, but {what} needs {needed / 1e9:.1f} GB: make room, or {remedy}")


__all__ = ["DiskFull", "FolderInUse", "claimed", "is_full", "need_room", "write_json", "written"]
