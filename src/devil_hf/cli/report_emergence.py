"""`devil report emergence`: at which depth, and where, phrases become readable, in one image or over labelled ones."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devil_hf.cli.report import REPORTS
from devil_hf.cli.verb import Verb, show
from devil_hf.settings import LayerSettings, option, read_layers

PICTURE = "emergence.png"


@dataclass(kw_only=True)
class ReportEmergenceSettings(LayerSettings):
    """Phrases against depth and place."""

    source: str = option(
        "a picture (file or URL); or labelled images, as `devil evaluate emergence --source`", positional=True, metavar="IMAGES"
    )
    phrases: list[str] = option(
        "what is asked; of labelled images also several as NAME=PHRASE,PHRASE, or nothing for every name", [], positional=True
    )
    carrier: str | None = option('a neutral word read before each phrase, such as "the"', None)
    split: str | None = option("of a caption folder", None)
    images: Path | None = option("of labelled objects: folder of the images, where it is not the usual one", None)
    names: str | None = option("class names of YOLO labels: data.yaml, a text file, or FILE#KEY in JSON or YAML", None)
    limit: int = option("of labelled images, from the first on", 200, least=1)
    output_dir: Path = option(f"of {PICTURE}, and of rows and scores of labelled images", Path("devil-emergence"))

    def validate(self) -> None:
        """Raise a ValueError for phrases that can be seen to be none."""
        if not all(phrase.strip() for phrase in self.phrases):
            raise ValueError(f"phrases {self.phrases} must each hold a word")
        if repeated := [phrase for phrase, times in Counter(self.phrases).items() if times > 1]:
            raise ValueError(f"phrases {repeated} are named twice: name each once")
        if not self.source.strip():
            raise ValueError("the image has no name: give a picture, or labelled images")


def report_emergence(settings: ReportEmergenceSettings) -> None:
    """Ask, draw and print."""
    from devil_hf.data.specifications import read_specification
    from devil_hf.data.worlds import usual_checkpoint
    from devil_hf.folders import claimed

    named = read_specification(settings.source)
    if isinstance(named, Path | str) and not Path(named).is_dir() and not settings.source.endswith(".json"):
        if not settings.phrases:
            raise ValueError(f"say what is asked of {settings.source}: name phrases")
        for name in ("split", "images", "names"):
            if (value := getattr(settings, name)) is not None:
                raise ValueError(f"--{name} {value} is of labelled images, and {settings.source} is one picture")
        with claimed(settings.output_dir, "devil report emergence"):
            _report_image(settings)
        return
    from devil_hf.evaluation.emergence import EmergenceSettings
    from devil_hf.evaluation.evaluator import evaluate

    shared = {
        name: getattr(settings, name)
        for name in ("device", "source", "phrases", "split", "images", "names", "carrier", "layers", "limit", "output_dir")
    }
    checkpoint = settings.checkpoint or usual_checkpoint(settings.source)
    evaluation = evaluate("emergence", EmergenceSettings(checkpoint=checkpoint, **shared))
    if evaluation is not None:
        show(settings, evaluation.as_record(), f"{evaluation.text}\npicture: {settings.output_dir / PICTURE}")


def _report_image(settings: ReportEmergenceSettings) -> None:
    """Evidence and maps of phrases in one image."""
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.folders import written
    from devil_hf.model.image_processing_devil import load_images
    from devil_hf.questions.emergence import evidence_by_layer
    from devil_hf.report.emergence import emergence_figure

    (image,) = load_images(settings.source)
    model, processor = open_checkpoint(settings.checkpoint, settings.device, settings.quantize)
    layers = read_layers(settings.layers, model.layer_names)
    features = model.extract_features(processor(images=image, return_tensors="pt")["pixel_values"].to(model.device))
    found = evidence_by_layer(model, processor, None, settings.phrases, layers, settings.carrier, features)
    phrases = processor(text=settings.phrases, carrier=settings.carrier, return_tensors="pt")
    maps = model.attribute(phrases=phrases, layers=layers, feature_maps=features)
    maps.maps = {name: one.cpu() for name, one in maps.maps.items()}
    file = settings.output_dir / PICTURE
    with written(file) as unfinished:
        emergence_figure(processor, image, maps, found, settings.phrases).save(unfinished, "PNG", optimize=True)
    record: dict[str, Any] = {"image": settings.source, "phrases": {}}
    lines = ["evidence in the whole image, nats per token over the null prefix"]
    for at, phrase in enumerate(settings.phrases):
        evidence = {layer: float(values[0, at]) for layer, values in found.items()}
        record["phrases"][phrase] = {"evidence": evidence, "maps": {name: one[0, at].tolist() for name, one in maps.maps.items()}}
        lines.append(f"{phrase}: " + "  ".join(f"{layer} {value:+.2f}" for layer, value in evidence.items()))
    show(settings, record, "\n".join([*lines, f"picture: {file}"]))


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
