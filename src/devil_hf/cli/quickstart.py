"""`devil quickstart`: the whole life of a DeViL in a few minutes."""

from dataclasses import dataclass
from pathlib import Path

from devil_hf.cli.verb import VERBS, Verb
from devil_hf.settings import option


@dataclass(kw_only=True)
class QuickstartSettings:
    """How long to train on how many scenes, and what to measure."""

    output_dir: Path = option("gets the checkpoint, the scores and pictures", Path("devil-quickstart"))
    steps: int = option("training steps of 64 captions", 750)
    scenes: int = option("training scenes", 6_000)
    held_out: int = option("scenes to measure on", 500)
    seed: int = option("of the training", 0)
    json: bool = option("print the scores as JSON at the end", False)

    def validate(self) -> None:
        """Raise a ValueError for less than there must be."""
        if self.steps < 1 or self.scenes < 64 or self.held_out < 1:
            raise ValueError("quickstart needs at least 1 step, 64 scenes and 1 held-out scene")


def run(settings: QuickstartSettings) -> None:
    """Train, measure, draw, and say what to do next."""
    import json

    from devil_hf.report.quickstart import quickstart

    scores = quickstart(settings.output_dir, settings.scenes, settings.steps, settings.held_out, settings.seed)
    if settings.json:
        print(json.dumps(scores))
        return
    checkpoint = settings.output_dir / "checkpoint"
    print(f"\ndone in {scores['seconds']:.0f} s; the model to use next is {checkpoint}:")
    print(f"  devil describe {settings.output_dir}/pictures/scene_0.png --checkpoint {checkpoint}")


VERBS.register(
    "quickstart",
    Verb(
        "quickstart",
        "train, measure and draw a DeViL of the shapes world",
        "devil quickstart",
        lambda: QuickstartSettings,
        run,
    ),
)
