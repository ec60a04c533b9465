"""Where each word of a sentence comes from: how much of it the features carry, which layers, and which places.

Every figure is a difference of log-probabilities of the word in its own context, after the same words before it:

    evidence    log p(word | all that is asked) - log p(word | null prefix)
    alone       log p(word | one layer)         - log p(word | null prefix)
    lost        log p(word | all that is asked) - log p(word | all but one layer)
    shown       log p(word | one place of a layer) - log p(word | null prefix)
    hidden      log p(word | all that is asked) - log p(word | all but one tile of the image)

X
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from devil_hf.model.explaining_devil import COMBINATIONS
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.outputs_devil import AttributionOutput, word_evidence
from devil_hf.model.pooling_devil import Layers, pool_every_location, resolve_layers
from devil_hf.model.processing_devil import DevilProcessor

MOST_TILES = 16  # to a side of the image, where nothing else is said
SHOWN, HIDDEN = "shown", "hidden"


@dataclass(frozen=True)
class WordEvidence:
    """What one word owes to the features, in nats.

    Args:
        text: the word.
        evidence: over the null prefix, all asked layers visible.
        alone: layer -> over the null prefix, with this layer alone.
        lost: layer -> of the evidence, what is gone when this layer is hidden.
    """

    text: str
    evidence: float
    alone: dict[str, float]
    lost: dict[str, float]


@dataclass(frozen=True)
class SentenceEvidence:
    """A sentence about an image, word by word.

    Args:
        text: the sentence.
        words: in order.
        maps: "shown" (1, words, H, W), each place of each layer asked alone, one map of all layers; "hidden" (1, words, rows,
            columns), what hiding a tile from all layers takes away; in nats per word.
            `processor.post_process_attribution` lays them over the image.
        by_layer: layer -> (words, H_l, W_l), what "shown" was made of.
        log_prob: of all words, given the image, in nats.
        p_value: how often the features of another image carry the sentence as well, (1 + those) / (1 + images); None without
            other images.
        permutations: how many other images that were.
        elsewhere: evidence of the sentence with the features of another image, the mean over them; None without them.
    """

    text: str
    words: tuple[WordEvidence, ...]
    maps: AttributionOutput
    by_layer: dict[str, Tensor]
    log_prob: float
    p_value: float | None
    permutations: int
    elsewhere: float | None

    @property
    def evidence(self) -> float:
        """Of the whole sentence over the null prefix, in nats."""
        return sum(word.evidence for word in self.words)

    def as_record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        record = dataclasses.asdict(self) | {"evidence": self.evidence}
        record["maps"] = {name: values[0].tolist() for name, values in self.maps.maps.items()}
        return record | {"by_layer": {layer: values.tolist() for layer, values in self.by_layer.items()}}


@torch.no_grad()
def explain_words(
    model: DevilModel,
    processor: DevilProcessor,
    pixel_values: Tensor | None = None,
    sentences: Sequence[str] | None = None,
    layers: Layers = None,
    combine: str = "informed",
    mapped: Layers = None,
    tiles: tuple[int, int] | None = None,
    others: Tensor | None = None,
    feature_maps: Sequence[Tensor | None] | None = None,
    **generation_kwargs: Any,
) -> list[SentenceEvidence]:
    """Explain each word of a sentence about each image.

    Args:
        pixel_values: (B, 3, H, W).
        sentences: one per image; None describes each image first.
        layers: those that are asked together; None for all.
        combine: how the layers' maps become one, of `COMBINATIONS` but "joint".
        mapped: of those layers, the ones whose places are asked, too; None for all.
        tiles: rows and columns of tiles, of which each is hidden in turn; None for the finest grid of the layers that has at
            most 16 to a side.
        others: (M, k, D_lm) prefixes of other images, as `model.ask(layers=...)` gives them, for the p-value.
        feature_maps: what `extract_features` returned, to ask again without running the backbone.
        generation_kwargs: as in `model.generate`, where the images are to be described.

    Returns:
        One `SentenceEvidence` per image.

    Raises:
        ValueError: for a number of sentences other than that of images, an empty sentence, an unknown rule, mapped layers that
            are not asked, and fewer than two tiles, of which hiding one would leave nothing.
    """
    rule = COMBINATIONS.get(combine)
    if rule is None:
        known = [name for name, one in COMBINATIONS.items() if one is not None]
        raise ValueError(f"combine={combine!r} is not one of {known}: each layer is asked alone here.")
    if sentences is not None and generation_kwargs:
        raise ValueError(f"{sorted(generation_kwargs)} shape a description, but the sentences are given: leave them out.")
    visible = resolve_layers(layers, model.layer_names)
    chosen = visible if mapped is None else resolve_layers(mapped, model.layer_names)
    if unasked := [model.layer_names[index] for index in chosen if index not in visible]:
        raise ValueError(f"mapped={unasked}: these layers are not asked; name some of {[model.layer_names[i] for i in visible]}.")
    features = model.read_features(pixel_values, feature_maps, visible)
    images = len(features[visible[0]])
    tiles = _check_tiles(tiles, [tuple(features[index].shape[-2:]) for index in visible])
    if sentences is None:
        sequences = model.generate(layers=visible, feature_maps=features, **generation_kwargs)
        sentences = [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]
    if isinstance(sentences, str) or not isinstance(sentences, Sequence) or len(sentences) != images:
        raise ValueError(f"sentences={sentences!r:.200} for {images} images: give a list with one each.")
    found = []
    for image, sentence in enumerate(sentences):
        own = [None if maps is None else maps[image : image + 1] for maps in features]
        found.append(_explain(model, processor, own, sentence, visible, chosen, rule, tiles, others))
    return found


def _check_tiles(tiles: tuple[int, int] | None, grids: list[tuple[int, int]]) -> tuple[int, int]:
    if tiles is None:
        fitting = [grid for grid in grids if max(grid) <= MOST_TILES and max(grid) > 1]
        return max(fitting, default=(MOST_TILES, MOST_TILES))
    if len(tiles) != 2 or min(tiles) < 1 or max(tiles) < 2:
        raise ValueError(f"tiles={tiles}: give rows and columns, at least two tiles in all.")
    return tiles[0], tiles[1]


def tile_shares(tiles: int, cells: int) -> Tensor:
    """(tiles, cells): how much of each cell of an axis lies in each tile of it, from 0 to 1."""
    starts, edges = torch.arange(tiles)[:, None] * cells, torch.arange(cells) * tiles  # of an axis of tiles * cells units
    overlap = torch.minimum(starts + cells, edges + tiles) - torch.maximum(starts, edges)
    return overlap.clamp_min(0) / tiles


def hiding_weights(tiles: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(tiles, H, W) uniform weights over what each tile leaves of a grid, by row of tiles, then by column."""
    rows, columns = (tile_shares(*each) for each in zip(tiles, grid, strict=True))
    left = 1 - torch.einsum("rh,cw->rchw", rows, columns).flatten(0, 1)
    return left / left.sum(dim=(1, 2), keepdim=True)


def _explain(model, processor, features, sentence: str, visible, mapped, rule, tiles, others) -> SentenceEvidence:
    tokens = model.check_phrases(processor(text=[sentence], return_tensors="pt"))
    ids = tokens["input_ids"][0].tolist()
    pairs = word_evidence(processor.tokenizer, list(zip(ids, torch.eye(len(ids)), strict=True)))
    words = [word for word, _ in pairs]
    of_word = torch.stack([torch.as_tensor(shares).expand(len(ids)) for _, shares in pairs])  # (words, tokens)
    names = model.layer_names

    def score(prefix: Tensor) -> Tensor:
        """(N, words) in nats."""
        return model.score_prefix(prefix, tokens)[:, 0].cpu() @ of_word.T

    hidden = [[other for other in visible if other != index] for index in visible]
    weights = [None if maps is None else hiding_weights(tiles, tuple(maps.shape[-2:])) for maps in features]
    prefixes = [
        model.ask(layers=visible, feature_maps=features),
        model.null_prefix(),
        *(model.ask(layers=index, feature_maps=features) for index in visible),
        *(model.ask(layers=rest, feature_maps=features) if rest else model.null_prefix() for rest in hidden),
        model.ask(layers=visible, feature_maps=features, location_weights=weights),
        *([] if others is None else [others.to(model.device)]),
    ]
    sizes = [1, 1, len(visible), len(visible), tiles[0] * tiles[1], 0 if others is None else len(others)]
    whole, null, alone, without, tiled, elsewhere = score(torch.cat([one.float() for one in prefixes])).split(sizes)
    alone, lost = alone - null, whole - without  # (L, words)
    by_layer = {names[index]: (score(_every_place(model, features, index)) - null) for index in mapped}
    by_layer = {names[i]: by_layer[names[i]].T.unflatten(1, tuple(features[i].shape[-2:])) for i in mapped}
    of_mapped = [visible.index(index) for index in mapped]
    shown = rule({name: one[None] for name, one in by_layer.items()}, lambda: alone[of_mapped, None])
    maps = {SHOWN: shown, HIDDEN: (whole - tiled).T.reshape(1, len(words), *tiles)}
    own = whole.sum()
    at_least = int((elsewhere.sum(dim=1) >= own).sum())
    return SentenceEvidence(
        text=sentence,
        words=tuple(
            WordEvidence(
                word,
                float(whole[0, at] - null[0, at]),
                {names[index]: float(alone[row, at]) for row, index in enumerate(visible)},
                {names[index]: float(lost[row, at]) for row, index in enumerate(visible)},
            )
            for at, word in enumerate(words)
        ),
        maps=AttributionOutput(maps=maps, measure="evidence"),
        by_layer=by_layer,
        log_prob=float(own),
        p_value=None if others is None else (1 + at_least) / (1 + len(others)),
        permutations=0 if others is None else len(others),
        elsewhere=None if others is None else float((elsewhere - null).sum(dim=1).mean()),
    )


def _every_place(model: DevilModel, features: Sequence[Any], index: int) -> Tensor:
    """Prefixes (H_l * W_l, k, D_lm) of each place of one layer alone."""
    pooled: list[Tensor | None] = [None] * len(model.layer_names)
    pooled[index] = pool_every_location(features[index])
    return model.translate(pooled)


__all__ = ["SentenceEvidence", "WordEvidence", "explain_words"]
