"""`devil push`: a checkpoint on the Hub, with a card."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devil_hf.cli.verb import VERBS, Verb, show
from devil_hf.settings import JsonSettings, option


@dataclass(kw_only=True)
class PushSettings(JsonSettings):
    """What is published, where, and what its card says."""

    checkpoint: str = option("directory", positional=True)
    repo_id: str = option("created if need be", positional=True, metavar="USER/REPO")
    private: bool | None = option("only you can see a new repository", None)
    revision: str | None = option("branch to push to, created if need be (default: main)", None, metavar="BRANCH")
    commit_message: str | None = option("default: Upload DeViL checkpoint", None)
    slim: bool = option("the translator, and the sources of the rest (default: as the checkpoint is)", False)
    self_contained: bool = option("all weights (default: as the checkpoint is)", False)
    images: list[str] | None = option("examples for the card, published too", None)
    phrases: list[str] = option("words to map (default: what the model says)", [])
    scores: list[Path] = option("JSON results of evaluations", [], metavar="FILE")
    license: str | None = option("identifier of the Hub, such as apache-2.0 (default: unknown)", None)
    datasets: list[str] = option("Hub ids of the training data", [], metavar="ID")
    data: str | None = option("the training data in words", None)
    language: str = option("of the descriptions", "en")
    space: str | None = option("also publish the demo, with this checkpoint", None, metavar="USER/SPACE")
    dry_run: bool = option("show files and card, and send nothing", False)
    output_dir: Path | None = option("with --dry-run: keep the files here, to look at the pictures", None)

    def validate(self) -> None:
        """Raise a ValueError for options that exclude each other."""
        if self.slim and self.self_contained:
            raise ValueError("--slim and --self-contained exclude each other: give one, or neither")
        if self.output_dir and not self.dry_run:
            raise ValueError("--output-dir keeps the files of a --dry-run: give both, or neither")

    def contents(self) -> dict[str, Any]:
        """What is published, as `devil_hf.hub.publish.prepare` takes it."""
        names = ("revision", "images", "phrases", "scores", "license", "datasets", "data", "language")
        kind = self.slim if self.slim or self.self_contained else None
        return {name: getattr(self, name) for name in names} | {"slim": kind}


def push(settings: PushSettings) -> None:
    """Publish, or show what would be published."""
    from devil_hf.hub.publish import prepare
    from devil_hf.hub.publish import push as push_checkpoint
    from devil_hf.hub.spaces import prepare_space, push_space

    space, repo_id = settings.space, settings.repo_id
    if space:
        with tempfile.TemporaryDirectory() as folder:
            prepare_space(space, folder, repo_id)  # its errors come before anything is public
    if settings.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            draft = prepare(settings.checkpoint, repo_id, settings.output_dir or folder, **settings.contents())
            tree, card = draft.tree(), str(draft.card)
        if space:
            draft.notes.append(f"`devil space {space} --checkpoint {repo_id} --dry-run` shows the Space")
        show(settings, {"files": tree, "card": card, "notes": draft.notes}, listing(tree, card))
        if not settings.json:
            print("\n".join(f"note: {note}" for note in draft.notes), file=sys.stderr)
        return
    sent: dict[str, Any] = {"private": settings.private, "commit_message": settings.commit_message}
    urls = {"commit": push_checkpoint(settings.checkpoint, repo_id, **settings.contents(), **sent)}
    if space:
        urls["space"] = push_space(space, repo_id, **sent)
    show(settings, {"repo_id": repo_id} | urls, "\n".join(urls.values()))


def listing(tree: dict[str, int], card: str) -> str:
    """Files with their sizes, and the card, as text."""
    files = "\n".join(f"{size:>13,}  {path}" for path, size in tree.items())
    return f"{files}\n{sum(tree.values()):>13,}  bytes in {len(tree)} files; nothing was sent\n\n{card}"


VERBS.register(
    "push",
    Verb(
        "push",
        "publish a checkpoint on the Hub, with a card",
        "devil push devil-quickstart/checkpoint user/devil-shapes --scores devil-quickstart/scores.json --dry-run",
        lambda: PushSettings,
        push,
    ),
)
