"""`devil knock-out`: remove what a phrase is read from, and see how a class falls."""

from dataclasses import dataclass
from typing import Literal

from devil_hf.cli.verb import VERBS, Verb, show
from devil_hf.settings import ModelSettings, option


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
    limit: int = option("images of each folder, at most", 64, least=4)
    draws: int = option("random removals", 99, least=1)
    seed: int = option("of these", 0, least=0)

    def validate(self) -> None:
        """Raise a ValueError for a phrase without words."""
        if not self.phrase.strip():
            raise ValueError(f"phrase {self.phrase!r} is empty: give at least one word")


def knock_out_of_folders(settings: KnockOutSettings) -> None:
    """Remove and print."""
    import torch

    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.data.images import open_images
    from devil_hf.questions.knock_out import Classifier, fit_probe, knock_out, own_head
    from devil_hf.settings import read_layers

    folders = []
    for source in (settings.images, settings.without):
        stream = open_images(source, limit=settings.limit).stream()
        folders.append([image for _, image in stream if image is not None])
        if len(folders[-1]) < 4:
            raise ValueError(f"{source} has {len(folders[-1])} images: at least 4 are needed, half of them for the probe")
    model, processor = open_checkpoint(settings.checkpoint, settings.device)
    shown, without = (processor(images=one, return_tensors="pt")["pixel_values"].to(model.device) for one in folders)
    classifier: Classifier = own_head
    at, judged, told = settings.head, shown, f"class {settings.head} of the network's own head"
    if at is None:  # one half for the probe, the other to be judged
        labels = torch.tensor([[True]] * len(shown[::2]) + [[False]] * len(without[::2]))
        classifier, at, judged = fit_probe(model, torch.cat([shown[::2], without[::2]]), labels), 0, shown[1::2]
        told = f"a probe that tells {settings.images} from {settings.without}"
    (layer,) = read_layers([settings.layer], model.layer_names) or [settings.layer]
    (found,) = knock_out(
        model,
        processor,
        judged,
        [settings.phrase],
        [at],
        classifier,
        layer,
        without,
        what=settings.what,
        number=settings.number,
        draws=settings.draws,
        seed=settings.seed,
    )
    lines = [
        f"{found.removed.shape[-1]} {settings.what} of {settings.layer} that carry {settings.phrase!r} most, removed from "
        f"{len(judged)} images",
        f"    logit of {told}: falls by {found.fall:+.3f}",
        f"    as many at random: by {found.random.mean():+.3f} on average, {found.random.abs().mean():.3f} in size",
        f"    those that carry it least: by {found.least:+.3f}",
        f"    {found.ratio:.1f} times as far as at random, p = {found.p_value:.3f} of {len(found.random)} draws",
    ]
    if settings.what == "channels":
        best = [(int(unit), float(found.drops[unit])) for unit in found.removed]
        lines.append("    nats of the phrase: " + "  ".join(f"{unit} {drop:+.2f}" for unit, drop in best[:12]))
    show(settings, found.as_record(), "\n".join(lines))


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
