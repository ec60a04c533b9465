"""`devil report emergence`: at which depth, and where, phrases become readable in an image."""

from dataclasses import dataclass
from pathlib import Path

from devil_hf.cli.report import REPORTS
from devil_hf.cli.verb import Verb, show
from devil_hf.settings import LayerSettings, option, read_layers

PICTURE = "emergence.png"


@dataclass(kw_only=True)
class ReportEmergenceSettings(LayerSettings):
    """Phrases against depth and place."""

    images: str = option("a picture (file or URL)", positional=True)
    phrases: list[str] = option("what is asked", positional=True)
    carrier: str | None = option('a neutral word read before each phrase, such as "the"', None)
    output_dir: Path = option("of the picture emergence.png", Path("devil-emergence"))

    def validate(self) -> None:
        """Raise a ValueError for phrases that can be seen to be none."""
        if not all(phrase.strip() for phrase in self.phrases):
            raise ValueError(f"phrases {self.phrases} must each hold a word")


def report_emergence(settings: ReportEmergenceSettings) -> None:
    """Ask one image, draw and print."""
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.model.image_processing_devil import load_images
    from devil_hf.questions.emergence import evidence_by_layer
    from devil_hf.report.figures import attribution_figure

    (image,) = load_images(settings.images)
    model, processor = open_checkpoint(settings.checkpoint, settings.device)
    layers = read_layers(settings.layers, model.layer_names)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
    features = model.extract_features(pixels)
    found = evidence_by_layer(model, processor, None, settings.phrases, layers, settings.carrier, features)
    phrases = processor(text=settings.phrases, carrier=settings.carrier, return_tensors="pt")
    maps = model.attribute(phrases=phrases, layers=layers, feature_maps=features)
    maps.maps = {name: one.cpu() for name, one in maps.maps.items()}
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    attribution_figure(processor, image, maps, settings.phrases).save(settings.output_dir / PICTURE)
    lines = ["evidence in the whole image, nats per token over the null prefix"]
    for at, phrase in enumerate(settings.phrases):
        lines.append(f"{phrase}: " + "  ".join(f"{layer} {values[0, at]:+.2f}" for layer, values in found.items()))
    record = {phrase: {layer: float(v[0, at]) for layer, v in found.items()} for at, phrase in enumerate(settings.phrases)}
    show(settings, record, "\n".join([*lines, f"maps: {settings.output_dir / PICTURE}"]))


REPORTS.register(
    "emergence",
    Verb(
        "emergence",
        "show at which depth, and where, phrases become readable",
        'devil report emergence photo.jpg "a dog" striped --output-dir dogs',
        lambda: ReportEmergenceSettings,
        report_emergence,
    ),
)
