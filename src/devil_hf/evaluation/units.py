"""Labels of units: exemplars pooled where the unit is active, translated, decoded (DeViL, section 4.5).

Two modes say which features stand for a unit. `"pixels"` gives its exemplars to the translator's own backbone and pools every
layer with the mask, resized to the layer's grid: the paper's way, for units of any network. `"features"` is for units of the
very network, and of a layer, that the translator reads: the features that were pooled in the exemplar pass, on the unit's own
grid, enter directly, that layer alone visible.

Labels are chosen greedily, by beam search, or ("rerank") among the beams by log p(label | unit) - weight log p(label | null
prefix): MILAN's pointwise mutual information, with the prior that this language model has under the null prefix; or among
given words ("words"), by evidence.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from tqdm.auto import tqdm

from devil_hf.backbone_devil import weights_hash
from devil_hf.data.exemplars import ExemplarSet
from devil_hf.data.exemplars import Unit
from devil_hf.modeling_devil import DevilModel
from devil_hf.pooling_devil import pool
from devil_hf.pooling_devil import region_weights
from devil_hf.processing_devil import DevilProcessor

MODES = ("pixels", "features")
STRATEGIES = ("greedy", "beam", "rerank", "words")
ROWS = 256  # units decoded at once
MASKS = 256  # masks resized at once


@dataclass
class PooledUnits:
    """Features that stand for units.

    Args:
        units: (layer, unit) of each of N units.
        features: per layer of the translator (N, C_l), None where no unit shows that layer.
        hidden: (N, L) bool, layers where every mask vanished, or that the mode does not show.
    """

    units: list[tuple[str, int]]
    features: list[Tensor | None]
    hidden: Tensor

    @property
    def silent(self) -> Tensor:
        """(N,) bool: units that never exceed their threshold, of which nothing can be said."""
        return self.hidden.all(dim=1)


@torch.no_grad()
def own_features(model: DevilModel, exemplars: ExemplarSet) -> PooledUnits:
    """Mode "features": what `exemplars` pooled of the units' own layers, which must be layers of the translator.

    Raises:
        ValueError: if the units belong to another network, or to layers that the translator does not read.
    """
    ours = str(model.backbone.config["sha256"] or weights_hash(model.backbone.module))
    theirs = exemplars.summary["weights_sha256"].partition("+")[0]
    if ours != theirs:
        raise ValueError(
            'mode "features" is for units of the backbone that the translator reads, but the exemplars were found in weights '
            f'with SHA-256 {theirs}, and the translator reads {ours}: use the mode "pixels".'
        )
    unknown = [name for name in exemplars.layers if name not in model.layer_names]
    if unknown:
        raise ValueError(
            f'mode "features" needs layers among {model.layer_names}, not {unknown}: use the mode "pixels".'
        )
    total, start = len(exemplars), 0
    features: list[Tensor | None] = [None] * len(model.layer_names)
    hidden = torch.ones(total, len(model.layer_names), dtype=torch.bool)
    for name in exemplars.layers:
        own, index = exemplars.tensors[name], model.layer_names.index(name)
        stop = start + len(own["features"])
        features[index] = torch.zeros(total, own["features"].shape[1])
        features[index][start:stop] = own["features"]  # type: ignore[index]
        hidden[start:stop, index] = own["counted"] == 0
        start = stop
    return PooledUnits(exemplars.units, features, hidden)


@torch.no_grad()
def encoded_features(
    model: DevilModel, processor: DevilProcessor, units: ExemplarSet | Iterable[Unit], batch_size: int = 32
) -> PooledUnits:
    """Mode "pixels": the exemplars' pictures through the translator's backbone, every layer pooled with the masks.

    Args:
        units: an `ExemplarSet`, whose pictures are encoded once each; or any sequence of units, such as MILANNOTATIONS.
    """
    if isinstance(units, ExemplarSet):
        return _encode_exemplars(model, processor, units, batch_size)
    names, rows, hidden = [], [], []
    for unit in tqdm(units, desc="exemplars: features", unit="unit"):
        sums = _Sums(1, model)
        pictures = list(unit.images.permute(0, 2, 3, 1).numpy())
        maps = model.extract_features(processor(images=pictures, return_tensors="pt")["pixel_values"])
        masks = _mask_in_crop(unit.masks, processor)
        sums.add(torch.zeros(len(masks), dtype=torch.long), [pool_masked(one, masks) for one in maps])
        features, gone = sums.means()
        names.append((unit.layer, unit.unit))
        rows.append(features)
        hidden.append(gone)
    if not names:
        raise ValueError("there is no unit to describe")
    return PooledUnits(names, [torch.cat(layer) for layer in zip(*rows, strict=True)], torch.cat(hidden))


class _Sums:
    """Means of pooled features over a unit's exemplars, of those alone whose mask does not vanish on the layer's grid."""

    def __init__(self, units: int, model: DevilModel):
        self.sums = [torch.zeros(units, channels) for channels in model.backbone.channels]
        self.counts = torch.zeros(units, len(self.sums))

    def add(self, unit: Tensor, pooled: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take in, per layer, features (n, C_l) and whether they are empty (n,), of the units with positions `unit` (n,)."""
        for layer, (features, empty) in enumerate(pooled):
            full = ~empty
            self.sums[layer].index_add_(0, unit[full], features[full])
            self.counts[:, layer].index_add_(0, unit[full], torch.ones(int(full.sum())))

    def means(self) -> tuple[list[Tensor], Tensor]:
        counts = self.counts.clamp(min=1)
        return [one / counts[:, layer, None] for layer, one in enumerate(self.sums)], self.counts == 0


def pool_masked(feature_map: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Pool map n of `feature_map` (n, C, H, W) with mask n of `masks` (n, h, w): features (n, C), and vanished (n,)."""
    weights, empty = region_weights(
        masks[:, None].to(feature_map.device), (feature_map.shape[-2], feature_map.shape[-1])
    )
    return pool(feature_map.float(), weights).cpu(), empty[:, 0].cpu()


def _mask_in_crop(masks: Tensor, processor: DevilProcessor) -> Tensor:
    """Masks (k, H, W) over pictures as masks over the translator's crop of them."""
    geometry = processor.image_processor.geometry(masks.shape[-2:])
    resized = torch.nn.functional.interpolate(
        masks[:, None].float(), geometry.resized_size, mode="bilinear", antialias=True, align_corners=False
    )[:, 0]
    (top, left), (height, width) = geometry.offset, geometry.crop_size
    padding = (
        max(-left, 0),
        max(width + left - resized.shape[2], 0),
        max(-top, 0),
        max(height + top - resized.shape[1], 0),
    )
    padded = torch.nn.functional.pad(resized, padding)
    top, left = max(top, 0), max(left, 0)
    return padded[:, top : top + height, left : left + width]


def _encode_exemplars(
    model: DevilModel, processor: DevilProcessor, exemplars: ExemplarSet, batch_size: int
) -> PooledUnits:
    sums = _Sums(len(exemplars), model)
    starts, start = {}, 0
    for name in exemplars.layers:
        starts[name] = start
        start += len(exemplars.tensors[name]["peaks"])
    numbers = sorted(exemplars.keys)
    bar = tqdm(total=len(numbers), desc="exemplars: features", unit="image")
    with bar:
        for begin in range(0, len(numbers), batch_size):
            batch = numbers[begin : begin + batch_size]
            images = [exemplars.image(number) for number in batch]
            maps = model.extract_features(processor(images=images, return_tensors="pt")["pixel_values"])
            for position, number in enumerate(batch):
                for name, rows, masks in _masks_of_image(exemplars, number):
                    masks = _mask_in_crop(masks, processor)
                    expanded = [one[position : position + 1].expand(len(masks), -1, -1, -1) for one in maps]
                    sums.add(starts[name] + rows, [pool_masked(one, masks) for one in expanded])
            bar.update(len(batch))
    features, hidden = sums.means()
    return PooledUnits(exemplars.units, list(features), hidden)


def _masks_of_image(exemplars: ExemplarSet, number: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, units, masks) of the units that an image is an exemplar of, a few at a time."""
    for name in exemplars.layers:
        own = exemplars.tensors[name]
        unit, slot = torch.nonzero(own["images"] == number, as_tuple=True)
        for rows, slots in zip(unit.split(MASKS), slot.split(MASKS), strict=True):
            resized = torch.nn.functional.interpolate(
                own["activations"][rows, slots][:, None],
                tuple(exemplars.summary["crop"]),
                mode="bilinear",
                align_corners=False,
            )[:, 0]
            yield name, rows, resized > own["threshold"][rows, None, None]


def pool_units(model: DevilModel, processor: DevilProcessor, units: ExemplarSet | Iterable[Unit], mode: str = "pixels"):
    """Features of units in one of the two modes, `PooledUnits`."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {MODES}")
    if mode == "pixels":
        return encoded_features(model, processor, units)
    if not isinstance(units, ExemplarSet):
        raise ValueError('mode "features" needs exemplars of a network of your own; of foreign files use "pixels"')
    return own_features(model, units)


@torch.no_grad()
def label_units(
    model: DevilModel,
    processor: DevilProcessor,
    pooled: PooledUnits,
    strategy: str = "rerank",
    candidates: int = 5,
    prior_weight: float = 0.2,
    words: Sequence[str] | None = None,
    carrier: str | None = None,
    max_new_tokens: int = 20,
) -> list[dict]:
    """Label every unit.

    Args:
        strategy: "greedy", "beam" (the most probable of `candidates` beams), "rerank" (by mutual information) or "words".
        candidates: beams, among which the runner-up is found, too.
        prior_weight: of log p(label | null prefix) in "rerank" (MILAN: 0.2).
        words: what "words" chooses from.
        carrier: neutral word that "words" reads before each of them.

    Returns:
        Per unit `layer`, `unit`, `label`, `evidence` (nats per token over the null prefix), `runner_up` and
        `runner_up_evidence` (the best candidate that says something else), `words` (each token of the label and what it owes
        to the features, in nats). Labels of silent units are empty, their evidence None.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not one of {STRATEGIES}")
    if (strategy == "words") != bool(words):
        raise ValueError(f'strategy={strategy!r} with words={words}: "words", and it alone, needs words to choose from')
    if candidates < 2:
        raise ValueError(f"candidates={candidates} must be at least 2: one is the label, one the runner-up")
    rows: list[dict] = []
    bar = tqdm(total=len(pooled.units), desc="labels", unit="unit")
    for begin in range(0, len(pooled.units), ROWS):
        part = slice(begin, begin + ROWS)
        features = [None if one is None else one[part] for one in pooled.features]
        prefix = model.translate(features, pooled.hidden[part])
        if strategy == "words":
            labelled = _choose_words(model, processor, prefix, list(words or ()), carrier)
        else:
            labelled = _choose_texts(model, processor, prefix, strategy, candidates, prior_weight, max_new_tokens)
        for (layer, unit), row, silent in zip(pooled.units[part], labelled, pooled.silent[part].tolist(), strict=True):
            nothing = {"label": "", "evidence": None, "runner_up": "", "runner_up_evidence": None, "words": []}
            rows.append({"layer": layer, "unit": unit} | (nothing if silent else row))
        bar.update(len(labelled))
    bar.close()
    return rows


def _choose_words(model, processor, prefix: Tensor, words: list[str], carrier: str | None) -> list[dict]:
    phrases = model._phrases(processor(text=words, carrier=carrier, return_tensors="pt"))
    counts = phrases["scored_mask"].sum(dim=1)
    given = model._score_rows(prefix, phrases).sum(dim=-1)
    null = model._score_rows(model.null_prefix(), phrases).sum(dim=-1)
    evidence = (given - null) / counts
    best = evidence.topk(min(2, len(words)), dim=1)
    rows = []
    for values, order in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        second = (words[order[1]], values[1]) if len(order) > 1 else ("", None)
        row = {"label": words[order[0]], "evidence": values[0], "runner_up": second[0], "runner_up_evidence": second[1]}
        rows.append(row | {"words": [[words[order[0]], values[0]]]})
    return rows


def _choose_texts(model, processor, prefix, strategy, candidates, prior_weight, max_new_tokens) -> list[dict]:
    beams = model._decode(prefix, num_beams=candidates, num_return_sequences=candidates, max_new_tokens=max_new_tokens)
    sequences = beams.unflatten(0, (-1, candidates))  # (N, candidates, T)
    if strategy == "greedy":
        greedy = model._decode(prefix, max_new_tokens=max_new_tokens)
        length = max(greedy.shape[1], sequences.shape[2])
        pad = model.padding_token_id
        greedy, sequences = (
            torch.nn.functional.pad(one, (0, length - one.shape[-1]), value=pad) for one in (greedy[:, None], sequences)
        )
        sequences = torch.cat([greedy, sequences], dim=1)
    each = sequences.shape[1]
    flat = sequences.flatten(0, 1)
    given, null = model.sequence_log_probs(prefix.repeat_interleave(each, dim=0), flat)
    tokens = model._word_mask(flat).sum(dim=1).to(given.device)
    per_token = ((given - null).sum(dim=1) / tokens).view(-1, each)
    score = given.sum(dim=1)
    if strategy == "rerank":
        score = score - prior_weight * null.sum(dim=1)
    score = score.view(-1, each)
    if strategy == "greedy":
        score[:, 0] = torch.inf
    texts = [text.strip() for text in processor.batch_decode(flat, skip_special_tokens=True)]
    special = set(processor.tokenizer.all_special_ids)
    rows = []
    for n, order in enumerate(score.argsort(dim=1, descending=True, stable=True).tolist()):
        names = texts[n * each : (n + 1) * each]
        first = order[0]
        second = next((at for at in order if names[at] != names[first]), None)
        at = n * each + first
        contributions = (given[at] - null[at]).tolist()
        rows.append(
            {
                "label": names[first],
                "evidence": float(per_token[n, first]),
                "runner_up": "" if second is None else names[second],
                "runner_up_evidence": None if second is None else float(per_token[n, second]),
                "words": [
                    [processor.tokenizer.decode([token]), value]
                    for token, value in zip(flat[at].tolist(), contributions, strict=True)
                    if token not in special
                ],
            }
        )
    return rows


def most_frequent(labels: Iterable[str]) -> str:
    """The label that is given most often; of equally frequent ones the first by alphabet."""
    counted = [(-len(list(group)), label) for label, group in groupby(sorted(label for label in labels if label))]
    if not counted:
        raise ValueError("no unit has a label")
    return min(counted)[1]
