"""`devil quickstart`: the whole life of a DeViL in a few minutes, on the embedded shapes world.

The model that the package brings answers first, about a scene that nothing was trained on. Then the recipe `quickstart` trains a
new translator between its frozen parts; the checkpoint is loaded again and measured on held-out scenes, as by
`devil evaluate shapes`; pictures show what it says. A user would call the same for other parts.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from devil_hf.checkpoints import SHAPES
from devil_hf.cli.verb import VERBS, Verb, show
from devil_hf.extras import needs
from devil_hf.settings import JsonSettings, option

POINTING_SCENES = 60  # the pointing game asks every place of every layer, so the first scenes must do
FRESH = 1_000_000  # where scenes begin that nothing here was trained or measured on
SHADES = " .:+#"  # of a map in letters, from the least to the most evidence


@dataclass(kw_only=True)
class QuickstartSettings(JsonSettings):
    """How long to train on how many scenes, and what to measure."""

    output_dir: Path = option("gets `checkpoint/`, `scores.json`, `evaluation/` and `pictures/`", Path("devil-quickstart"))
    steps: int = option("training steps of 64 captions", 750)
    scenes: int = option("training scenes", 6_000)
    held_out: int = option("scenes of another world to measure on", 300)
    seed: int = option("of the training", 0, least=0)

    def validate(self) -> None:
        """Raise a ValueError for less than there must be."""
        if self.steps < 1 or self.scenes < 64 or self.held_out < 2:
            raise ValueError("quickstart needs at least 1 step, 64 scenes and 2 held-out scenes")


def quickstart(settings: QuickstartSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Answer, train, measure and draw.

    Args:
        say: gets what is told on the way.

    Returns:
        The content of `scores.json`.
    """
    from devil_hf.folders import claimed

    needs("accelerate", "train")  # before minutes of work
    needs("datasets", "train")
    needs("tabulate", "evaluate")
    with claimed(settings.output_dir, "devil quickstart"):
        return _quickstart(settings, say)


def _quickstart(settings: QuickstartSettings, say: Callable[[str], None]) -> dict[str, Any]:
    began = time.perf_counter()
    folder = settings.output_dir
    first_answer(folder / "pictures", settings.seed, say)
    answered = time.perf_counter() - began
    from devil_hf.checkpoints.loading import load
    from devil_hf.evaluation.evaluator import evaluate
    from devil_hf.evaluation.shapes import ShapesSettings
    from devil_hf.folders import write_json
    from devil_hf.report.scenes import draw_pictures
    from devil_hf.training.run import train

    say(f"Now a new translator is trained on {settings.scenes} other scenes, between the same frozen parts.")
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
        checkpoint = train(recipe(settings))
        measured = evaluate(
            "shapes",
            ShapesSettings(
                checkpoint=str(checkpoint),  # read from its files, as anyone would
                output_dir=folder / "evaluation",  # a folder of its own, which the evaluation claims
                limit=settings.held_out,
                questions=["described", "pointing"],
                pointing_limit=POINTING_SCENES,
            ),
        )
    assert measured is not None, "the quickstart runs on one process"
    say("What each layer says about held-out scenes:\n")
    pictures = draw_pictures(*load(checkpoint), folder / "pictures", say=say)
    say(measured.text)
    say("pictures: " + ", ".join(map(str, pictures)))
    scores = measured.as_record() | {"first_answer_seconds": round(answered, 1)}
    scores["seconds"] = round(time.perf_counter() - began, 1)
    write_json(folder / "scores.json", scores)
    return scores


def first_answer(folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """What the model that the package brings says of a scene that it never saw, by layer, and where it sees one word.

    Args:
        folder: gets `first_scene.png` and `first_map.png`.
        seed: another one, another scene.
        say: gets the words, and the map in letters.
    """
    from PIL import Image

    from devil_hf.checkpoints.loading import load
    from devil_hf.data.worlds import HELD_OUT_WORLD, World
    from devil_hf.folders import written
    from devil_hf.report.figures import attribution_figure

    world = World(FRESH + 1000 * (seed + 1), HELD_OUT_WORLD)
    scenes = (world.scene(index) for index in count(FRESH + 1000 * seed))
    found = ((scene, phrase) for scene in scenes for phrase in scene.unique_phrases())
    scene, word = next((scene, phrase.text) for scene, phrase in found if phrase.attribute == "colour")
    model, processor = load(SHAPES)
    image = Image.fromarray(scene.image)
    inputs = processor(images=image, return_tensors="pt")
    maps = model.extract_features(inputs["pixel_values"])
    output = model.describe(feature_maps=maps, max_new_tokens=40)
    texts = processor.batch_decode(output.sequences, skip_special_tokens=True)
    objects = ", ".join(" ".join(item.attributes.values()) for item in scene.objects)
    lines = [f"  {'(truth)':8} {objects}"]
    lines += [f"  {output.layer_of(row):8} {text.strip()}" for row, text in enumerate(texts)]
    say("\n".join([f"The model `{SHAPES}`, which the package brings, about a scene that it never saw:\n", *lines]))
    phrases = processor(text=[word], carrier="the", return_tensors="pt")
    attributed = model.attribute(phrases=phrases, feature_maps=maps)
    layer = model.layer_names[-2]
    drawn = in_letters(attributed.maps[layer][0, 0].tolist())
    say(f"\nand where its {layer} sees {word!r}, from blank (least) to {SHADES[-1]} (most):\n\n{drawn}\n")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"first_scene.png": image, "first_map.png": attribution_figure(processor, image, attributed, [word])}
    for name, picture in pictures.items():
        with written(folder / name) as unfinished:
            picture.save(unfinished)
    say(f"({folder / 'first_scene.png'}; the map at every layer: {folder / 'first_map.png'})\n")


def in_letters(rows: list[list[float]]) -> str:
    """A map as lines of text, denser where there is more."""
    values = [value for row in rows for value in row]
    low, high = min(values), max(values)
    steps = (len(SHADES) - 1) / (high - low or 1.0)
    return "\n".join("  |" + "".join(2 * SHADES[round((value - low) * steps)] for value in row) + "|" for row in rows)


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
        "quickstart",
        "ask the shipped model, then train, measure and draw another",
        "devil quickstart",
        lambda: QuickstartSettings,
        run,
    ),
)
