"""`devil ask`: a question with given answers, and how sure the features are."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devil_hf.checkpoints import SHAPES, locate
from devil_hf.cli.verb import VERBS, Verb, look, named_pictures, show
from devil_hf.settings import LayerSettings, option, read_layers


@dataclass(kw_only=True)
class AskSettings(LayerSettings):
    """A question to images."""

    images: list[str] = option(
        "files or URLs (default: a held-out scene, which the shapes checkpoint is asked about)", [], positional=True
    )
    question: str = option('a sentence as captions have it, {} where the choice stands: "the {} square"')
    choices: list[str] = option("two answers or more")
    grid: int | None = option(
        "places to a side of the image, 1 for the whole image (default: the calibration's, or 4)", None, least=1
    )
    least_evidence: float | None = option(
        'nats per token below which the answer is "not encoded" (default: the calibration\'s, or 0)', None
    )
    calibration: Path | None = option(
        "file of devil evaluate choices (default: calibration.json beside the checkpoint, where there is one)", None
    )

    def validate(self) -> None:
        """Raise a ValueError for a question or choices that are none, and too many places."""
        from devil_hf.questions.choices import Question, read_grid

        Question(self.question, self.choices)
        if self.grid is not None:
            read_grid(self.grid)
        if self.checkpoint and not self.images:
            raise ValueError(f"name an image for {self.checkpoint} to be asked about")


def ask_images(settings: AskSettings) -> None:
    """Ask and print."""
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.questions.choices import Calibration, ask

    names, images = named_pictures(settings.images)
    calibration = None if settings.calibration is None else Calibration.read(settings.calibration)
    checkpoint = settings.checkpoint if settings.images else SHAPES
    model, processor = open_checkpoint(checkpoint, settings.device, settings.quantize)
    calibration = calibration or Calibration.beside(locate(checkpoint))
    if settings.quantize and settings.calibration is None and calibration is not None:
        print("note: the calibration beside the checkpoint is left out, it is not of rounded weights", file=sys.stderr)
        calibration = None
    answers = ask(
        model,
        processor,
        None,
        settings.question,
        settings.choices,
        layers=read_layers(settings.layers, model.layer_names),
        grid=settings.grid,
        least_evidence=settings.least_evidence,
        calibration=calibration,
        feature_maps=look(model, processor, images, names),
    )
    lines, wide = [], max(map(len, settings.choices))
    for name, answer in zip(names, answers, strict=True):
        chance = answer.probabilities
        heads = [] if chance is None else [f"probability{_told(answer)}"]
        heads += ["nats per token over nothing", "probability by the language model alone"]
        lines += [f"{name}: {answer.text}", f"    {'':{wide}}  {', '.join(heads)}"]
        for choice, nats in sorted(answer.evidence.items(), key=lambda pair: -pair[1]):
            shown = "" if chance is None else f"{chance[choice]:.3f}  "
            lines.append(f"    {choice:{wide}}  {shown}{nats:+.2f}  {answer.habit[choice]:.3f}")
        if chance is None:
            lines.append(f"    no choice has the least evidence of {answer.least_evidence:+.2f} nats per token")
    if calibration is not None:
        lines.append(
            f"scales are of {calibration.questions} questions ({calibration.fitted_on}): of other images and questions, and "
            "where no choice is true, a probability promises nothing"
        )
    record = [{"image": name, **answer.as_record()} for name, answer in zip(names, answers, strict=True)]
    show(settings, record, "\n".join(lines))


def _told(answer: Any) -> str:
    """What a probability is worth."""
    if answer.calibrated:
        return ""
    bound = f": its temperature is at the bound, {answer.bound} where it was to be fitted" if answer.bound else ""
    return f" (not calibrated{bound})"


VERBS.register(
    "ask",
    Verb(
        "ask",
        "ask images a question with given answers",
        'devil ask photo.jpg --question "a photo of a {}" --choices dog cat horse --checkpoint user/devil-resnet50-opt125m',
        lambda: AskSettings,
        ask_images,
    ),
)
