"""`devil space`: the demo as a Space of the Hub."""

import tempfile
from dataclasses import dataclass
from typing import Any

from devil_hf.cli.push import listing
from devil_hf.cli.verb import VERBS, Verb, show
from devil_hf.settings import JsonSettings, option


@dataclass(kw_only=True)
class SpaceSettings(JsonSettings):
    """Which Space, and which checkpoint answers in it."""

    space_id: str = option("created if need be", positional=True, metavar="USER/SPACE")
    checkpoint: str | None = option("Hub id (default: the shapes world of the package)", None, metavar="USER/REPO")
    private: bool | None = option("only you can see a new Space", None)
    commit_message: str | None = option("default: Upload DeViL demo", None)
    dry_run: bool = option("show files and card, and send nothing", False)


def space(settings: SpaceSettings) -> None:
    """Publish, or show what would be published."""
    from devil_hf.hub.spaces import prepare_space, push_space

    if settings.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            draft = prepare_space(settings.space_id, folder, settings.checkpoint)
            tree, card = draft.tree(), str(draft.card)
        show(settings, {"files": tree, "card": card}, listing(tree, card))
        return
    sent: dict[str, Any] = {"private": settings.private, "commit_message": settings.commit_message}
    url = push_space(settings.space_id, settings.checkpoint, **sent)
    show(settings, {"space_id": settings.space_id, "url": url}, url)


VERBS.register(
    "space",
    Verb(
        "space",
        "publish the demo as a Space of the Hub",
        "devil space user/devil-demo --checkpoint user/devil-shapes",
        lambda: SpaceSettings,
        space,
    ),
)
