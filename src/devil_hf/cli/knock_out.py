"""`devil knock-out`: remove what a phrase is read from, and see how a class falls."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from devil_hf.cli.verb import VERBS, Verb, show
from devil_hf.settings import ModelSettings, option

if TYPE_CHECKING:
    from devil_hf.questions.knock_out import KnockOut

LEAST_IMAGES = 6  # of each folder: half of them are judged, and two threes are the fewest that a rank test tells apart at 5 %


@dataclass(kw_only=True)
class KnockOutSettings(ModelSettings):
    """A phrase, images with and without what it names, and a layer."""

    phrase: str = option('what is looked for, such as "a dog"', positional=True)
    images: str = option("folder of images that show it")
    without: str = option("folder of images that do not: their mean takes the place of what is removed")
    layer: str = option("name or index of the layer in which is removed")
    what: Literal["channels", "places"] = option("what is removed", "channels")
    number: int | None = option("how many (default: one in twenty)", None, least=1)
    head: int | None = option("class of the network's own head (default: a probe that tells the images apart)", None, least=0)
    limit: int = option("images of each folder, at most", 64, least=LEAST_IMAGES)
    draws: int = option("random removals; the p-value is at least 1 / (1 + draws)", 99, least=19)
    seed: int = option("of these", 0, least=0)

    def validate(self) -> None:
        """Raise a ValueError for a phrase without words, and images that are compared with themselves."""
        if not self.phrase.strip():
            raise ValueError(f"phrase {self.phrase!r} is empty: give at least one word")
        if Path(self.images).resolve() == Path(self.without).resolve():
            raise ValueError(f"--images and --without are both {self.images}: name images that do not show {self.phrase!r}")


def knock_out_of_folders(settings: KnockOutSettings) -> None:
    """Remove and print."""
    import torch

    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.data.images import open_images
    from devil_hf.questions.knock_out import Classifier, check_probe, fit_probe, knock_out, own_head
    from devil_hf.questions.phrases import known_phrases
    from devil_hf.settings import read_layers

    folders = []
    for source in (settings.images, settings.without):
        stream = open_images(source, limit=settings.limit).stream()
        folders.append([image for _, image in stream if image is not None])
        if len(folders[-1]) < LEAST_IMAGES:
            raise ValueError(
                f"{source} has {len(folders[-1])} images: at least {LEAST_IMAGES} are needed, half of them to be judged"
            )
    model, processor = open_checkpoint(settings.checkpoint, settings.device, settings.quantize)
    known_phrases(model, processor, [settings.phrase])
    shown, without = (processor(images=one, return_tensors="pt")["pixel_values"].to(model.device) for one in folders)
    classifier: Classifier = own_head
    right = None
    at, told = settings.head, f"class {settings.head} of the network's own head"
    if at is None:  # one half for the probe, the other to be judged
        labels = torch.tensor([[True]] * len(shown[::2]) + [[False]] * len(without[::2]))
        probe = fit_probe(model, torch.cat([shown[::2], without[::2]]), labels)
        right = check_probe(probe, model, shown[1::2], without[1::2])
        classifier, at = probe, 0
        told = f"a probe that tells {settings.images} from {settings.without}, right in {right:.0%} of other images"
    choosing = torch.arange(len(shown)) % 2 == 0 if settings.what == "channels" else None  # places are chosen image by image
    if choosing is None and right is not None:
        shown = shown[1::2]
    (layer,) = read_layers([settings.layer], model.layer_names) or [settings.layer]
    (found,) = knock_out(
        model,
        processor,
        shown,
        [settings.phrase],
        [at],
        classifier,
        layer,
        without,
        what=settings.what,
        number=settings.number,
        draws=settings.draws,
        seed=settings.seed,
        choosing=choosing,
    )
    chosen_on = 0 if choosing is None else int(choosing.sum())
    judged = len(shown) - chosen_on
    counts = {"images_chosen_on": chosen_on or judged, "images_judged": judged}  # places: each image by itself
    show(settings, found.as_record() | {"probe_right": right} | counts, _text(settings, found, told, judged, chosen_on))


def _text(settings: KnockOutSettings, found: "KnockOut", told: str, judged: int, chosen_on: int) -> str:
    """The answer for people: of a logit that is `told`, in so many judged images, by what so many others have chosen."""
    lines = [
        f"{found.removed.shape[-1]} {settings.what} of {settings.layer} that carry {settings.phrase!r} most"
        f"{f' in {chosen_on} images' if chosen_on else ''}, removed from {judged}{' others' if chosen_on else ' images'}",
        f"    logit of {told}: falls by {found.fall:+.3f}",
        f"    as many at random: by {found.random.mean():+.3f} on average, {found.random.abs().mean():.3f} in size",
        f"    those that it owes least to: by {found.least:+.3f}",
        f"    {found.ratio:.1f} times as far as at random, p = {found.p_value:.3f} of {len(found.random)} draws",
    ]
    if settings.what == "channels":
        best = [(int(unit), float(found.drops[unit])) for unit in found.removed]
        lines.append("    nats of the phrase: " + "  ".join(f"{unit} {drop:+.2f}" for unit, drop in best[:12]))
    return "\n".join(lines)


VERBS.register(
    "knock-out",
    Verb(
        "knock-out",
        "remove what a phrase is read from, and see how a class falls",
        'devil knock-out "a dog" --images dogs --without others --layer layer4 --checkpoint user/devil-resnet50-opt125m',
        lambda: KnockOutSettings,
        knock_out_of_folders,
    ),
)
