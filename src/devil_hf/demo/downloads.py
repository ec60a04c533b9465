"""Repositories of the Hub that visitors name: which of their files come here, how many bytes, and where they lie.

Only settings and safetensors at the top of a repository are fetched, never code nor pickles, after their sizes were asked for, of
the very commit that was asked, and without any account: what the owner's may read is for those whom the owner has named.
They lie in a folder of their own, whose least used repositories give way to new ones.
"""

import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound

MAX_BYTES = 4 * 2**30  # of one checkpoint with the sources of its frozen parts
MAX_SETTINGS_BYTES = 32 * 2**20  # of one file that holds no weights: vocabularies are the largest
MAX_FILES = 100
DISK_BYTES = 12 * 2**30  # of everything that visitors have named
SPARE_BYTES = 2 * 2**30  # of the disk, which stay free
WEIGHTS = ".safetensors"
FETCHED = re.compile(r"\w[\w.-]*\.(?:json|safetensors|txt|model)", re.ASCII)  # no folders, hence no way out of one
REVISION = re.compile(r"\w[\w./-]*", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """What there is to fetch of a repository.

    Args:
        name: its Hub id.
        commit: the one whose files these are.
        files: names and bytes.
        token: of the account that may read it; False for nobody's.
    """

    name: str
    commit: str
    files: dict[str, int]
    token: str | bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


class Downloads:
    """The folder of what visitors have named.

    Args:
        folder: None for one beside the Hub's cache.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._lock = threading.Lock()

    def ask(self, name: str, revision: str | None = None, token: str | bool = False) -> Repository:
        """What there is to fetch.

        Raises:
            ValueError: where the Hub has no such repository for this account, or it is too large.
        """
        if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
            raise ValueError(f"{name} is asked for at {revision[:40]!r}, which is no commit, branch or tag.")
        try:
            info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
        except Exception as error:  # of the Hub; and transport errors, which are no OSError and belong to the HTTP library
            raise ValueError(f"{name} cannot be found on the Hub, or the Hub cannot be reached from here.") from error
        files = {one.rfilename: one.size for one in info.siblings or [] if FETCHED.fullmatch(one.rfilename)}
        if len(files) > MAX_FILES:
            raise ValueError(f"{name} has {len(files)} files; at most {MAX_FILES} are fetched.")
        if not any(file.endswith(WEIGHTS) for file in files):
            raise ValueError(f"{name} has no safetensors, and weights of other kinds are not read here.")
        for file, size in files.items():
            if size is None:
                raise ValueError(f"{name} does not say how large its {file} is.")
            if size > MAX_SETTINGS_BYTES and not file.endswith(WEIGHTS):
                raise ValueError(f"{name} has a {file} of {size >> 20} MB; at most {MAX_SETTINGS_BYTES >> 20} MB are read.")
        repository = Repository(name, str(info.sha), {file: int(size or 0) for file, size in files.items()}, token)
        check_size(name, repository.size)
        return repository

    def fetch(self, repository: Repository) -> Path:
        """The files of a repository in a local folder.

        Raises:
            OSError: where a download fails, or the disk has no room.
        """
        folder = self.folder or Path(constants.HF_HUB_CACHE).with_name("visitors")
        with self._lock:
            make_room(folder, repository)
            path = snapshot_download(
                repository.name,
                revision=repository.commit,
                allow_patterns=list(repository.files),
                cache_dir=folder,
                token=repository.token,
            )
        return Path(path)


def make_room(folder: Path, repository: Repository) -> None:
    """Delete the repositories that were used longest ago, until `DISK_BYTES` hold the new one, too.

    Raises:
        OSError: where the disk is fuller than that.
    """
    try:
        cache = scan_cache_dir(folder)
    except CacheNotFound:
        folder.mkdir(parents=True, exist_ok=True)
        cache = scan_cache_dir(folder)
    size, others = cache.size_on_disk + repository.size, sorted(cache.repos, key=lambda repo: repo.last_accessed)
    for other in others:
        if size <= DISK_BYTES and shutil.disk_usage(folder).free >= repository.size + SPARE_BYTES:
            return
        if other.repo_id != repository.name:
            cache.delete_revisions(*(one.commit_hash for one in other.revisions)).execute()
            size -= other.size_on_disk
    if shutil.disk_usage(folder).free < repository.size:
        raise OSError(f"there is no room for {repository.name} on this machine's disk")


def check_size(name: str, size: int) -> None:
    """Raise a ValueError for more bytes than are fetched."""
    if size > MAX_BYTES:
        raise ValueError(f"{name} has {size / 2**30:.0f} GB; at most {MAX_BYTES >> 30} GB are loaded.")


__all__ = ["Downloads", "Repository", "check_size"]
