"""`devil diff`: what two networks say differently of the same images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devil_hf.cli.verb import VERBS, Verb, check_file, show
from devil_hf.settings import JsonSettings, option, read_layers


@dataclass(kw_only=True)
class DiffSettings(JsonSettings):
    """Words gained and lost between two networks."""

    a: str = option("checkpoint: directory, Hub id, or name of a shipped one", positional=True)
    b: str | None = option("another checkpoint", None, positional=True)
    backbone: str | None = option(
        "instead of B: A with other weights, a safetensors file of its backbone, or a folder or Hub id of timm or transformers",
        None,
        metavar="WEIGHTS",
    )
    images: str = option("folder, data set or shapes:COUNT that both networks look at")
    limit: int = option("images, from the first on", 200, least=1)
    layers: list[str] | None = option("compared beside all together (default: every one that both have)", None)
    words: Path | None = option("file with a word a line, compared beside those that the networks say", None, metavar="FILE")
    carrier: str | None = option('a neutral word read before each word, such as "the"', None)
    level: float = option("false discovery rate", 0.05)
    least: float = option("report changes from this share of what the richer network tells on", 0.33, least=0)
    examples: int = option("images to show, those that changed most", 12, least=0)
    output: Path | None = option("page to write, such as difference.html", None)
    device: str | None = option("default: cuda where there is one", None)

    def validate(self) -> None:
        """Raise a ValueError for what is not two networks, and for figures and files that cannot be."""
        if (self.b is None) == (self.backbone is None):
            raise ValueError("a difference has two sides: name B, or --backbone WEIGHTS for the translator of A to read")
        if not 0 < self.level < 1:
            raise ValueError(f"--level {self.level} must lie between 0 and 1, such as 0.05")
        if self.least > 1:
            raise ValueError(f"--least {self.least} is a share, at most 1")


def diff(settings: DiffSettings) -> None:
    """Compare, draw and print."""
    from devil_hf.build.models import with_backbone
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.data.images import NumberedImages, open_images
    from devil_hf.extras import needs
    from devil_hf.model.image_processing_devil import load_images
    from devil_hf.questions.difference import GAINED, LOST, MOST_WORDS, check_images, check_level, compare_networks
    from devil_hf.text_files import read_list

    needs("scipy", "evaluate")
    if settings.output is not None:
        check_file(settings.output, "difference.html")
    words = read_list(settings.words) if settings.words else []
    layers = 1 + len(settings.layers or "1")
    family: dict[str, Any] = {"layers": layers, "words": MOST_WORDS + len(words), "level": settings.level}
    check_level(**family)
    images = open_images(settings.images, limit=settings.limit)
    if isinstance(images, NumberedImages):
        check_images(len(images), **family)
    model, processor = open_checkpoint(settings.a, settings.device)
    if settings.backbone is None:
        other = open_checkpoint(settings.b, settings.device)
    else:
        other = with_backbone(model, processor, settings.backbone)
    keys: dict[str, int] = {}
    found = compare_networks(
        (model, processor),
        other,
        _named(images, keys),
        layers=read_layers(settings.layers, model.layer_names),
        words=words,
        carrier=settings.carrier,
        level=settings.level,
        least=settings.least,
        examples=settings.examples,
    )
    lines = [
        f"{found.images} images of {images.name}, {len(found.words)} words at layers compared; nats that a word tells, A > B"
    ]
    for verdict in (LOST, GAINED):
        of_layers = found.found(verdict)
        lines.append(f"{verdict}:" if any(of_layers.values()) else f"{verdict}: no word")
        lines += [f"    {layer}: {'  '.join(_told(found, layer, named))}" for layer, named in of_layers.items() if named]
    for one in found.examples[:3]:
        lines.append(f"{one.image}: {one.change:.1f} nats")
        lines += [
            f"    {side} says: {' '.join(word for word, _ in said)}" for side, said in (("A", one.words_a), ("B", one.words_b))
        ]
    if settings.output is not None:
        from devil_hf.report.difference import write_difference

        numbers = {number: key for key, number in keys.items()}
        shown = images.fetch([keys[one.image] for one in found.examples])
        pictures = {numbers[number]: load_images(image)[0] for number, _, image in shown}
        write_difference(found, settings.output, settings.a, settings.b or str(settings.backbone), images.name, pictures)
        lines.append(f"page: {settings.output}")
    show(settings, found.as_record(), "\n".join(lines))


def _named(images: Any, keys: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """(key, picture) pairs of a source; `keys` then has the number of each."""
    for number, picture in images.stream():
        key = images.key(number) if hasattr(images, "key") else f"image {number}"
        keys[key] = number
        yield key, picture


def _told(found: Any, layer: str, words: list[str]) -> list[str]:
    """Words with what they tell in A and in B."""
    told = {one.word: (one.told_a, one.told_b) for one in found.words if one.layer == layer}
    return [f"{word} {told[word][0]:.2f} > {told[word][1]:.2f}" for word in words]


VERBS.register(
    "diff",
    Verb(
        "diff",
        "tell what two networks say differently",
        "devil diff shapes --backbone finetuned.safetensors --images shapes:200 --output difference.html",
        lambda: DiffSettings,
        diff,
    ),
)
