"""Folders that work writes to: claimed by one run at a time, written whole or not at all, and asked for room before long work.

A claim is a file, made in one step where it is not there, so that it needs no locks of the file system. It names process, host
and start; one whose process is gone is taken over. Whether a process of another host runs cannot be seen: its claim stays, and
the message says what to remove; a SLURM job that was requeued knows, though, that its own earlier run is over. A file or folder
that is written appears under its name when it is whole, and has a name of its writer alone until then.
"""

import contextlib
import errno
import functools
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLAIM = ".claimed"
YOUNG = 10.0  # seconds in which a claim without content is being written
GONE = "gone"
UNFINISHED = ".unfinished-"
FORGOTTEN = 86_400.0  # seconds after which what another host has not finished is taken for left behind
# What writers say when there is no room: the system itself, and libraries that hand on its text alone.
FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = ("no space left", "file too large", "quota exceeded", "file write failed", "unexpected pos")

# By process, for a forked one has what its parent held, but not its claims: the token of the claim, once for each that shares it.
_held: dict[tuple[int, Path], list[str]] = {}
_holding = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_holding.acquire, after_in_parent=_holding.release, after_in_child=_holding.release)


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
    if not mine:
        yield
        return
    place, process = Path(folder).resolve(), os.getpid()
    with _holding:
        sharing = _held.setdefault((process, place), [])
        sharing.append(sharing[0] if sharing else _claim(place, work))
    try:
        yield
    finally:
        if os.getpid() == process:  # and not one that was forked meanwhile
            with _holding:
                token = sharing.pop()
                if not sharing:
                    _give_back(place / CLAIM, token)


def _claim(place: Path, work: str) -> str:
    """Claim a folder; the token of the claim."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError("it belongs to somebody else, or its disk is only read")
    except OSError as error:
        if is_full(error):
            raise _told(error, place) from error
        why = "a file is there" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror or error
        raise type(error)(f"nothing can be written to the folder {place} ({why}): name another one") from error
    token = uuid.uuid4().hex
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_of(os.getpid()), "token": token}
    own |= {"job": _slurm_job(), "work": work, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    file, begun = place / CLAIM, time.monotonic()
    while not _create(file, own):
        _remove_if_stale(file, place, time.monotonic() - begun)
    return token


def _give_back(file: Path, token: str) -> None:
    with contextlib.suppress(OSError):  # it can be taken over when this process has ended
        if _read(file).get("token") == token:
            file.unlink()


def _slurm_job() -> list[str]:
    """Cluster, job and how often it was requeued; the number of a job stays when it is. Empty outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return [os.environ.get("SLURM_CLUSTER_NAME", ""), job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else []


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
    """What a claim says; empty where it is gone or without content, and an OSError where it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove_if_stale(file: Path, folder: Path, waited: float) -> None:
    """Take a claim away whose process is gone; a `FolderInUse` where it is there, or on a host that cannot be asked.

    Args:
        waited: seconds since it was first seen; what has no content for so long is nobody's, whatever the clock of its disk says.
    """
    try:
        found = _read(file)
    except OSError as error:  # somebody else's
        raise FolderInUse(
            f"{folder} is in use: {file} cannot be read ({error}). Ask its owner, or name another folder"
        ) from error
    if not found:  # it is being written this moment, or its writer was killed in that
        with contextlib.suppress(FileNotFoundError):
            if max(time.time() - file.stat().st_mtime, waited) < YOUNG:
                time.sleep(0.05)
                return
    elif _is_over(found.get("job"), _slurm_job()):
        pass
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


def _is_over(job: Any, now: list[str]) -> bool:
    """Whether a claim is of an earlier run of this SLURM job: it is ended everywhere before it is requeued."""
    return bool(now) and isinstance(job, list) and job[:2] == now[:2] and job[2:] != now[2:]


def _who(found: dict[str, Any]) -> str:
    return f"{found.get('work')} since {found.get('since')} (process {found.get('pid')} on {found.get('host')})"


def _runs(found: dict[str, Any]) -> bool:
    """Whether the process of a claim is there, and no later one that got its number."""
    pid = found.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    started = _start_of(pid)
    return _is_there(pid) and (started is None or found.get("started") in (None, started))


def _is_there(pid: int) -> bool:
    """Whether a process has this number."""
    if sys.platform != "win32":  # where the signal 0 is none
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
    return _start_of(pid) != GONE


def _start_of(pid: int) -> str | None:
    """When a process began, where the system says it; a dead one that nobody has waited for has not."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return GONE if state in "ZX" else f"{_boot()} {fields[18]}"


@functools.cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


@contextlib.contextmanager
def written(path: str | os.PathLike, kept: str = "") -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which takes the name `path` when the block has ended well.

    Whatever was there before stays until then. Several may write it at once: each to a place of its own, and the last one stays.

    Args:
        kept: what there is all the same, for the message of a full disk.

    Raises:
        DiskFull: when there was no room; nothing is left of the attempt.
    """
    path = Path(path)
    _sweep(path)
    unfinished = _own_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        _put(unfinished, path)
    except BaseException as error:
        _remove(unfinished)
        if isinstance(error, Exception) and is_full(error):
            raise _told(error, path, kept) from error
        raise


def _own_place(path: Path) -> Path:
    """A name beside `path` that no other writer has, and that says whose it is; the suffix stays: some writers add theirs."""
    return path.with_name(f"{UNFINISHED}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _sweep(path: Path) -> None:
    """Remove what killed writers of `path` have left beside it."""
    shape = re.compile(rf"{re.escape(UNFINISHED)}([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{8}}-{re.escape(path.name)}")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if match := shape.fullmatch(name):
                left, is_here = path.with_name(name), match[1] == _host()
                if not _is_there(int(match[2])) if is_here else time.time() - _last_change(left) > FORGOTTEN:
                    _remove(left)


def _last_change(path: Path) -> float:
    return max(one.lstat().st_mtime for one in [path, *path.rglob("*")])


def _put(new: Path, path: Path) -> None:
    """Let a file or folder take the name of another one, or of none; a folder that was there goes when the new one is there."""
    aside = _own_place(path)
    while True:
        if new.is_dir() and path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another writer has just put it aside
                os.rename(path, aside)
        try:
            os.replace(new, path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another writer was here first
                with contextlib.suppress(OSError):
                    os.rename(aside, path)
                raise
            _remove(aside)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 1) -> None:
    """Write JSON to a file, whole or not at all; a number that is not finite, for which JSON has no word, is null.

    Raises:
        DiskFull: when there is no room.
    """
    with written(path) as unfinished:
        unfinished.write_text(json.dumps(finite(content), indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same JSON-like value with null for every number that is none."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


__all__ = ["DiskFull", "FolderInUse", "claimed", "finite", "is_full", "need_room", "write_json", "written"]
