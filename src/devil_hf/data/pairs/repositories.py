"""Shards of a data repository of the Hub, at one commit.

`datasets` says which files belong to a split; the shards are then read by `devil_hf.data.pairs.shards`, which goes on behind a
damaged one. A shard that lies in the cache of huggingface_hub (`hf download --repo-type dataset REPO`) is read there, any other
is streamed. Without network, or where HF_HUB_OFFLINE forbids it, the cache is all there is.
"""

from pathlib import Path

from datasets import load_dataset_builder
from huggingface_hub import HfApi, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

logger = logging.get_logger(f"transformers.{__name__}")

UNREACHABLE = "the Hub cannot be reached"
ASKED = 10  # seconds that the Hub has to answer whether it has a repository


def kept_folder(repo: str, kind: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the cache, as much of it as was downloaded; None where that is not even its first file.

    Args:
        kind: `model`, whose first file is its configuration, or `dataset`, of which there is a tar shard.
    """
    try:
        # Asked for no file, it gives the folder of a part as well; else it refuses what it knows to be incomplete.
        found = snapshot_download(repo, repo_type=kind, revision=revision, local_files_only=True, allow_patterns=[])
    except (OSError, ValueError):  # the latter for what cannot be a repository's name
        return None
    folder = Path(found)
    return folder if any(folder.rglob("config.json" if kind == "model" else "*.tar")) else None


def refusal(repo: str, kind: str, revision: str | None = None) -> str:
    """Why a repository cannot be had from the Hub now; empty where it can. It is asked once, without retries."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE forbids to ask the Hub"
    try:
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=ASKED)
    except HfHubHTTPError as error:
        return f"the Hub refuses it: {type(error).__name__}, {error.response.status_code}"
    except Exception as error:  # whatever its transport raises, which is no OSError
        return f"{UNREACHABLE}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""


def repository_shards(repo: str, split: str, revision: str | None = None) -> dict[str, str]:
    """Where each shard of a split is read, by its name, `hf://datasets/REPO@COMMIT/FILE`, in the repository's order.

    Raises:
        OSError: for a repository or revision that is neither within reach nor in the cache.
        ValueError: for a repository without such a split, or one that is not made of tar shards.
    """
    reason = refusal(repo, "dataset", revision)
    if not reason:
        names = _files_of_split(repo, repo, split, revision)
        return {name: _kept_file(name, repo) or name for name in names}
    folder = kept_folder(repo, "dataset", revision)
    if folder is None:
        at = f" at {revision}" if revision else ""
        raise OSError(f"the data repository {repo}{at} is not in the cache, and {reason}")
    files = _files_of_split(str(folder), repo, split)
    logger.warning(f"{repo}: {len(files)} shards of {split} are in the cache; whether it has more is not known, as {reason}")
    return {f"hf://datasets/{repo}@{folder.name}/{Path(file).relative_to(folder).as_posix()}": file for file in files}


def _files_of_split(place: str, repo: str, split: str, revision: str | None = None) -> list[str]:
    try:
        files = load_dataset_builder(place, revision=revision).config.data_files or {}
    except OSError as error:  # a repository that is there, but has no data
        raise ValueError(f"the data repository {repo} has no shards: {str(error).splitlines()[0]}") from error
    known = {str(name): [str(file) for file in found] for name, found in files.items()}
    if split not in known:
        raise ValueError(f"the data repository {repo} has no split {split!r}; its splits are {sorted(known)}")
    if other := next((file for file in known[split] if not file.endswith(".tar")), None):
        raise ValueError(f"the data repository {repo} has {other.rpartition('/')[-1]}, which is no tar shard: use kind `hub`")
    return known[split]


def _kept_file(name: str, repo: str) -> str | None:
    commit, _, file = name.removeprefix(f"hf://datasets/{repo}@").partition("/")
    kept = try_to_load_from_cache(repo, file, repo_type="dataset", revision=commit)
    return kept if isinstance(kept, str) else None


__all__ = ["UNREACHABLE", "kept_folder", "refusal", "repository_shards"]
