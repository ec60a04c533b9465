"""`devil quickstart`: the whole life of a DeViL in a few minutes, on the embedded shapes world.

The recipe `quickstart` trains a new translator between the shipped frozen parts; `devil evaluate shapes` loads the checkpoint in
a fresh process and measures it on held-out scenes; pictures show what it says. A user would call the same for other parts.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devil_hf.cli.verb import VERBS, Verb, show
from devil_hf.settings import JsonSettings, option

POINTING_SCENES = 150  # the pointing game asks every place of every layer, so the first scenes must do


@dataclass(kw_only=True)
class QuickstartSettings(JsonSettings):
    """How long to train on how many scenes, and what to measure."""

    output_dir: Path = option("gets `checkpoint/`, `scores.json`, `evaluation/` and `pictures/`", Path("devil-quickstart"))
    steps: int = option("training steps of 64 captions", 750)
    scenes: int = option("training scenes", 6_000)
    held_out: int = option("scenes of another world to measure on", 500)
    seed: int = option("of the training", 0, least=0)

    def validate(self) -> None:
        """Raise a ValueError for less than there must be."""
        if self.steps < 1 or self.scenes < 64 or self.held_out < 2:
            raise ValueError("quickstart needs at least 1 step, 64 scenes and 2 held-out scenes")


def quickstart(settings: QuickstartSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, measure in a fresh process, and draw.

    Args:
        say: gets what is told on the way.

    Returns:
        The content of `scores.json`.
    """
    from devil_hf.folders import claimed

    with claimed(settings.output_dir, "devil quickstart"):
        return _quickstart(settings, say)


def _quickstart(settings: QuickstartSettings, say: Callable[[str], None]) -> dict[str, Any]:
    from devil_hf.checkpoints.loading import load
    from devil_hf.folders import write_json
    from devil_hf.report.scenes import draw_pictures
    from devil_hf.text_files import read_json
    from devil_hf.training.run import train

    began = time.perf_counter()
    folder = settings.output_dir
    with contextlib.redirect_stdout(sys.stderr):  # of the Trainer's records, which are no result
        checkpoint = train(recipe(settings))
    evaluated = folder / "evaluation"  # a folder of its own, which that process claims
    command = [sys.executable, "-m", "devil_hf", "evaluate", "shapes", str(checkpoint), "--output-dir", str(evaluated)]
    command += ["--limit", str(settings.held_out), "--questions", "described", "pointing"]
    command += ["--pointing-limit", str(POINTING_SCENES)]
    measured = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    say("What each layer says about held-out scenes:\n")
    pictures = draw_pictures(*load(checkpoint), folder / "pictures", say=say)
    say(measured.stdout)
    say("pictures: " + ", ".join(map(str, pictures)))
    scores = read_json(evaluated / "scores.json")
    scores["seconds"] = round(time.perf_counter() - began, 1)
    write_json(folder / "scores.json", scores)
    return scores


def recipe(settings: QuickstartSettings):
    """The recipe `quickstart`, with what the settings say."""
    from devil_hf.settings import make, read_yaml
    from devil_hf.training.recipe import Recipe

    fields = read_yaml(Recipe, Path("quickstart"))
    fields["train_data"][0]["size"] = settings.scenes
    fields |= {"max_steps": settings.steps, "warmup_steps": settings.steps // 20, "seed": settings.seed}
    fields |= {"output_dir": str(settings.output_dir), "report_to": "none", "resume": True}  # a stopped one goes on
    return make(Recipe, fields | {"cache_features": str(settings.output_dir / "features")})


def run(settings: QuickstartSettings) -> None:
    """Do it, and say what to do next."""
    scores = quickstart(settings, say=print if not settings.json else lambda text: print(text, file=sys.stderr))
    checkpoint = settings.output_dir / "checkpoint"
    following = f"devil describe {settings.output_dir}/pictures/scene_0.png --checkpoint {checkpoint}"
    show(settings, scores, f"\ndone in {scores['seconds']:.0f} s; the model to use next is {checkpoint}:\n  {following}")


VERBS.register(
    "quickstart",
    Verb(
        "quickstart", "train, measure and draw a DeViL of the shapes world", "devil quickstart", lambda: QuickstartSettings, run
    ),
)
