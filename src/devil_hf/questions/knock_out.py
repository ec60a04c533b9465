"""Knock-out: is what a phrase is read from also what a classifier decides by? From words to a causal claim.

For a phrase and a layer, each channel (or place) is taken out of the pooled feature in turn: it is put at its mean over other
images. The drop of the phrase's log-probability says how much the phrase owes to it; every drop is scored exactly, in batches,
none by a gradient. The channels with the highest mean drop over the images (or the places of each image) are then removed in the
network itself, by a forward hook that puts them at the same mean, and a classifier behind it is run. How far its logit falls
stands beside

    random   removals of as many channels or places, drawn at random: the p-value is (1 + those that fall as far) / (1 + draws)
    least    the removal of those with the smallest drops, up or down: what the phrase owes nothing to

The classifier is the network's own head, or a linear probe of its deepest layer. Words choose what is removed, logits judge it.
Channels can be chosen on other images than those that are judged (`choosing`); places belong to their image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import read_number, read_tensor, resolve_layer
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.phrases import known_phrases
from devil_hf.statistics import two_samples

What = Literal["channels", "places"]
Classifier = Callable[[DevilModel, Tensor], Tensor]  # logits (B, classes) of pixel values (B, 3, H, W)
SHARE = 0.05  # of the channels or places that are removed, where no number is given
CHUNK = 64  # images at once


@dataclass(frozen=True)
class KnockOut:
    """What the removal of the channels or places behind a phrase does to a class.

    Args:
        phrase: the phrase.
        drops: nats of the phrase that are lost when one is put at its mean: (U,) for channels, means over the images that choose;
            (B, U) for places.
        removed: (k,) or (B, k) positions of the highest drops.
        fall: of the logit of the phrase's class, mean over the images that are judged, when these are removed.
        random: (draws,) falls when as many are removed at random.
        least: fall when those with the smallest drops, of either sign, are removed.
        others: mean fall of the logits of the other classes; None where there is one class.
        p_value: (1 + random falls that are as far) / (1 + draws).
    """

    phrase: str
    drops: Tensor
    removed: Tensor
    fall: float
    random: Tensor
    least: float
    others: float | None
    p_value: float

    @property
    def ratio(self) -> float:
        """How many times as far as under random removals the logit falls; they count with the mean of their size."""
        return self.fall / max(float(self.random.abs().mean()), 1e-12)

    def as_record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        record = {name: getattr(self, name) for name in ("phrase", "fall", "least", "others", "p_value", "ratio")}
        return record | {name: getattr(self, name).tolist() for name in ("drops", "removed", "random")}


@torch.no_grad()
def knock_out(
    model: DevilModel,
    processor: DevilProcessor,
    pixel_values: Tensor,
    phrases: Sequence[str],
    classes: Sequence[int],
    classifier: Classifier,
    layer: str | int,
    others: Tensor,
    what: What = "channels",
    number: int | None = None,
    draws: int = 99,
    seed: int = 0,
    present: Tensor | None = None,
    choosing: Tensor | None = None,
) -> list[KnockOut]:
    """Remove what phrases are read from, and watch a classifier.

    Args:
        pixel_values: (B, 3, H, W).
        phrases: whose channels or places are looked for, each on its own.
        classes: the class of each phrase, as a position among the classifier's logits.
        classifier: `own_head`, a `LinearProbe`, or any other function of the model and pixel values that runs its backbone.
        layer: where is removed, by name or index.
        others: (M, 3, H, W) images whose mean takes the place of what is removed.
        number, draws: of channels or places to remove (None: one in twenty), and of random removals.
        present: (phrases, B) bool, which images each phrase is about; None for all.
        choosing: (B,) bool, images on which channels are chosen; the others are judged. None: all choose and are judged.

    Returns:
        One `KnockOut` per phrase; random removals are the same for all.

    Raises:
        TypeError: for `present` and `choosing` that are no tensors.
        ValueError: for numbers that do not fit, unknown words, phrases about no image (that chooses, or is judged), places that
            other images would choose, and layers that no hook reaches.
    """
    index = resolve_layer(layer, model.layer_names)
    tokens = [known_phrases(model, processor, [phrase]) for phrase in phrases]
    if len(classes) != len(phrases):
        raise ValueError(f"{len(classes)} classes for {len(phrases)} phrases: give one each")
    choose, judge = _parts(choosing, what, len(pixel_values))
    about = _about(present, phrases, choose, judge)
    maps = _maps(model, pixel_values, index)
    mean = _maps(model, others, index).mean(dim=(0, 2, 3))
    units = maps.shape[1] if what == "channels" else maps[0, 0].numel()
    number = _number(number, units, what)
    network = _Network(model, pixel_values[judge], classifier, index, maps[judge], mean)
    whole = network.logits(None)
    if not all(0 <= one < whole.shape[1] for one in classes):
        raise ValueError(f"classes {list(classes)}: the classifier has {whole.shape[1]}, from 0 on")
    at_random = _random_falls(network, whole, what, number, read_number(draws, "draws", 1), seed)
    found = []
    for row, phrase in enumerate(phrases):
        drops = evidence_drops(model, tokens[row], maps, mean, index, what, about[row] & choose)
        of_units = drops.reshape(-1, units)
        chosen, idle = (one[:, :number] for one in (of_units.argsort(dim=1, descending=True), of_units.abs().argsort(dim=1)))
        falls = (*(whole - network.logits(network.mask(one, what)) for one in (chosen, idle)), at_random)
        found.append(_judge(phrase, classes[row], drops, chosen, *(one[..., about[row, judge], :] for one in falls)))
    return found


def _number(number: int | None, units: int, what: What) -> int:
    """How many of the units are removed."""
    number = read_number(max(1, round(SHARE * units)) if number is None else number, "number", 1)
    if 2 * number > units:
        raise ValueError(f"number={number} of {units} {what}: remove at most half of them, so that others are left to compare")
    return number


def _parts(choosing: Tensor | None, what: What, images: int) -> tuple[Tensor, Tensor]:
    """(images,) bool each: which of them choose what is removed, and which are judged."""
    if choosing is None:
        return torch.ones(images).bool(), torch.ones(images).bool()
    if what == "places":
        raise ValueError("places are chosen in the image that they are removed from: leave choosing out")
    choose = read_tensor(choosing, "choosing").bool().cpu()
    if choose.shape != (images,) or choose.all() or not choose.any():
        raise ValueError(
            f"choosing of shape {tuple(choose.shape)} must leave some of {images} images to choose, and some to judge"
        )
    return choose, ~choose


def _about(present: Tensor | None, phrases: Sequence[str], choose: Tensor, judge: Tensor) -> Tensor:
    """(phrases, images) bool: which images each phrase is about."""
    shape = (len(phrases), len(choose))
    about = torch.ones(shape).bool() if present is None else read_tensor(present, "present").bool().cpu()
    if about.shape != shape:
        raise ValueError(f"present of shape {tuple(about.shape)}: expected {shape}, for every phrase and image")
    there = torch.stack([(about & part).any(dim=1) for part in (choose, judge)]).all(dim=0).tolist()
    if missing := [phrase for phrase, found in zip(phrases, there, strict=True) if not found]:
        raise ValueError(
            f"present must name an image for each phrase among those that choose and among those that are judged, which it does "
            f"not for {missing}: leave them out, or give other images"
        )
    return about


def _random_falls(network: "_Network", whole: Tensor, what: What, number: int, draws: int, seed: int) -> Tensor:
    """(draws, B, classes): how far logits fall when `number` channels, or places of each image, are removed at random."""
    random, maps = torch.Generator().manual_seed(seed), network.maps
    shape = (1, maps.shape[1]) if what == "channels" else (len(maps), maps[0, 0].numel())
    drawn = [torch.rand(shape, generator=random).argsort(dim=1)[:, :number] for _ in range(draws)]
    return torch.stack([whole - network.logits(network.mask(one, what)) for one in drawn])


def _judge(phrase: str, own: int, drops: Tensor, removed: Tensor, most: Tensor, least: Tensor, at_random: Tensor) -> KnockOut:
    """The falls (B, classes) of a removal and of the least, and (draws, B, classes) at random, as the verdict on class `own`."""
    rest = [one for one in range(most.shape[1]) if one != own]
    falls, fall = at_random[:, :, own].mean(dim=1), float(most[:, own].mean())
    return KnockOut(
        phrase=phrase,
        drops=drops,
        removed=removed.reshape(*drops.shape[:-1], removed.shape[1]),
        fall=fall,
        random=falls,
        least=float(least[:, own].mean()),
        others=float(most[:, rest].mean()) if rest else None,
        p_value=(1 + int((falls >= fall).sum())) / (1 + len(falls)),
    )


def evidence_drops(
    model: DevilModel, tokens: dict[str, Tensor], maps: Tensor, mean: Tensor, index: int, what: What, about: Tensor
) -> Tensor:
    """Nats of a phrase that are lost without each channel, (C,), mean over the images `about`; or each place, (B, H * W).

    Args:
        tokens: of one phrase, checked.
        maps: (B, C, H, W) of the layer at position `index`.
        mean: (C,) what takes the place of what is removed.
        about: (B,) bool, the images that the phrase is about; the places of all are scored.
    """
    drops = []
    for one in maps if what == "places" else maps[about]:
        pooled = one.mean(dim=(1, 2))
        if what == "channels":
            without = torch.where(torch.eye(len(pooled), device=pooled.device).bool(), mean, pooled)
        else:
            without = pooled + (mean - one.flatten(1).T) / one[0].numel()
        vectors: list[Tensor | None] = [None] * len(model.layer_names)
        vectors[index] = torch.cat([pooled[None], without])
        scores = model.score_checked(model.translate(vectors), tokens)[:, 0].sum(dim=-1).cpu()
        drops.append(scores[0] - scores[1:])
    return torch.stack(drops) if what == "places" else torch.stack(drops).mean(dim=0)


def _maps(model: DevilModel, pixel_values: Tensor, index: int) -> Tensor:
    parts = [model.extract_features(part, [index])[index] for part in pixel_values.split(CHUNK)]
    return torch.cat([part for part in parts if part is not None])


@dataclass
class _Network:
    """A network of which parts are removed: the map (B, C, H, W) of a layer is put at `mean` (C,) where a mask says so."""

    model: DevilModel
    pixel_values: Tensor
    classifier: Classifier
    index: int
    maps: Tensor
    mean: Tensor

    def mask(self, units: Tensor, what: What) -> Tensor:
        """(1, C, 1, 1) or (B, 1, H, W), True at units (1, k) or (B, k)."""
        height, width = self.maps.shape[-2:]
        size = self.maps.shape[1] if what == "channels" else height * width
        chosen = torch.zeros(len(units), size).bool().scatter(1, units.cpu(), True).to(self.maps.device)
        return chosen[:, :, None, None] if what == "channels" else chosen.view(-1, 1, height, width)

    def logits(self, mask: Tensor | None) -> Tensor:
        """(B, classes) with the mask removed; None for the network as it is."""
        found = []
        for start in range(0, len(self.pixel_values), CHUNK):
            part = self.pixel_values[start : start + CHUNK]
            with self.removing(mask if mask is None or len(mask) == 1 else mask[start : start + CHUNK]):
                found.append(self.classifier(self.model, part).float().cpu())
        return torch.cat(found)

    @contextmanager
    def removing(self, mask: Tensor | None) -> Iterator[None]:
        """Put the layer at its mean where the mask (1 or B, C or 1, H or 1, W or 1) is True, as long as this lasts."""
        if mask is None:
            yield
            return
        module = self._module()
        handle = module.register_forward_hook(lambda module, arguments, output: self._replaced(output, mask))
        try:
            yield
        finally:
            handle.remove()

    def _module(self) -> nn.Module:
        name, config = self.model.layer_names[self.index], self.model.backbone.config
        name = config["readers"][self.index].get("module", name)
        found = dict(self.model.backbone.module.named_modules()).get(name)
        if found is None:
            raise ValueError(f"layer {name!r} is no module of the network, which a hook could reach: choose another layer")
        return found

    def _replaced(self, output: Any, mask: Tensor) -> Any:
        """The output of a module, in its own layout, with the mask put at the mean."""
        if isinstance(output, tuple):
            return (self._replaced(output[0], mask), *output[1:])
        channels, height, width = self.maps.shape[1:]
        shape, mean = tuple(output.shape[1:]), self.mean.to(output)
        if shape == (channels, height, width):
            return torch.where(mask, mean[:, None, None], output)
        if shape == (height, width, channels):
            return torch.where(mask.permute(0, 2, 3, 1), mean, output)
        extra = shape[0] - height * width  # class and register tokens, in front
        if len(shape) != 2 or shape[1] != channels or extra < 0:
            raise ValueError(f"layer {self.model.layer_names[self.index]!r} gives {shape}: no layout that can be removed from")
        tokens = mask.expand(-1, -1, height, width).flatten(2).transpose(1, 2)
        return torch.cat([output[:, :extra], torch.where(tokens, mean, output[:, extra:])], dim=1)

    def __post_init__(self) -> None:
        """A ValueError where what the hook removes is not what the layer is read from."""
        half = torch.arange(self.maps.shape[1], device=self.maps.device)[None] < self.maps.shape[1] // 2
        mask = half[:, :, None, None]
        with self.removing(mask):
            found = _maps(self.model, self.pixel_values[:1], self.index)
        if not torch.allclose(found, torch.where(mask, self.mean[:, None, None], self.maps[:1]), atol=1e-4, rtol=1e-3):
            name = self.model.layer_names[self.index]
            raise ValueError(f"layer {name!r} is not read where the network makes it, so nothing can be removed: choose another")


def own_head(model: DevilModel, pixel_values: Tensor) -> Tensor:
    """Logits (B, classes) of the network's own head.

    Raises:
        ValueError: for a network that has none.
    """
    module: Any = model.backbone.module
    parameter = next(module.parameters())
    pixel_values = pixel_values.to(device=parameter.device, dtype=parameter.dtype)
    classifier = module.get_classifier() if hasattr(module, "get_classifier") else None
    if isinstance(classifier, nn.Linear):
        return module(pixel_values)
    if hasattr(module, "classifier") and isinstance(logits := getattr(module(pixel_values), "logits", None), Tensor):
        return logits
    raise ValueError("the network has no head of its own: fit a probe on images with labels")


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of the deepest layer's mean: `weight` (classes, C), `bias` (classes,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, model: DevilModel, pixel_values: Tensor) -> Tensor:
        """Logits (B, classes)."""
        pooled = _deepest(model, pixel_values)
        return pooled @ self.weight.T.to(pooled) + self.bias.to(pooled)


def _deepest(model: DevilModel, pixel_values: Tensor) -> Tensor:
    return _maps(model, pixel_values, len(model.layer_names) - 1).mean(dim=(2, 3)).float()


def fit_probe(model: DevilModel, pixel_values: Tensor, labels: Tensor, penalty: float = 1e-3) -> LinearProbe:
    """A probe for labels (B, classes) of 0 and 1, each on its own, by logistic regression on standardised features.

    Args:
        penalty: weight of the sum of squares.

    Raises:
        ValueError: for a class of which all images are alike.
    """
    truth = labels.float()
    if one := [at for at, column in enumerate(truth.T) if len(column.unique()) < 2]:
        raise ValueError(f"classes {one} need images with and without: give some of both")
    with torch.no_grad():
        pooled = _deepest(model, pixel_values).cpu()
        mean, deviation = pooled.mean(dim=0), pooled.std(dim=0).clamp_min(1e-6)
    probe = nn.Linear(pooled.shape[1], truth.shape[1])
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(probe((pooled - mean) / deviation), truth, reduction="none").mean(dim=0).sum()
        loss = loss + penalty * probe.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight = (probe.weight / deviation).detach()
    return LinearProbe(weight, (probe.bias - weight @ mean).detach())


@torch.no_grad()
def check_probe(probe: LinearProbe, model: DevilModel, shown: Tensor, without: Tensor, level: float = 0.05) -> float:
    """In what share of images that it was not fitted on a probe of one class is right, mean of both kinds.

    Args:
        shown, without: (N, 3, H, W) images with the class, and (M, 3, H, W) without.

    Raises:
        ValueError: for a probe that does not tell them apart better than chance does at the level: its logit means nothing.
        MissingExtraError: without scipy.
    """
    inside, outside = (probe(model, one).cpu()[:, 0].numpy() for one in (shown, without))
    right = ((inside > 0).mean() + (outside <= 0).mean()) / 2
    if (chance := two_samples(inside, outside)) > level + 1e-9:  # 1 in 20 is 1 in 20
        raise ValueError(
            f"the probe is right in {right:.0%} of {len(inside)} and {len(outside)} other images, which chance explains "
            f"(p = {chance:.2g}): give more images, or others"
        )
    return float(right)


__all__ = ["Classifier", "KnockOut", "LinearProbe", "check_probe", "evidence_drops", "fit_probe", "knock_out", "own_head"]
