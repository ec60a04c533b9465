"""A repository as it lies in a folder before it goes up, and the one commit that sends it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard

_TOKEN = re.compile(r"(Bearer |hf_)[^\s'\"]+")


@dataclass
class Draft:
    """A repository that is ready to be pushed.

    Args:
        folder: where its files lie.
        card: its card, also in `folder/README.md`.
        notes: what its publisher should know: what the card could not say.
    """

    folder: Path
    card: RepoCard
    notes: list[str]

    def tree(self) -> dict[str, int]:
        """Path -> bytes of every file."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}


def new_folder(folder: str | PathLike) -> Path:
    """An empty folder, made if need be.

    Raises:
        ValueError: when something is in it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: everything in it would be published; name a new folder")
    return folder


def commit(
    api: HfApi,
    draft: Draft,
    repo_id: str,
    outdated: Callable[[str], bool],
    message: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
) -> CommitInfo:
    """Send every file of a draft in one commit, so that nobody ever loads the weights of one push with the code of another.

    Args:
        outdated: which files of an earlier push go, where the draft has none of that name.
    """
    tree = draft.tree()
    published = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
    deletions = [CommitOperationDelete(path) for path in published if path not in tree and outdated(path)]
    additions = [CommitOperationAdd(path, draft.folder / path) for path in tree]
    return api.create_commit(repo_id, [*deletions, *additions], commit_message=message, repo_type=repo_type, revision=revision)


@contextmanager
def reaching_the_hub(what: str) -> Iterator[None]:
    """Whatever the Hub's client raises (its transport errors are no OSError) comes as an OSError with a remedy.

    A token that is no header is quoted by the client; it is in neither message nor traceback.
    """
    try:
        yield
    except Exception as error:
        said = _TOKEN.sub(r"\1***", str(error))
        raise OSError(
            f"{what} ({type(error).__name__}: {said}). Check the network and `hf auth login`, and run the same command "
            "again: files that arrived are not sent twice."
        ) from (error if said == str(error) else None)


__all__ = ["Draft", "commit", "new_folder", "reaching_the_hub"]
