"""How often audits are wrong, on the shapes world, where it is known what a network can see.

Scenes are painted so that every colour is equally bright: a red object in the one group, none in the other, and nothing else
that differs. A network that sees colour can tell them; behind a grey filter it cannot, whatever it has learned. From the
evidence of one pool of images, audits are repeated with images drawn anew, each judged as `assert_encoded` and
`assert_not_encoded` judge it:

* `seen`: the network as it is; right is "encoded".
* `grey`: behind a grey filter; right is "not encoded".
* `one in five`: as `seen`, but with so many images without the thing put among those with it that the area is the bound itself,
  which counts as encoded; right is "encoded", and "not encoded" is the error that the level bounds.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from devil_hf.data.shapes import COLOURS, Scene, sample_scene
from devil_hf.data.worlds import HELD_OUT_WORLD, world_label
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import Evaluation
from devil_hf.evaluation.tables import with_interval
from devil_hf.questions.audit import BOUND, ENCODED, LEVEL, NOT_ENCODED, REVERSED, UNDECIDED, verdict
from devil_hf.settings import option
from devil_hf.statistics import separation

LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue, as Pillow makes pictures grey
BRIGHTNESS = (75.0, 90.0)  # that every colour can have
SEEN, GREY, BORDER = "seen", "grey", "one in five"
RIGHT = {SEEN: ENCODED, GREY: NOT_ENCODED, BORDER: ENCODED}
WRONG = {SEEN: (NOT_ENCODED, REVERSED), GREY: (ENCODED, REVERSED), BORDER: (NOT_ENCODED, REVERSED)}


@dataclass(kw_only=True)
class AuditsSettings(EvaluationSettings):
    """What `devil evaluate audit` asks."""

    limit: int | None = option("images with the colour in the pool, and as many without it", 2_000)
    seed: int = option("of the scenes, and of what is drawn of them", HELD_OUT_WORLD)
    colour: str = option("whose word is asked for", "red", choices=lambda: COLOURS)
    repetitions: int = option("audits", 100, least=1)
    images: int = option("with the colour in each audit, and as many without it", 250, least=2)
    output_dir: Path = option("rows, where a stopped run goes on, and scores.json", Path("devil-audits"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if self.limit is None or self.limit < 2 * self.images:
            least = f"at least {2 * self.images}, twice the --images of one audit"
            raise ValueError(f"--limit {self.limit}: the pool that audits are drawn from needs {least}")


def painted_scene(seed: int, index: int, colour: str, has_it: bool) -> Scene:
    """A scene with equally bright colours, of which the first object's is `colour`, or no object's is."""
    rng = np.random.default_rng((seed, index, int(has_it)))
    scene = sample_scene(rng)
    others = [name for name in COLOURS if name != colour]
    objects = []
    for place, item in enumerate(scene.objects):
        name = colour if has_it and place == 0 else others[int(rng.integers(len(others)))]
        rgb = np.asarray(COLOURS[name]) * rng.uniform(*BRIGHTNESS) / (np.asarray(COLOURS[name]) @ LUMA)
        objects.append(dataclasses.replace(item, colour=name, rgb=tuple(rgb.tolist())))
    return Scene(tuple(objects), scene.background, scene.drawing_seed)


def in_grey(image: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3), uint8, without its colours."""
    return np.repeat((image @ LUMA + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def repeated_audits(
    present: np.ndarray, absent: np.ndarray, images: int, repetitions: int, rng: np.random.Generator, share: float = 1.0
) -> dict[str, int]:
    """How often audits of so many images, drawn without replacement from pools of evidence (N,) and (M,), come to each verdict.

    They vary less than audits of images that are new each time: those of one pool share what is peculiar to it.

    Args:
        share: of the images with the thing; the others of that group are drawn from those without it.
    """
    told: Counter[str] = Counter()
    for _ in range(repetitions):
        drawn = rng.permutation(absent)
        chosen = np.where(rng.random(images) < share, rng.choice(present, images, replace=False), drawn[-images:])
        told[verdict(separation(chosen, drawn[:images], LEVEL), BOUND)] += 1
    return {one: told[one] for one in (ENCODED, NOT_ENCODED, UNDECIDED, REVERSED)}


@EVALUATORS.register("audit")
class AuditsEvaluator(Evaluator):
    """Error rates of audits."""

    name = "audit"
    summary = "count how often audits of scenes are wrong"
    example = "devil evaluate audit CHECKPOINT --limit 2000"
    Settings = AuditsSettings
    unit = "scene"

    def open(self) -> list[str]:
        """Numbers of scenes."""
        return [str(index) for index in range(self.settings.limit)]

    def decides(self) -> dict[str, Any]:
        """The scenes and the word."""
        return {"seed": self.settings.seed, "colour": self.settings.colour}

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[dict[str, list[float]]]:
        """Per number the evidence in a scene with the colour and in one without it, as it is and in grey."""
        settings = self.settings
        scenes = [painted_scene(settings.seed, int(key), settings.colour, has_it) for key in keys for has_it in (True, False)]
        phrases = self.processor(text=[settings.colour])
        null = self.model.score_prefix(self.model.null_prefix(), phrases).sum()
        found = {}
        for name, change in ((SEEN, np.asarray), (GREY, in_grey)):
            pixels = self.processor(images=[change(scene.image) for scene in scenes])["pixel_values"]
            evidence = self.model.score_prefix(self.model.ask(pixels), phrases).sum(dim=(1, 2)) - null
            found[name] = evidence.cpu().unflatten(0, (len(keys), 2)).tolist()
        return [{name: values[at] for name, values in found.items()} for at in range(len(keys))]

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See the module's docstring."""
        settings, rng = self.settings, np.random.default_rng(self.settings.seed)
        pools = {name: np.array([row[name] for row in rows.values()]).T for name in (SEEN, GREY)}
        areas = {name: separation(*pool) for name, pool in pools.items()}
        share = min((BOUND - 0.5) / max(areas[SEEN].area - 0.5, 1e-9), 1.0)
        counts: dict[str, dict[str, int]] = {}
        for name in RIGHT:
            present, absent = pools[GREY if name == GREY else SEEN]
            mixed = share if name == BORDER else 1.0
            told = repeated_audits(present, absent, settings.images, settings.repetitions, rng, mixed)
            counts[name] = told
        scores = {
            name: {
                "right": told[RIGHT[name]] / settings.repetitions,
                "not_wrong": 1 - sum(told[one] for one in WRONG[name]) / settings.repetitions,
            }
            for name, told in counts.items()
        }
        return Evaluation(
            title="Audits",
            scores=scores,
            dataset={"name": f"{world_label(settings.seed)}, painted equally bright", "size": 2 * len(rows)},
            settings={"colour": settings.colour, "images": settings.images, "level": LEVEL, "bound": BOUND},
            details={
                "verdicts": counts,
                "areas": {name: [area.area, area.low, area.high] for name, area in areas.items()},
                "repetitions": settings.repetitions,
            },
        )

    def text(self, evaluation: Evaluation) -> str:
        """Counts of verdicts, and what stands beside them."""
        details, settings = evaluation.details, evaluation.settings
        lines = [
            f"{evaluation.dataset['name']}: {details['repetitions']} audits of {settings['colour']!r}, each of "
            f"{settings['images']} + {settings['images']} images drawn of {evaluation.dataset['size']}",
            "",
            f"{'':12}" + "".join(f"{name:>14}" for name in details["verdicts"][SEEN]),
        ]
        lines += [f"{row:12}" + "".join(f"{count:14}" for count in told.values()) for row, told in details["verdicts"].items()]
        areas = ", ".join(f"{name} {with_interval(area, span)}" for name, (area, *span) in details["areas"].items())
        return "\n".join([*lines, "", f"AUROC over the whole pool: {areas}"])


__all__ = ["AuditsEvaluator", "AuditsSettings", "in_grey", "painted_scene", "repeated_audits"]
