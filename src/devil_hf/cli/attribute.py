"""`devil attribute`: where in an image words come from, as maps."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from devil_hf.cli.verb import VERBS, Verb, check_picture, look, show
from devil_hf.registry import load_plugins
from devil_hf.settings import LayerSettings, check_window, option, read_layers, read_windows

UNITS = {"evidence": "nats per token over the null prefix", "per_token": "nats per token", "sum": "nats"}


def combinations() -> list[str]:
    """The rules that make one map of several, those of plugins as well."""
    from devil_hf.model.explaining_devil import COMBINATIONS

    load_plugins()
    return list(COMBINATIONS)


@dataclass(kw_only=True)
class AttributeSettings(LayerSettings):
    """Maps of phrases by layers."""

    image: str = option("a file or URL", positional=True)
    phrases: list[str] = option("words whose places are asked", positional=True)
    measure: Literal["evidence", "per_token", "sum"] = option("what a map tells of each place", "evidence")
    combine: str | None = option(
        "one map from all the layers: informed (on photographs no better than mean), mean, joint (the paper's)",
        None,
        choices=combinations,
    )
    window: int = option("side of the square around each place", 1, least=1)
    windows: list[str] = option("the same of single layers, instead", [], metavar="LAYER=SIDE")
    refine: float | None = option(
        "share of places to ask, from .25 to 1, where maps are finer than 16 x 16; the others are interpolated between places of "
        "like features (default: every place)",
        None,
    )
    carrier: str | None = option('a neutral word read before each phrase, such as "the"', None)
    output: Path = option("picture to write", Path("maps.png"))

    def validate(self) -> None:
        """Raise a ValueError for phrases and windows that can be seen to be none."""
        if not all(phrase.strip() for phrase in self.phrases):
            raise ValueError(f"phrases {self.phrases} must each hold a word")
        check_window(self.window)
        if self.refine is not None:
            from devil_hf.questions.coarse_maps import check_share

            check_share(self.refine)
        if self.windows and self.window != 1:
            raise ValueError(f"--window {self.window} is of all layers, --windows of single ones: give one of them")


def attribute(settings: AttributeSettings) -> None:
    """Map, draw and print."""
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.model.image_processing_devil import load_images
    from devil_hf.model.pooling_devil import resolve_layers
    from devil_hf.questions.coarse_maps import attribute_coarsely
    from devil_hf.report.figures import attribution_figure

    check_picture(settings.output)
    (image,) = load_images(settings.image)
    model, processor = open_checkpoint(settings.checkpoint, settings.device, settings.quantize)
    known = model.layer_names
    layers = read_layers(settings.layers, known)
    asked = [known[index] for index in resolve_layers(layers, known)]
    ask = model.attribute if settings.refine is None else partial(attribute_coarsely, model, refine=settings.refine)
    output = ask(
        feature_maps=look(model, processor, [image], [settings.image]),
        phrases=processor(text=settings.phrases, carrier=settings.carrier, return_tensors="pt"),
        layers=layers,
        measure=settings.measure,
        combine=settings.combine,
        window=read_windows(settings.windows, asked, known) or settings.window,
    )
    output.maps = {name: one.cpu() for name, one in output.maps.items()}
    attribution_figure(processor, image, output, settings.phrases).save(settings.output)
    lines = [f"highest value and its place, in {UNITS[settings.measure]}"]
    for name, one in output.maps.items():
        for phrase, values in zip(settings.phrases, one[0], strict=True):
            row, column = divmod(int(values.argmax()), values.shape[1])
            lines.append(f"{name}  {phrase}: {values.max():+.2f} at ({row}, {column})")
    lines.append(f"maps: {settings.output}")
    show(settings, {name: one[0].tolist() for name, one in output.maps.items()}, "\n".join(lines))


VERBS.register(
    "attribute",
    Verb(
        "attribute",
        "map where words come from",
        'devil attribute photo.jpg "a dog" grass --layers layer3 layer4 --output maps.png',
        lambda: AttributeSettings,
        attribute,
    ),
)
