"""Audits: whether a network carries what a phrase says, as a claim that a test can make and that its error rate bounds.

Images with the thing are asked for the phrase, and images without it; by masks, the place of the thing in each is asked, and
the same place in an image without it, for places of different sizes differ where nothing is there to read. The chance that the
evidence of the one is above that of the other, the area under the ROC curve, is bounded from below and above, each bound wrong
at the stated level. The verdict follows from the bounds alone:

    not encoded   both bounds within `bound` of 1/2 on either side: what there may be is less than what counts
    encoded       else, where the lower bound is above 1/2
    reversed      else, where the upper bound is below 1/2: the thing is read, and speaks against its word
    undecided     else: the images are too few to say

So an absence is a finding, not the lack of one. It is about what this translator can say: a positive control shows that it can
say the phrase at all, and a probe reads the features without any words. Absence is claimed only where neither speaks against it.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from devil_hf.extras import needs
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import pool, region_weights, resolve_layers
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.phrases import known_phrases
from devil_hf.statistics import Separation, detectable_area, separation, size_for_absence, size_for_presence

ENCODED, NOT_ENCODED, REVERSED, UNDECIDED = "encoded", "not encoded", "reversed", "undecided"
CLAIMS = (ENCODED, NOT_ENCODED)
LEVEL, BOUND, POWER = 0.05, 0.6, 0.8
SHOWN = 5  # images that a message names
LEAST_LEVEL = 1e-6
PENALTY = 0.01  # of the probe
Images = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What is claimed, and the images that are to show it.

    Args:
        phrase: what is asked for.
        claim: "encoded" or "not encoded".
        present: images with the thing, as the processor reads them (pictures, arrays, paths); or such images by name.
        absent: images without it, which should differ in nothing else.
        masks: where the thing is in each of `present`, (H, W) in the size of the image: only its place is asked, and the same
            place in the image of `absent` that has its number. Each place is compared with its own pair alone.
        paired: whether `absent` holds the same scenes in the same order; each image is then compared with its own pair alone.
        layers: those that are asked together; None for all.
        level: the error rate of each bound.
        bound: the smallest area that counts as encoded, above 1/2.
        probe: whether a linear probe of the pooled features has to agree with an absence. It learns from half of the images
            and is judged on the others.
        batch_size: images at once.

    Raises:
        ValueError: for numbers of images of which no outcome could show the claim, pairs that do not match, images that are in
            both groups, by content, a probe of what is claimed to be encoded, and numbers out of their range.
    """

    phrase: str
    claim: str
    present: Images
    absent: Images
    masks: Sequence[Any] | None = None
    paired: bool = False
    layers: Any = None
    level: float = LEVEL
    bound: float = BOUND
    probe: bool = False
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.claim not in CLAIMS:
            raise ValueError(f"claim={self.claim!r} is none of {', '.join(CLAIMS)}")
        if not LEAST_LEVEL <= self.level < 0.5:
            raise ValueError(f"level={self.level!r} must be an error rate from {LEAST_LEVEL:g} to 0.5, such as {LEVEL}")
        if not 0.5 < self.bound < 1:
            raise ValueError(f"bound={self.bound!r} must be an area between 0.5 (chance) and 1, such as {BOUND}")
        if self.probe and self.claim == ENCODED:
            raise ValueError("probe=True is for what is claimed to be not encoded: a probe says nothing of what words say")
        self._check_sizes()
        (names, present), (other_names, absent) = _named(self.present), _named(self.absent)
        others = dict(zip(map(_content, absent), other_names, strict=True))
        for name, image in zip(names, present, strict=True):
            if other := others.get(_content(image)):
                raise ValueError(f"{name} is among the images with the thing and, as {other}, among those without it")

    @property
    def in_pairs(self) -> bool:
        """Whether each image is compared with one other alone."""
        return self.paired or self.masks is not None

    def _check_sizes(self) -> None:
        with_it, without = len(self.present), len(self.absent)
        if self.masks is not None and len(self.masks) != with_it:
            raise ValueError(f"{len(self.masks)} masks for {with_it} images with the thing: give one of each")
        if self.in_pairs and with_it != without:
            raise ValueError(f"{with_it} images with the thing and {without} without it are no pairs: give one of each")
        for_absence = size_for_absence(self.bound, self.level, 0.0, self.in_pairs)
        needed = size_for_presence(self.level, self.in_pairs) if self.claim == ENCODED else for_absence
        if self.probe and needed is not None:
            needed *= 2  # half of them are learned from
        if needed is None or min(with_it, without) < needed:
            kind = "pairs" if self.in_pairs else "images with the thing and as many without it"
            raise ValueError(
                f"{self.phrase!r}: {with_it} and {without} images cannot show that it is {self.claim} at an error rate of "
                f"{self.level:g}, whatever they give: at least {needed} {kind} are needed"
                f"{', of which a probe judges half' * self.probe}"
            )

    def check(self, model: DevilModel, processor: DevilProcessor) -> None:
        """Raise what stands in the way of asking, before any image is read.

        Raises:
            ValueError: for a phrase that the language model cannot represent, unknown layers, and masks that are empty where the
                network looks.
            MissingExtraError: for a probe without scikit-learn.
        """
        if self.probe:
            needs("sklearn", "evaluate")
        resolve_layers(self.layers, model.layer_names)
        known_phrases(model, processor, [self.phrase])
        for name, mask in zip(_named(self.present)[0], self.masks or (), strict=self.masks is not None):
            if _regions(processor, [mask]).sum() <= 0:
                raise ValueError(f"the mask of {name} is empty, of what the network sees of it: leave the image out")


@dataclass(frozen=True)
class Finding:
    """What an audit found.

    Args:
        phrase, claim, bound: as they were asked.
        layers: names of those that were asked together.
        words: how far the evidence of the images with the thing is above the others', with its bounds.
        present, absent: evidence of each image, in nats per token over the null prefix.
        names: of the images with the thing.
        paired: whether each was compared with its own pair.
        detectable: the smallest area that images of this number show to be encoded, with a probability of 80 %; NaN for none.
        control: a finding of what this translator is known to say.
        probe: as `words`, of a linear probe of the features, in the half of the images that it has not seen.
        checkpoint: name of what was asked.
    """

    phrase: str
    claim: str
    bound: float
    layers: tuple[str, ...]
    words: Separation
    present: tuple[float, ...]
    absent: tuple[float, ...]
    names: tuple[str, ...]
    paired: bool
    detectable: float
    control: "Finding | None" = None
    probe: Separation | None = None
    checkpoint: str = ""

    @property
    def reading(self) -> str:
        """The verdict by the evidence of words alone."""
        return verdict(self.words, self.bound)

    @property
    def verdict(self) -> str:
        """What can be said: an absence only where the control could be read, and the probe reads nothing either."""
        if self.reading != NOT_ENCODED:
            return self.reading
        if self.probe is not None and self.probe.high >= self.bound:
            return ENCODED if self.probe.low > 0.5 else UNDECIDED
        return NOT_ENCODED if self.control is None or self.control.verdict == ENCODED else UNDECIDED

    @property
    def passed(self) -> bool:
        """Whether the claim holds."""
        return self.verdict == self.claim

    @property
    def worst(self) -> list[tuple[str, float]]:
        """The images with the thing that speak most against the claim, and their evidence (over that of their pair)."""
        values = np.array(self.present) - (np.array(self.absent) if self.paired else 0)
        order = np.argsort(values if self.claim == ENCODED or self.reading == REVERSED else -values, kind="stable")
        return [(self.names[index], float(values[index])) for index in order[:SHOWN]]

    @property
    def message(self) -> str:
        """The verdict with its figures, in sentences."""
        return " ".join([*_told(self), *_told_beside(self)])

    def as_record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        record = dataclasses.asdict(self) | {"verdict": self.verdict, "passed": self.passed, "message": self.message}
        return record | {"worst": self.worst, "control": None if self.control is None else self.control.as_record()}


def verdict(words: Separation, bound: float = BOUND) -> str:
    """What bounds say, see the module's docstring."""
    if 1 - bound < words.low and words.high < bound:
        return NOT_ENCODED
    return ENCODED if words.low > 0.5 else REVERSED if words.high < 0.5 else UNDECIDED


def audit(model: DevilModel, processor: DevilProcessor, asked: Audit, control: Finding | None = None) -> Finding:
    """Ask for a phrase in images with and without the thing.

    Args:
        control: what an audit of something that this translator must be able to say has found: the phrase in other images, in the
            features of another network that it reads, or another phrase. Where it is not encoded, no absence is claimed.

    Raises:
        ValueError: see `Audit.check`, which is called first; for images that cannot be read.
        MissingExtraError: for a probe without scikit-learn.
    """
    asked.check(model, processor)
    names, present, features = _read(model, processor, asked, asked.present)
    _, absent, others = _read(model, processor, asked, asked.absent)
    words = separation(present, absent, asked.level, asked.in_pairs)
    return Finding(
        phrase=asked.phrase,
        claim=asked.claim,
        bound=asked.bound,
        layers=tuple(model.layer_names[index] for index in resolve_layers(asked.layers, model.layer_names)),
        words=words,
        present=tuple(present.tolist()),
        absent=tuple(absent.tolist()),
        names=names,
        paired=asked.in_pairs,
        detectable=detectable_area(words.sizes, asked.level, POWER, asked.bound),
        control=control,
        probe=separation(*probe_scores(features, others, asked.in_pairs), asked.level, asked.in_pairs) if asked.probe else None,
        checkpoint=str(model.config.name_or_path),
    )


def assert_encoded(
    model: DevilModel, processor: DevilProcessor, phrase: str, present: Images, absent: Images, **options: Any
) -> Finding:
    """Assert that the network carries what a phrase says.

    Args:
        phrase, present, absent: as in `Audit`.
        options: its others: `masks`, `paired`, `layers`, `level`, `bound`, `batch_size`.

    Returns:
        What was found.

    Raises:
        AssertionError: with the figures and the worst images, where it is not encoded, or undecided.
        ValueError: as `Audit` and `audit`.
    """
    return _asserted(audit(model, processor, Audit(phrase=phrase, claim=ENCODED, present=present, absent=absent, **options)))


def assert_not_encoded(
    model: DevilModel,
    processor: DevilProcessor,
    phrase: str,
    present: Images,
    absent: Images,
    *,
    control: Finding | None = None,
    **options: Any,
) -> Finding:
    """Assert that the network does not carry what a phrase says, as far as this translator can read it.

    Args:
        phrase, present, absent: as in `Audit`.
        control: as in `audit`.
        options: the others of `Audit`: `masks`, `paired`, `layers`, `level`, `bound`, `probe`, `batch_size`.

    Returns:
        What was found.

    Raises:
        AssertionError: with the figures and the worst images, where it is encoded; with the number of images that would be
            needed, where it is undecided.
        ValueError: as `Audit` and `audit`.
    """
    asked = Audit(phrase=phrase, claim=NOT_ENCODED, present=present, absent=absent, **options)
    return _asserted(audit(model, processor, asked, control))


def _asserted(found: Finding) -> Finding:
    if not found.passed:
        raise AssertionError(found.message)
    return found


# ------------------------------------------------------------------------------------------------------ reading images


def _content(image: Any) -> bytes:
    """What two images have in common that are one: the bytes of a file, the pixels of a picture; of no file, its name."""
    if isinstance(image, str | PathLike):
        try:
            content = Path(image).read_bytes()
        except (OSError, ValueError):
            content = str(image).encode("utf-8", "surrogatepass")
    else:
        pixels = np.asarray(image.detach().float().cpu() if isinstance(image, Tensor) else image)
        content = f"{pixels.dtype} {pixels.shape}".encode() + pixels.tobytes()
    return hashlib.sha256(content).digest()


def _named(images: Images) -> tuple[tuple[str, ...], list[Any]]:
    if isinstance(images, Mapping):
        return tuple(images), list(images.values())
    names = (str(one) if isinstance(one, str | PathLike) else f"image {at}" for at, one in enumerate(images))
    return tuple(names), list(images)


@torch.no_grad()
def _read(
    model: DevilModel, processor: DevilProcessor, asked: Audit, images: Images
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Names (B,), evidence (B,) in nats per token and, for a probe, pooled features (B, C)."""
    (names, pictures), visible = _named(images), resolve_layers(asked.layers, model.layer_names)
    phrases = processor(text=[asked.phrase])
    null = model.score_prefix(model.null_prefix(), phrases).sum()
    tokens = phrases["input_ids"].shape[1]
    evidence, pooled = [], []
    with tqdm(total=len(pictures), desc=asked.phrase, unit="image", delay=2) as bar:
        for start in range(0, len(pictures), asked.batch_size):
            stop = min(start + asked.batch_size, len(pictures))
            pixels = processor(images=pictures[start:stop])["pixel_values"]
            features = model.extract_features(pixels, visible)
            regions = None if asked.masks is None else _regions(processor, asked.masks[start:stop])
            prefix = model.ask(layers=visible, feature_maps=features, regions=regions)
            evidence.append((model.score_prefix(prefix, phrases).sum(dim=(1, 2)) - null) / tokens)
            if asked.probe:
                maps = [one for one in features if one is not None]
                pooled.append(torch.cat([_pooled(one, regions) for one in maps], dim=1).float().cpu())
            bar.update(stop - start)
    return names, torch.cat(evidence).cpu().numpy(), torch.cat(pooled).numpy() if pooled else np.zeros((0, 0))


def _regions(processor: DevilProcessor, masks: Sequence[Any]) -> Tensor:
    """(B, 1, H, W): where the thing is."""
    return processor.masks_to_regions([np.asarray(mask, dtype=np.float32) for mask in masks])


def _pooled(maps: Tensor, regions: Tensor | None) -> Tensor:
    weights = None if regions is None else region_weights(regions.to(maps.device), (maps.shape[-2], maps.shape[-1]))[0]
    return pool(maps, weights)


def probe_scores(present: np.ndarray, absent: np.ndarray, paired: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a logistic regression on features (N, C) and (M, C): it learns from a random half of each, and judges the other.

    Scores of several folds would be more, but not independent of each other, and bounds of them too narrow.

    Returns:
        Those of the halves that it has not seen; of pairs, both are of the same.

    Raises:
        MissingExtraError: without scikit-learn.
    """
    needs("sklearn", "evaluate")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    orders = [np.random.default_rng(0 if paired else side).permutation(len(one)) for side, one in enumerate((present, absent))]
    learned, judged = zip(*((one[: len(one) // 2], one[len(one) // 2 :]) for one in orders), strict=True)
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=1_000))
    reader.fit(np.concatenate([present[learned[0]], absent[learned[1]]]), np.repeat([1, 0], [len(one) for one in learned]))
    return reader.decision_function(present[judged[0]]), reader.decision_function(absent[judged[1]])


# ------------------------------------------------------------------------------------------------------------ messages


def figures(found: Separation) -> str:
    """An area with its bounds, as messages have it."""
    return f"{_short(found.area)} [{_short(found.low)}, {_short(found.high)}]"


def _short(share: float) -> str:
    text = f"{share:.3f}"
    return text if share >= 0.9995 else text.removeprefix("0")


def _told(found: Finding) -> Iterator[str]:
    """What was asked, what came out, and what speaks against the claim."""
    words, kind = found.words, "pairs" if found.paired else "images with against images without"
    sizes = " and ".join(map(str, words.sizes))
    asked = "" if found.passed else f", but was claimed to be {found.claim}"
    of = (f"{found.checkpoint}: " if found.checkpoint else "") + ", ".join(found.layers)
    yield (
        f"{found.phrase!r} is {_reason(found)}{asked} ({of}): AUROC {figures(words)} of its evidence, "
        f"{sizes} {kind}, each bound wrong at {words.level:g}; {found.bound:g} counts as encoded."
    )
    if found.passed:
        return
    if found.reading in (ENCODED, REVERSED) or found.claim == ENCODED:
        over = " over their pair" if found.paired else ""
        yield f"Worst images: {', '.join(f'{name} {value:+.2f}' for name, value in found.worst)} nats per token{over}."
    if found.reading == UNDECIDED:
        yield _needed(found)


def _reason(found: Finding) -> str:
    """The verdict, and where words alone would say otherwise, why."""
    if found.verdict == REVERSED:
        return "reversed (it is read, but its word is less likely where it is)"
    if found.verdict == found.reading:
        return found.verdict
    if found.verdict == ENCODED:
        return "encoded (no word says it, but a linear probe reads it)"
    if found.probe is not None and found.probe.high >= found.bound:
        return f"undecided (no word says it, but the upper bound of a linear probe is not below {found.bound:g})"
    return "undecided (no word says it, but neither did one in the control)"


def _needed(found: Finding) -> str:
    """How many images would have decided it."""
    words, each = found.words, "pairs" if found.paired else "images on each side"
    power = f"with a probability of {POWER:.0%}"
    if found.claim == NOT_ENCODED:
        nothing, here = (size_for_absence(found.bound, words.level, POWER, found.paired, area) for area in (0.5, words.area))
        seems = f"about {here}" if here else "no number"
        return f"If nothing is there, {nothing} {each} show it {power}; if the area is the one that was found, {seems}."
    if words.area < found.bound:
        return "Nothing speaks for it." if words.area <= 0.5 else f"What was found is below {found.bound:g}, which alone counts."
    needed = _size_to_show(words.area, words.level, found)
    return f"An area of {_short(words.area)} is shown to be encoded by {needed} {each} {power}."


def _size_to_show(area: float, level: float, found: Finding) -> int:
    size = 8
    while not detectable_area((size,) if found.paired else (size, size), level, POWER, found.bound) <= area:
        size = size * 11 // 10 + 1
    return size


def _told_beside(found: Finding) -> Iterator[str]:
    """The power of the test, and what a control and a probe say."""
    if found.reading == NOT_ENCODED and found.words.low > 0.5:
        yield f"It is above chance, but below {found.bound:g}."
    if found.reading in (NOT_ENCODED, UNDECIDED) and np.isfinite(found.detectable):
        yield f"An area of {_short(found.detectable)} would have been found encoded with a probability of {POWER:.0%}."
    if found.probe is not None:
        reads = " reads it" if verdict(found.probe, found.bound) == ENCODED else ""
        yield f"A linear probe of the features{reads}: AUROC {figures(found.probe)}."
    if found.claim == NOT_ENCODED and found.control is not None:
        able = "can say" if found.control.verdict == ENCODED else "was not shown to be able to say"
        yield f"Control: the translator {able} {found.control.phrase!r}, AUROC {figures(found.control.words)}."
    elif found.verdict == NOT_ENCODED:
        yield "No positive control shows that this translator can say it at all."


__all__ = [
    "CLAIMS",
    "ENCODED",
    "NOT_ENCODED",
    "REVERSED",
    "UNDECIDED",
    "Audit",
    "Finding",
    "assert_encoded",
    "assert_not_encoded",
    "audit",
    "figures",
    "probe_scores",
    "verdict",
]
