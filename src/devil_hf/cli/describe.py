"""`devil describe`: what each layer sees in images, as sentences."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devil_hf.checkpoints import SHAPES
from devil_hf.cli.verb import VERBS, Verb, check_picture, look, named_pictures, show
from devil_hf.settings import LayerSettings, check_window, option, read_layers


@dataclass(kw_only=True)
class DescribeSettings(LayerSettings):
    """Descriptions of images by layers, places and words."""

    images: list[str] = option(
        "files or URLs (default: a held-out scene, which the shapes checkpoint describes)", [], positional=True
    )
    locations: list[str] | None = option('places of each layer\'s grid, or "all"', None, metavar="ROW,COLUMN")
    window: int = option("side of the square around each place", 1, least=1)
    evidence: bool = option("print what each word owes to the features, in nats", False)
    guidance: float = option("above 1: favour what the features add", 1.0)
    max_new_tokens: int = option("at most so many tokens", 30, least=1)
    num_beams: int = option("1 is greedy; with --grounded the candidates, which are 8 then", 1, least=1)
    grounded: bool = option("one description per image, the one whose phrases its places support best", False)
    output: Path | None = option("also draw the image beside the words, into this file", None)
    maps: Path | None = option(
        "with --evidence: one sentence, the layers that carry each of its words, and their places, drawn into this file", None
    )
    against: str | None = option(
        "with --maps: other images, for the chance that their features carry the sentence as well", None, metavar="IMAGES"
    )
    others: int = option("of those images, at most", 99, least=1)

    def validate(self) -> None:
        """Raise a ValueError for places that cannot be read, and for what --grounded leaves no room for."""
        if self.checkpoint and not self.images:
            raise ValueError(f"name an image for {self.checkpoint} to describe")
        self._validate_maps()
        if self.grounded:
            for name, value in {"locations": None, "window": 1, "evidence": False, "output": None}.items():
                if getattr(self, name) != value:
                    raise ValueError(f"--grounded describes whole images, phrase by phrase: leave out --{name}")
            if self.guidance != 1.0:
                raise ValueError(f"--grounded weighs the places instead: leave out --guidance {self.guidance}")
        check_window(self.window, places=self.places() is not None)

    def _validate_maps(self) -> None:
        if self.against is not None and self.maps is None:
            raise ValueError("--against judges a sentence that --maps explains: give --maps, too")
        if self.maps is None:
            return
        if not self.evidence or self.grounded:
            raise ValueError("--maps goes with --evidence, and without --grounded")
        if len(self.images) > 1:
            raise ValueError(f"--maps explains one image, not {len(self.images)}: name one, and the others by --against")
        for name, value in {"locations": None, "window": 1, "output": None}.items():
            if getattr(self, name) != value:
                raise ValueError(f"--maps asks every place of the layers: leave out --{name}")

    def places(self) -> str | list[tuple[int, int]] | None:
        """The locations, as `model.describe` takes them."""
        if self.locations is None or self.locations == ["all"]:
            return "all" if self.locations else None
        try:
            pairs = [tuple(int(number) for number in place.split(",")) for place in self.locations]
        except ValueError:
            pairs = []
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f'locations {self.locations} are not ROW,COLUMN pairs such as 3,4, nor "all"')
        return [(pair[0], pair[1]) for pair in pairs]


def describe(settings: DescribeSettings) -> None:
    """Describe, draw and print."""
    from devil_hf.checkpoints.loading import open_checkpoint

    for file in filter(None, (settings.output, settings.maps)):
        check_picture(file)
    names, images = named_pictures(settings.images)
    model, processor = open_checkpoint(settings.checkpoint if settings.images else SHAPES, settings.device, settings.quantize)
    asked: dict[str, Any] = {
        "feature_maps": look(model, processor, images, names),
        "layers": read_layers(settings.layers, model.layer_names),
        "max_new_tokens": settings.max_new_tokens,
    }
    if settings.grounded:
        _describe_grounded(settings, names, model, processor, asked)
        return
    if settings.maps:
        _explain_words(settings, names[0], images[0], model, processor, asked)
        return
    output = model.describe(
        **asked,
        locations=settings.places(),
        window=settings.window,
        evidence=settings.evidence,
        guidance=settings.guidance,
        num_beams=settings.num_beams,
    )
    rows = processor.post_process_descriptions(output, names)
    if settings.output:
        from devil_hf.report.figures import layers_figure

        texts: list[list[tuple[str, str]]] = [[] for _ in images]
        for index, row in zip(output.image_index.tolist(), rows, strict=True):
            texts[index].append((_place(row), row["description"]))
        layers_figure(images, texts).save(settings.output)
    show(settings, rows, "\n".join(line for row in rows for line in _lines(row, settings.evidence)))


def _place(row: dict[str, Any]) -> str:
    return row["layer"] + (f" {row['location']}" if row["location"] else "")


def _lines(row: dict[str, Any], evidence: bool) -> list[str]:
    lines = [f"{row['image']}  {_place(row)}: {row['description']}"]
    if evidence:
        lines.append("    " + "  ".join(f"{word}{value:+.1f}" for word, value in row["words"]))
    return lines


def _describe_grounded(settings: DescribeSettings, names: list[str], model, processor, asked: dict[str, Any]) -> None:
    """One description per image, with the evidence of each phrase in nats."""
    from devil_hf.questions.grounding import CANDIDATES, describe_grounded

    candidates = settings.num_beams if settings.num_beams > 1 else CANDIDATES
    found = list(zip(names, describe_grounded(model, processor, **asked, candidates=candidates), strict=True))
    lines = []
    for image, description in found:
        lines.append(f"{image}: {description.text}")
        lines.append("    " + "  ".join(f"{phrase.text} {phrase.evidence:+.1f}" for phrase in description.phrases))
    record = [{"image": image, **dataclasses.asdict(description)} for image, description in found]
    show(settings, record, "\n".join(lines))


def _explain_words(settings: DescribeSettings, name: str, image: Any, model, processor, asked: dict[str, Any]) -> None:
    """One sentence about an image, and where each of its words comes from."""
    from devil_hf.questions.word_evidence import explain_words
    from devil_hf.report.figures import attribution_figure

    others = None
    if settings.against:
        others = _other_prefixes(settings, model, processor, asked["layers"])
    options: dict[str, Any] = {"guidance": settings.guidance, "num_beams": settings.num_beams}
    (found,) = explain_words(model, processor, **asked, **options, others=others)
    words = [word.text for word in found.words]
    attribution_figure(processor, image, _drawable(found.maps.maps), words).save(str(settings.maps))
    lines = [f"{name}: {found.text}", "nats over the null prefix; what each layer alone carries; what is lost without it"]
    wide = max(map(len, words))
    for word in found.words:
        layers = "  ".join(f"{layer} {word.alone[layer]:+.1f} / {word.lost[layer]:+.1f}" for layer in word.alone)
        lines.append(f"    {word.text:{wide}}  {word.evidence:+.1f}  {layers}")
    if found.p_value is not None:
        lines.append(f"p = {found.p_value:.3f}: as likely with the features of other images, of {found.permutations}")
    record = {"image": name, **found.as_record()}
    show(settings, record, "\n".join([*lines, f"maps: {settings.maps}"]))


def _drawable(maps: dict[str, Any]) -> dict[str, Any]:
    """Both kinds of maps for one colour scale: hiding one place of many takes little, so those maps are multiplied."""
    shown, hidden = (maps[name].abs().max().item() for name in ("shown", "hidden"))
    times = float(f"{shown / max(hidden, 1e-9):.0e}")
    return {"shown": maps["shown"], f"hidden, x {times:g}": maps["hidden"] * times}


def _other_prefixes(settings: DescribeSettings, model, processor, layers) -> Any:
    """Prefixes of the images that --against names."""
    import torch

    from devil_hf.data.images import open_images

    images = [image for _, image in open_images(settings.against, limit=settings.others).stream() if image is not None]
    with torch.no_grad():
        return torch.cat([model.ask(**processor(images=image, return_tensors="pt"), layers=layers) for image in images])


VERBS.register(
    "describe",
    Verb(
        "describe",
        "say what each layer sees in images",
        "devil describe photo.jpg --checkpoint user/devil-resnet50-opt125m --layers layer3 layer4",
        lambda: DescribeSettings,
        describe,
    ),
)
