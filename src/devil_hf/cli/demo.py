"""`devil demo`: a checkpoint in the browser."""

from dataclasses import dataclass

from devil_hf.cli.verb import VERBS, Verb
from devil_hf.settings import option


@dataclass(kw_only=True)
class DemoSettings:
    """Which checkpoint answers, and where the demo listens."""

    checkpoint: str | None = option("name, directory or Hub id (default: DEVIL_CHECKPOINT, else both shipped ones)", None)
    device: str | None = option("default: cuda where there is one", None)
    host: str | None = option("address to listen on (default: this machine alone)", None)
    port: int | None = option("default: the first free one from 7860 on", None, least=1)


def demo(settings: DemoSettings) -> None:
    """Serve until interrupted."""
    from devil_hf.demo.app import launch

    launch(settings.checkpoint, settings.device, settings.host, settings.port)


VERBS.register(
    "demo",
    Verb(
        "demo",
        "explore a checkpoint in the browser, by clicking into images",
        "devil demo --port 7860",
        lambda: DemoSettings,
        demo,
        long=True,
    ),
)
