"""At which depth a thing becomes readable: the evidence of phrases for whole images, layer by layer.

A translator with layer dropout is asked one layer at a time for this, as a tuned lens is; all layers together stand beside it.

A statement is a phrase about an image that is true or false. Statements are counted in groups (a phrase, or a class of words). At
each layer a group has the mean evidence of its true and of its false statements, and the area under the ROC curve of the one
against the other (AUROC, chance is .5). What is compared with what follows from the group:

* a group of several phrases, all of which are asked of every image: does this image support what is true of it more than what is
  false? From each phrase's evidence its mean over the images is taken first, so that a liking for the phrases that are true more
  often tells nothing. The AUROC is the mean over images of each one's own. The control is the same with what is true of the other
  images, the p-value that of giving what is true to the images at random;
* a group of choices that are drawn for each image (`Statement.drawn`): the same without a mean and without a control; the p-value
  is of the test that takes the signs of (AUROC - .5) of the images at random;
* a single phrase between images: do those that it is true of support it more than those that it is false of? The p-value is of
  the rank test of Mann and Whitney.

Intervals are over images drawn with replacement, p-values are adjusted by Holm for all groups and layers together. A group
emerges at the first layer that is above chance.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devil_hf.model.explaining_devil import ALL_LAYERS, PhraseScorer
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import Layers, resolve_layers
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.phrases import known_phrases
from devil_hf.statistics import (
    Ratio,
    bootstrap_draws,
    exchanged_rows,
    holm,
    interval,
    roc_area,
    roc_areas,
    sign_flip,
    two_samples,
)

ERROR_RATE = 0.05
DECIMALS = 4  # of evidence; what differs by less is rounding of sums
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Statement:
    """Something said of an image.

    Args:
        image: its number.
        phrase: what is said.
        group: what it is counted with.
        true: whether it holds.
        carrier: a neutral word that is read before the phrase, and not scored.
        drawn: whether it belongs to a choice that was drawn for this image alone, each of whose phrases was as likely to be the
            true one. Without it, all phrases of a group must be asked of every image.
    """

    image: int
    phrase: str
    group: str
    true: bool
    carrier: str | None = None
    drawn: bool = False


@dataclass(frozen=True)
class Depth:
    """What one layer tells of a group; intervals are 95 %, None where they are not defined.

    Args:
        true, false: mean evidence of true and of false statements, in nats per token over the null prefix.
        auroc: of true against false statements, see the module's docstring.
        control: the AUROC where what is true of the other images is taken for true of each; None where there is no such control.
        p_value: one-sided, adjusted for all groups and layers.
    """

    true: float
    true_interval: Interval
    false: float
    false_interval: Interval
    auroc: float
    auroc_interval: Interval
    control: float | None
    p_value: float


@dataclass(frozen=True)
class Emergence:
    """Groups of statements against depth.

    Args:
        layers: names, shallowest first, without "all".
        depths: group -> layer, and "all" for these layers together, where they are several -> `Depth`.
        within: group -> whether statements are compared within images.
        statements: group -> (true, false) statements that were compared.
        images: group -> images with a statement that was compared.
        draws: group -> layer -> AUROC of each draw of the bootstrap, the same draws for all.
    """

    layers: list[str]
    depths: dict[str, dict[str, Depth]]
    within: dict[str, bool]
    statements: dict[str, tuple[int, int]]
    images: dict[str, int]
    draws: dict[str, dict[str, np.ndarray]] = field(repr=False, compare=False)

    def first(self, group: str, error_rate: float = ERROR_RATE) -> str | None:
        """The shallowest layer that tells true from false statements of a group; None where none does."""
        return next((layer for layer in self.layers if self.depths[group][layer].p_value <= error_rate), None)

    def lead(self, group: str, other: str, layer: str) -> tuple[float, Interval]:
        """How far the AUROC of a group is above that of another one at a layer, and the interval of this paired difference."""
        value = self.depths[group][layer].auroc - self.depths[other][layer].auroc
        return value, interval(self.draws[group][layer] - self.draws[other][layer])


@torch.no_grad()
def evidence_by_layer(
    model: DevilModel,
    processor: DevilProcessor,
    pixel_values: Tensor | None = None,
    phrases: Sequence[str] = (),
    layers: Layers = None,
    carrier: str | None = None,
    feature_maps: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Evidence of phrases for whole images, in nats per token over the null prefix.

    Args:
        pixel_values, feature_maps: B images, as in `model.ask`.
        phrases: K texts.
        layers: those that are asked; None for every one.
        carrier: a neutral word that is read before each phrase, and not scored.

    Returns:
        layer -> (B, K), each layer alone, shallowest first; under "all" these layers together, where they are several.

    Raises:
        ValueError: for no phrases, and for one with words that the language model does not know.
    """
    tokens = known_phrases(model, processor, phrases, carrier)
    visible = resolve_layers(layers, model.layer_names)
    features = model.read_features(pixel_values, feature_maps, visible)
    scorer = PhraseScorer(model, tokens)
    found = dict(zip((model.layer_names[index] for index in visible), scorer.layer_evidence(features, visible), strict=True))
    if len(visible) > 1:
        together = model.score_checked(model.ask(layers=visible, feature_maps=features), tokens).sum(dim=-1)
        found[ALL_LAYERS] = scorer.measured(together, "evidence")
    return {name: values.cpu() for name, values in found.items()}


@torch.no_grad()
def ask_statements(
    model: DevilModel,
    processor: DevilProcessor,
    pixel_values: Tensor,
    statements: Sequence[Sequence[Statement]],
    layers: Layers = None,
) -> list[dict[str, list[float]]]:
    """The evidence of what is said of each image.

    Args:
        pixel_values: (B, 3, H, W).
        statements: of each of these images, whatever their number says.
        layers: as in `evidence_by_layer`.

    Returns:
        Per image, layer -> evidence of each of its statements, in their order.
    """
    features = model.read_features(pixel_values, None, resolve_layers(layers, model.layer_names))
    calls: dict[tuple[str | None, tuple[str, ...]], list[int]] = {}  # images of which the same is asked are asked together
    for image, own in enumerate(statements):
        for carrier in dict.fromkeys(one.carrier for one in own):
            phrases = tuple(dict.fromkeys(one.phrase for one in own if one.carrier == carrier))
            calls.setdefault((carrier, phrases), []).append(image)
    known: list[dict[str, dict[tuple[str | None, str], float]]] = [{} for _ in statements]
    for (carrier, phrases), images in calls.items():
        chosen = [None if maps is None else maps[images] for maps in features]
        for layer, values in evidence_by_layer(model, processor, None, phrases, layers, carrier, chosen).items():
            for image, row in zip(images, values.tolist(), strict=True):
                pairs = {(carrier, phrase): value for phrase, value in zip(phrases, row, strict=True)}
                known[image].setdefault(layer, {}).update(pairs)
    return [
        {layer: [values[one.carrier, one.phrase] for one in own] for layer, values in by_layer.items()}
        for by_layer, own in zip(known, statements, strict=True)
    ]


def emergence(
    model: DevilModel,
    processor: DevilProcessor,
    images: Sequence[Any],
    statements: Sequence[Statement],
    layers: Layers = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Emergence:
    """At which layer true statements become readable.

    Args:
        images: by number, in any form that the processor takes.
        statements: of these images.
        layers: those that are asked, each alone and all together; None for every one.
        batch_size: images at once.
        seed: of intervals and permutations.
        progress: wraps the batches, such as `tqdm`.

    Raises:
        ValueError: for a statement about no image, and as `check_statements`.
    """
    asked = [model.layer_names[index] for index in resolve_layers(layers, model.layer_names)]
    check_statements(statements, len(asked) + (len(asked) > 1))
    by_image: dict[int, list[int]] = {}
    for at, statement in enumerate(statements):
        if not 0 <= statement.image < len(images):
            raise ValueError(f"{statement} is about an image that is not there: there are {len(images)}, numbered from 0")
        by_image.setdefault(statement.image, []).append(at)
    values: dict[str, np.ndarray] = {}
    numbers = sorted(by_image)
    for begin in progress(range(0, len(numbers), batch_size)):
        batch = numbers[begin : begin + batch_size]
        pixels = processor(images=[images[number] for number in batch], return_tensors="pt")["pixel_values"].to(model.device)
        found = ask_statements(model, processor, pixels, [[statements[at] for at in by_image[n]] for n in batch], layers)
        for number, by_layer in zip(batch, found, strict=True):
            for layer, row in by_layer.items():
                values.setdefault(layer, np.empty(len(statements)))[by_image[number]] = row
    return summarise(values, statements, seed)


# ---------------------------------------------------------------------------------------------------------- statistics


def check_statements(statements: Sequence[Statement], rows: int) -> None:
    """Raise a ValueError for statements that no test could tell from chance, before anything is asked.

    Args:
        rows: how many layers, and combinations of them, each group is tested at.
    """
    if not statements:
        raise ValueError("there are no statements: name phrases, and images that they are true and false of")
    groups = _groups(statements)
    level = ERROR_RATE / (rows * len(groups))
    for group, positions in groups.items():
        own = [statements[at] for at in positions]
        truth = {one.true for one in own}
        if len(truth) < 2:
            kind = "true" if truth.pop() else "false"
            raise ValueError(f"all {len(own)} statements of {group!r} are {kind}: nothing can be told apart; give other images")
        true, false = ({one.image for one in own if one.true is kind} for kind in (True, False))
        within = _is_within(own)
        smallest = _smallest(group, own) if within else 1 / math.comb(len(true) + len(false), len(true))
        if smallest > level:
            images = (
                f"{len(true & false)} images of which not all the same is true"
                if within
                else f"{len(true)} images that it is true of, {len(false)} that not"
            )
            raise ValueError(
                f"{group!r}: {images} cannot tell anything from chance at an error of {ERROR_RATE:.0%} over {len(groups)} groups "
                f"and {rows} layers (the smallest possible p-value is {smallest:.1g}, {level:.1g} is needed): give more images, "
                "or ask less"
            )


def summarise(values: Mapping[str, np.ndarray], statements: Sequence[Statement], seed: int = 0) -> Emergence:
    """What evidence by layer (and "all"), each of S statements (S,), adds up to.

    Raises:
        MissingExtraError: without scipy and scikit-learn.
    """
    groups = _groups(statements)
    numbers = {number: at for at, number in enumerate(dict.fromkeys(one.image for one in statements))}
    draws = bootstrap_draws(len(numbers), seed=seed)
    tables, within, compared = {}, {}, {}
    for group, positions in groups.items():
        own = [statements[at] for at in positions]
        within[group], compared[group] = _is_within(own), _compared(own)
        order = _order(group, own) if within[group] else None
        image, truth = np.array([numbers[one.image] for one in own]), np.array([one.true for one in own])
        for layer, every in values.items():
            rounded = np.round(np.asarray(every, dtype=float)[positions], DECIMALS)
            tables[group, layer] = _Table.of(rounded, truth, image, len(numbers), within[group], order)
    family = len(tables)
    p_values = holm([table.p_value(family, seed) for table in tables.values()])
    depths: dict[str, dict[str, Depth]] = {}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for ((group, layer), table), p_value in zip(tables.items(), p_values, strict=True):
        area, areas = table.areas(draws)
        drawn.setdefault(group, {})[layer] = areas
        true, false = (Ratio.mean(column) for column in (table.true, table.false))
        depths.setdefault(group, {})[layer] = Depth(
            *(true.value, true.interval(draws), false.value, false.interval(draws)),
            *(area, interval(areas), table.control(), float(p_value)),
        )
    return Emergence(
        layers=[layer for layer in values if layer != ALL_LAYERS],
        depths=depths,
        within=within,
        statements={group: (sum(one.true for one in own), sum(not one.true for one in own)) for group, own in compared.items()},
        images={group: len({one.image for one in own}) for group, own in compared.items()},
        draws=drawn,
    )


@dataclass
class _Table:
    """What N images say of a group at a layer.

    Args:
        true, false: mean evidence of true and of false statements (N,), NaN without any.
        own: each image's own AUROC (N,), where statements are compared within images; NaN where only one kind is there.
        ranks, truth: (M, K) of the M images of these that have both kinds, where all are asked the same K phrases: the rank of
            each phrase, its mean over all images aside, and what is true.
    """

    true: np.ndarray
    false: np.ndarray
    own: np.ndarray | None
    ranks: np.ndarray | None = None
    truth: np.ndarray | None = None

    @classmethod
    def of(
        cls, values: np.ndarray, truth: np.ndarray, image: np.ndarray, images: int, within: bool, order: np.ndarray | None
    ) -> "_Table":
        own = np.full(images, np.nan)
        means = np.full((2, images), np.nan)
        compared = values.copy()
        if order is not None:
            compared[order] = np.round(values[order] - values[order].mean(axis=0), DECIMALS)
        for number in np.unique(image):
            chosen, is_true = image == number, truth[image == number]
            if within and (is_true.all() or not is_true.any()):
                continue
            means[:, number] = [
                part.mean() if len(part) else np.nan for part in (values[chosen][kind] for kind in (is_true, ~is_true))
            ]
            if within:
                true, false = compared[chosen][is_true], compared[chosen][~is_true]
                own[number] = np.mean((true[:, None] > false) + 0.5 * (true[:, None] == false))
        if order is None:
            return cls(means[0], means[1], own if within else None)
        order = order[~np.isnan(own[image[order[:, 0]]])]
        return cls(means[0], means[1], own, _ranks(compared[order]), truth[order])

    def control(self) -> float | None:
        """The mean AUROC of each image's evidence with what is true of every other one."""
        if self.ranks is None or self.truth is None or self.own is None or len(self.ranks) < 2:
            return None
        pairs = self.truth.sum(axis=1) * (~self.truth).sum(axis=1)
        weights, least = self.truth / pairs[:, None], (self.truth.sum(axis=1) * (self.truth.sum(axis=1) + 1) / 2 / pairs).sum()
        every = float(self.ranks.sum(axis=0) @ weights.sum(axis=0)) - len(self.ranks) * least
        return (every - float(np.nansum(self.own))) / (len(self.ranks) * (len(self.ranks) - 1))

    def _between(self) -> tuple[np.ndarray, np.ndarray]:
        """Values and truth: those of the images that it is true of, then those of the others; NaN where they do not belong."""
        return np.concatenate([self.true, self.false]), np.repeat([True, False], len(self.true))

    def areas(self, draws: np.ndarray) -> tuple[float, np.ndarray]:
        """The AUROC, and that of each of D draws (D, N)."""
        if self.own is not None:
            mean = Ratio.mean(self.own)
            return mean.value, mean.over(draws)
        values, truth = self._between()
        known = ~np.isnan(values)
        times = np.concatenate([draws, draws], axis=1)[:, known]
        return roc_area(values[known], truth[known]), roc_areas(values[known], truth[known], times)

    def p_value(self, family: int, seed: int) -> float:
        """Of being above chance, fine enough to be judged among a family of tests."""
        draws = max(9_999, round(4 * family / ERROR_RATE))
        if self.ranks is not None and self.truth is not None:
            pairs = self.truth.sum(axis=1, keepdims=True) * (~self.truth).sum(axis=1, keepdims=True)
            return exchanged_rows(self.ranks, self.truth / pairs, draws, seed)
        if self.own is not None:
            return sign_flip(self.own[~np.isnan(self.own)] - 0.5, draws, seed)
        return two_samples(self.true[~np.isnan(self.true)], self.false[~np.isnan(self.false)])


def _groups(statements: Sequence[Statement]) -> dict[str, list[int]]:
    """Positions of the statements of each group."""
    groups: dict[str, list[int]] = {}
    for at, one in enumerate(statements):
        groups.setdefault(one.group, []).append(at)
    return groups


def _is_within(own: Sequence[Statement]) -> bool:
    return len({one.phrase for one in own}) > 1


def _order(group: str, own: Sequence[Statement]) -> np.ndarray | None:
    """Positions (images, phrases) of what is asked of every image, phrases in the same order; None for choices that are drawn.

    Raises:
        ValueError: where images are asked different phrases that are no such choices.
    """
    rows: dict[int, list[tuple[tuple[str, str], int]]] = {}
    for at, one in enumerate(own):
        rows.setdefault(one.image, []).append(((one.carrier or "", one.phrase), at))
    ordered = [sorted(row) for row in rows.values()]
    if len({tuple(phrase for phrase, _ in row) for row in ordered}) == 1:
        return np.array([[at for _, at in row] for row in ordered])
    if all(one.drawn for one in own):
        return None
    raise ValueError(
        f"{group!r}: images are asked different phrases, so that a liking for some of them could not be told from "
        "what the image shows: ask all of each image, or mark choices whose true phrase was drawn at random with drawn=True"
    )


def _smallest(group: str, own: Sequence[Statement]) -> float:
    """The smallest p-value that a group within images can have."""
    order, truth = _order(group, own), np.array([one.true for one in own])
    if order is None:
        return 0.5 ** len({one.image for one in _compared(own)})
    kinds = Counter(tuple(row) for row in truth[order] if row.any() and not row.all())
    return math.exp(sum(math.lgamma(times + 1) for times in kinds.values()) - math.lgamma(kinds.total() + 1))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (N, K) of each row from 1 on, those of equal values their mean."""
    below = (values[:, None, :] < values[:, :, None]).sum(axis=2)
    equal = (values[:, None, :] == values[:, :, None]).sum(axis=2)
    return below + (equal + 1) / 2


def _compared(own: Sequence[Statement]) -> list[Statement]:
    """Without those of images that say only one thing, where statements are compared within images."""
    if not _is_within(own):
        return list(own)
    both = {one.image for one in own if one.true} & {one.image for one in own if not one.true}
    return [one for one in own if one.image in both]


__all__ = [
    "Depth",
    "Emergence",
    "Statement",
    "ask_statements",
    "check_statements",
    "emergence",
    "evidence_by_layer",
    "summarise",
]
