"""Questions about many layers and places at once: attribution maps, dense descriptions, directions.

They are `score` and `generate` of the model, asked for every place of a layer in chunks whose size follows from the shapes.
Places are pooled without building one-hot location weights; layers that are not asked for are never computed.

Maps of several layers become one by a rule of `COMBINATIONS` (beyond the paper, but for "joint"): see `register_combination`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .outputs_devil import AttributionOutput, DescribeOutput
from .pooling_devil import Layers, check_window, pool_every_location, read_locations, read_tensor, resolve_layer, resolve_layers
from .scoring_devil import rows_per_chunk

ALL_LAYERS = "all"
MEASURES = ("sum", "per_token", "evidence")
# Of "informed": of the layers' weights, in nats per token; the deviation of its Gaussian, in sides of the grid. For records.
TEMPERATURE, SMOOTHING = INFORMED = 2, 1 / 32


# One map from several: (layer -> map (B, K, H_l, W_l), evidence) -> (B, K, H, W), where `evidence()` is that of
# each phrase for each whole layer alone, (L, B, K) in nats per token. None asks the layers together instead.
Combination = Callable[[Mapping[str, Tensor], Callable[[], Tensor]], Tensor]
COMBINATIONS: dict[str, Combination | None] = {}


def register_combination(name: str) -> Callable[[Combination], Combination]:
    """Decorator of a rule that makes one map of those of several layers, for `attribute(combine=name)` and every evaluation."""

    def register(combine: Combination) -> Combination:
        COMBINATIONS[name] = combine
        return combine

    return register


@register_combination("informed")
def combine_informed(maps: Mapping[str, Tensor], evidence: Callable[[], Tensor]) -> Tensor:
    """Average on the finest grid, weighted by what each layer knows of the phrase.

    For each phrase of each image layer l has the weight w_l = exp(e_l / T) s_l / sum_m exp(e_m / T) s_m, T = 2, where e_l is
    the evidence of the whole layer for the phrase (nats per token) and s_l the standard deviation of its map over the
    locations: how much it depends on the place. The average is smoothed by a Gaussian whose deviation is a 32nd of the grid's
    side: features of a fine layer speak for the edges of an object as much as for its middle. The rule was chosen among some
    eighty of its kind in the shapes world, and T on photographs, too: with 2 it is not told apart from "mean" there.
    """
    whole = evidence()
    spread = torch.stack([one.std(dim=(2, 3), correction=0) for one in maps.values()])  # (L, B, K)
    weights = ((whole - whole.amax(dim=0)) / TEMPERATURE).exp() * spread + 1e-12  # maps that are flat everywhere count alike
    weights = weights / weights.sum(dim=0)
    average = (weights[..., None, None] * torch.stack(resize_to_finest(maps))).sum(dim=0)
    rows, columns = (_gaussian(edge, average) for edge in average.shape[-2:])
    return rows @ average @ columns.T


@register_combination("mean")
def combine_mean(maps: Mapping[str, Tensor], evidence: Callable[[], Tensor]) -> Tensor:
    """Average on the finest grid, every layer alike."""
    return torch.stack(resize_to_finest(maps)).mean(dim=0)


COMBINATIONS["joint"] = None  # paper


def resize_to_finest(maps: Mapping[Any, Tensor]) -> list[Tensor]:
    """The maps (B, C, H_l, W_l) of layers, interpolated bilinearly to the grid of the one with the most locations."""
    each = list(maps.values())
    finest = max((one.shape[-2:] for one in each), key=lambda grid: grid[0] * grid[1])
    return [F.interpolate(one.float(), finest, mode="bilinear", align_corners=False) for one in each]


def _gaussian(edge: int, like: Tensor) -> Tensor:
    """(edge, edge) rows of weights that sum to one."""
    place = torch.arange(edge, device=like.device, dtype=like.dtype)
    weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * (edge * SMOOTHING) ** 2))
    return weights / weights.sum(dim=1, keepdim=True)


@dataclass
class PhraseScorer:
    """Scores of K phrases for many places or whole layers; the null prefix is scored once."""

    model: Any
    phrases: Mapping[str, Any]
    measure: str = "evidence"
    chunk_size: int | None = None

    @cached_property
    def null(self) -> Tensor:
        """(1, K) log-probabilities under the null prefix."""
        return self.model.score_checked(self.model.null_prefix(), self.phrases).sum(dim=-1)

    def measured(self, scores: Tensor, measure: str) -> Tensor:
        """Log-probabilities (..., K), as the measure has them."""
        if measure == "evidence":
            scores = scores - self.null
        return scores if measure == "sum" else scores / self.phrases["scored_mask"].sum(dim=-1).to(scores.device)

    def map(self, feature_maps: Mapping[int, Any], windows: Mapping[int, int]) -> Tensor:
        """One map per image and phrase, (B, K, H, W), with these layers (on one grid) asked together, in chunks."""
        model, (B, _, H, W) = self.model, next(iter(feature_maps.values())).shape
        pooled = {index: pool_every_location(maps, windows[index]) for index, maps in feature_maps.items()}
        # Places of equal features, such as those of an even background, have equal answers.
        same = torch.cat(list(pooled.values()), dim=1).unique(dim=0, return_inverse=True)[1]
        places = same.new_empty(int(same.max()) + 1).scatter_(0, same, torch.arange(len(same), device=same.device))
        start, answers = model.config.prefix_length + 1, self.phrases["input_ids"].numel()
        # Two passes, of which the translator's comes before the language model's and holds about as much.
        chunk, scores = rows_per_chunk(model.language_model, start, 2, 1, answers=answers, given=self.chunk_size), []
        for part in places.tensor_split(-(-len(places) // chunk)):
            prefix = model.translate([pooled[i][part] if i in pooled else None for i in range(len(model.layer_names))])
            scores.append(model.score_checked(prefix, self.phrases, self.chunk_size).sum(dim=-1))
        return self.measured(torch.cat(scores)[same], self.measure).view(B, H, W, -1).permute(0, 3, 1, 2)

    def layer_evidence(self, feature_maps: Sequence[Tensor | None], visible: Sequence[int]) -> Tensor:
        """(L, B, K) evidence of the phrases for the whole map of each layer alone, in nats per token over the null prefix."""
        prefixes = torch.cat([self.model.ask(layers=index, feature_maps=feature_maps) for index in visible])
        scores = self.model.score_checked(prefixes, self.phrases).sum(dim=-1)
        return self.measured(scores.unflatten(0, (len(visible), -1)), "evidence")


class ExplainMixin:
    """`attribute`, `describe` and `describe_directions` for `DevilModel`."""

    @torch.no_grad()
    def attribute(
        self,
        pixel_values: Tensor | None = None,
        phrases: Mapping[str, Tensor] | None = None,
        layers: Layers = None,
        measure: str = "evidence",
        window: int | Mapping[str, int] = 1,
        combine: str | None = None,
        chunk_size: int | None = None,
        feature_maps: Sequence[Tensor | None] | None = None,
        scorer: Callable[..., PhraseScorer] = PhraseScorer,
    ) -> AttributionOutput:
        """Open-vocabulary attribution maps: how likely each phrase is at every location (paper, section 3.3).

        Args:
            pixel_values, feature_maps: the images, as in `ask`.
            phrases: K phrases, as `processor(text=[...])` makes them.
            layers: one map per layer named here, each layer asked alone; None for all layers.
            measure: "sum" of log p over the phrase's tokens (paper), the same "per_token", or "evidence": per token and over
                the null prefix, which makes maps of different phrases comparable (beyond the paper).
            window: side of the square pooled around each location, for all layers or by layer.
            combine: None, or one of `COMBINATIONS`: "joint" asks all the layers together, coarser features interpolated to the
                finest grid first (paper); "informed" and "mean" average the layers' maps on the finest grid.
            chunk_size: locations at once; chosen from the shapes when None.
            scorer: makes what asks the places of a map: `PhraseScorer`, which asks every one, or a class that is made like it.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r} is not one of {MEASURES}.")
        if combine not in (None, *COMBINATIONS):
            raise ValueError(f"combine={combine!r} is not one of {(None, *COMBINATIONS)}.")
        visible = resolve_layers(layers, self.layer_names)
        places = scorer(self, self.check_phrases({} if phrases is None else phrases), measure, chunk_size)
        features = self.read_features(pixel_values, feature_maps, visible)
        windows = self._windows(window, visible)
        rule = COMBINATIONS[combine] if combine is not None else None
        if combine is not None and rule is None:
            joint = dict(zip(visible, resize_to_finest({index: features[index] for index in visible}), strict=True))
            return AttributionOutput(maps={combine: places.map(joint, windows)}, measure=measure)
        maps = {self.layer_names[index]: places.map({index: features[index]}, windows) for index in visible}
        if combine is not None and rule is not None:
            maps = {combine: rule(maps, lambda: places.layer_evidence(features, visible))}
        return AttributionOutput(maps=maps, measure=measure)

    def _windows(self, window: int | Mapping[str, int], visible: Sequence[int]) -> dict[int, int]:
        """Sides of windows by layer index, 1 for layers that a mapping leaves out."""
        if not isinstance(window, Mapping):
            return dict.fromkeys(visible, check_window(window))
        named = resolve_layers(list(window), self.layer_names, whole=ALL_LAYERS) if window else []
        if unasked := [name for name, index in zip(window, named, strict=True) if index not in visible]:
            raise ValueError(f"window has sides for {unasked}, which are not asked for: leave them out.")
        sides = dict(zip(named, map(check_window, window.values()), strict=True))
        return {index: sides.get(index, 1) for index in visible}

    @torch.no_grad()
    def describe(
        self,
        pixel_values: Tensor | None = None,
        layers: Layers = None,
        locations: str | Sequence[tuple[int, int]] | Mapping[str, Sequence[tuple[int, int]]] | None = None,
        window: int | Mapping[str, int] = 1,
        evidence: bool = False,
        guidance: float = 1.0,
        feature_maps: Sequence[Tensor | None] | None = None,
        **generation_kwargs,
    ) -> DescribeOutput:
        """Describe images x layers x locations in one batched call.

        Args:
            pixel_values, feature_maps: the images, as in `ask`.
            layers: each layer named here alone; "all" is all layers together. None: these, then each (each with `locations`).
            locations: (row, column) places on each of the layers, or "all" for every place; a mapping from layers
                gives each its own places; None for the whole image.
            window: side of the square around each place, in locations (odd), for all layers or by layer.
            evidence: also compute how much each word owes to the features, in nats over the null prefix.
            guidance, generation_kwargs: as in `generate`.
        """
        if isinstance(locations, Mapping):
            if layers is not None:
                raise ValueError("locations by layer already name the layers: leave out layers.")
            asked = resolve_layers(list(locations), self.layer_names, whole=ALL_LAYERS)
            places: dict[int, Any] = dict(zip(asked, locations.values(), strict=True))
        else:
            asked = resolve_layers(layers, self.layer_names, whole=ALL_LAYERS)
            if layers is None and locations is None:
                asked = [-1, *asked]
            places = dict.fromkeys(asked, locations)
        needed = range(len(self.layer_names)) if -1 in asked else sorted(asked)
        feature_maps = self.read_features(pixel_values, feature_maps, needed)
        windows = self._windows(window, asked)
        prefixes, rows = [], []
        for index in asked:
            prefix, described = self._describe_layer(feature_maps, index, places[index], windows[index])
            images = torch.arange(len(prefix)) // len(described)
            prefixes.append(prefix)
            each = torch.tensor(described).repeat(len(prefix) // len(described), 1)
            rows.append((images, torch.full_like(images, index), each))
        columns = [torch.cat(column) for column in zip(*rows, strict=True)]
        return self._describe_prefixes(torch.cat(prefixes), columns, evidence, guidance, generation_kwargs)

    def _describe_layer(self, feature_maps, index, locations, window) -> tuple[Tensor, list[tuple[int, int]]]:
        """Prefixes of the described places of one layer (-1 for all), rows by image; and the places."""
        layers = None if index < 0 else index
        grid = tuple(feature_maps[max(index, 0)].shape[-2:])
        if not isinstance(locations, str):
            prefix = self.ask(layers=layers, locations=locations, window=window, feature_maps=feature_maps)
            return prefix, [(-1, -1)] if locations is None else read_locations(locations, self.layer_names[index], grid)
        if locations != ALL_LAYERS or index < 0:
            raise ValueError(f'locations={locations!r}: "all" is the only word, and needs layers asked one by one.')
        vectors = pool_every_location(feature_maps[index], window)
        chunk = rows_per_chunk(self.language_model, self.config.prefix_length + 1, 1, 1)
        prefixes = [self._translate_one(part, index) for part in vectors.split(chunk)]
        return torch.cat(prefixes), [(row, column) for row in range(grid[0]) for column in range(grid[1])]

    def _describe_prefixes(self, prefix, columns, evidence: bool, guidance: float, generation_kwargs) -> DescribeOutput:
        """Decode prefixes (N, k, D_lm) whose image, layer and location are the `columns`."""
        if self._generation_options(0, generation_kwargs)[1].return_dict_in_generate:
            raise ValueError("descriptions are sequences: leave out return_dict_in_generate, or call `generate`.")
        sequences = self.decode(prefix, guidance, **generation_kwargs)
        repeats = len(sequences) // len(prefix)  # more than one with num_return_sequences
        token_evidence = None
        if evidence:
            if repeats > 1:
                raise ValueError("evidence needs one sequence per question: leave out num_return_sequences.")
            token_evidence = torch.sub(*self.sequence_log_probs(prefix, sequences))
        images, layers, locations = (column.repeat_interleave(repeats, dim=0) for column in columns)
        return DescribeOutput(sequences, images, layers, locations, token_evidence, self.layer_names)

    def _translate_one(self, vectors: Tensor, index: int) -> Tensor:
        """Prefixes of pooled features (N, C_l) of one layer, the others hidden."""
        pooled: list[Tensor | None] = [None] * len(self.layer_names)
        pooled[index] = vectors
        return self.translate(pooled)

    @torch.no_grad()
    def describe_directions(
        self, vectors: Tensor, layer: str | int, evidence: bool = False, guidance: float = 1.0, **generation_kwargs
    ) -> DescribeOutput:
        """Describe vectors of a layer's feature space: class vectors, probes, differences of means, SAE latents.

        Args:
            vectors: (M, C_l), entering as pooled features of `layer`, as long as they are: the length of a class vector means
                nothing to the translator. `sweep` of devil_hf.data.directions brings them to that of a feature, from a base.
            layer: the layer whose space they live in, by name or index.

        Returns:
            M rows, of which `image_index` counts the vectors.
        """
        index, vectors = resolve_layer(layer, self.layer_names), read_tensor(vectors, "vectors").float()
        prefix = self._translate_one(vectors, index)
        rows = torch.arange(len(prefix))
        columns = [rows, torch.full_like(rows, index), torch.full((len(prefix), 2), -1)]
        return self._describe_prefixes(prefix, columns, evidence, guidance, generation_kwargs)
