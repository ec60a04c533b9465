"""Questions about many layers and places at once: attribution maps and dense descriptions.

Both are `score` and `generate` of the model, asked for every place of a layer in chunks whose size follows from the shapes.
Places are pooled without building one-hot location weights; layers that are not asked for are never computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backbone_devil import resolve_layers
from .combining_devil import COMBINATIONS, combine_maps, finest_grid
from .outputs_devil import AttributionOutput, DescribeOutput
from .pooling_devil import pool_every_location, read_locations
from .scoring_devil import gather_log_probs, rows_per_chunk, run_language_model

ALL_LAYERS = "all"


class ExplainMixin:
    """`attribute`, `describe` and `describe_directions` for `DevilModel`."""

    @torch.no_grad()
    def attribute(
        self,
        pixel_values: Tensor | None = None,
        phrases: Mapping[str, Tensor] | None = None,
        layers: str | int | Sequence[str | int] | None = None,
        measure: str = "evidence",
        window: int | Mapping[str, int] = 1,
        combine: str | None = None,
        chunk_size: int | None = None,
        feature_maps: Sequence[Tensor | None] | None = None,
    ) -> AttributionOutput:
        """Open-vocabulary attribution maps: how likely each phrase is at every location (paper, section 3.3).

        Args:
            pixel_values: (B, 3, H, W).
            phrases: K phrases, as `processor(text=[...])` makes them.
            layers: one map per layer named here, each layer asked alone; None for all layers.
            measure: "sum" of log p over the phrase's tokens (paper), the same "per_token", or "evidence": per token and over
                the null prefix, which makes maps of different phrases comparable (beyond the paper).
            window: side of the square pooled around each location, for all layers or by layer name.
            combine: None; "joint" asks all the layers together, coarser maps interpolated to the finest grid first
                (paper); "informed" and "mean" average the layers' maps on the finest grid (beyond the paper):
                weighted by what each layer knows of the phrase (see `combining_devil`; it points best), or alike.
            chunk_size: locations at once; chosen from the shapes when None.
            feature_maps: what `extract_features` returned, to ask again without running the backbone.
        """
        if measure not in ("sum", "per_token", "evidence"):
            raise ValueError(f"measure={measure!r} is not one of 'sum', 'per_token', 'evidence'.")
        if combine not in (None, "joint", *COMBINATIONS):
            raise ValueError(f"combine={combine!r} is not one of {(None, 'joint', *COMBINATIONS)}.")
        checked = self.check_phrases(phrases or {})
        visible = resolve_layers(layers, self.layer_names)
        if feature_maps is None:
            feature_maps = self.extract_features(pixel_values, visible)
        windows = self._windows(window, visible)
        if combine == "joint":
            finest = finest_grid([maps for maps in (feature_maps[i] for i in visible) if maps is not None])
            resized = [
                F.interpolate(feature_maps[i].float(), finest, mode="bilinear", align_corners=False)
                if i in visible
                else None
                for i in range(len(feature_maps))
            ]
            maps = {"joint": self._attribution_map(resized, visible, windows, checked, measure, chunk_size)}
            return AttributionOutput(maps=maps, measure=measure)
        maps = {
            self.layer_names[index]: self._attribution_map(feature_maps, [index], windows, checked, measure, chunk_size)
            for index in visible
        }
        if combine:
            whole = self.layer_evidence(feature_maps, checked, visible) if combine == "informed" else None
            maps = {combine: combine_maps(maps, combine, whole)}
        return AttributionOutput(maps=maps, measure=measure)

    @torch.no_grad()
    def layer_evidence(
        self,
        feature_maps: Sequence[Tensor | None],
        phrases: Mapping[str, Tensor],
        layers: str | int | Sequence[str | int] | None = None,
    ) -> Tensor:
        """(L, B, K) evidence of K phrases for the whole map of each layer alone, in nats per token over the null prefix."""
        asked = resolve_layers(layers, self.layer_names)
        return torch.stack([self.score(layers=i, feature_maps=feature_maps, **phrases).evidence for i in asked])

    def _windows(self, window: int | Mapping[str, int], visible: Sequence[int]) -> dict[int, int]:
        if isinstance(window, int):
            return dict.fromkeys(visible, window)
        by_index = {resolve_layers(name, self.layer_names)[0]: side for name, side in window.items()}
        return {index: by_index.get(index, 1) for index in visible}

    def _attribution_map(self, feature_maps, visible, windows, phrases, measure, chunk_size) -> Tensor:
        """One map per image and phrase, (B, K, H, W), with the `visible` layers (on one grid) asked together."""
        B, _, H, W = feature_maps[visible[0]].shape
        pooled = {i: self._finite(pool_every_location(feature_maps[i], windows[i]), i) for i in visible}
        K, T = phrases["input_ids"].shape
        chunk_size = chunk_size or rows_per_chunk(self.language_model, self.config.prefix_length + 1, K, T)
        scores = []
        for begin in range(0, B * H * W, chunk_size):
            rows = [
                None if i not in pooled else pooled[i][begin : begin + chunk_size] for i in range(len(feature_maps))
            ]
            scores.append(self.score_prefix(self.translate(rows), phrases, chunk_size).sum(dim=-1))
        score = torch.cat(scores)  # (B * H * W, K)
        if measure == "evidence":
            score = score - self.score_prefix(self.null_prefix(), phrases).sum(dim=-1)
        if measure != "sum":
            score = score / phrases["scored_mask"].sum(dim=-1).to(score.device)
        return score.view(B, H, W, K).permute(0, 3, 1, 2)

    @torch.no_grad()
    def describe(
        self,
        pixel_values: Tensor | None = None,
        layers: str | int | Sequence[str | int] | None = None,
        locations: str | Sequence[tuple[int, int]] | Mapping[str, Sequence[tuple[int, int]]] | None = None,
        window: int = 1,
        evidence: bool = False,
        guidance: float = 1.0,
        feature_maps: Sequence[Tensor | None] | None = None,
        **generation_kwargs,
    ) -> DescribeOutput:
        """Describe images x layers x locations in one batched call.

        Args:
            pixel_values: (B, 3, H, W).
            layers: each layer named here alone; "all" stands for all layers together. None: all together, then each alone
                (only each alone when `locations` are given).
            locations: (row, column) places on each of the layers, or "all" for every place; a mapping from layers
                gives each its own places; None for the whole image.
            window: side of the square around each place, in locations (odd).
            evidence: also compute how much each word owes to the features, in nats over the null prefix.
            guidance: see `generate`.
            feature_maps: what `extract_features` returned, to ask again without running the backbone.
            generation_kwargs: for the library's `generate`.
        """
        if isinstance(locations, Mapping):
            if layers is not None:
                raise ValueError("locations by layer already name the layers: leave out layers.")
            asked = self._described_layers(list(locations), whole=False)
            places: dict[int, Any] = dict(zip(asked, locations.values(), strict=True))
        else:
            asked = self._described_layers(layers, whole=locations is None)
            places = dict.fromkeys(asked, locations)
        if feature_maps is None:
            feature_maps = self.extract_features(pixel_values, None if -1 in asked else sorted(set(asked)))
        prefixes, rows = [], []
        for index in asked:
            prefix, described = self._describe_layer(feature_maps, index, places[index], window)
            images = torch.arange(len(prefix)) // len(described)
            prefixes.append(prefix)
            rows.append(
                (
                    images,
                    torch.full_like(images, index),
                    torch.tensor(described).repeat(len(prefix) // len(described), 1),
                )
            )
        columns = [torch.cat(column) for column in zip(*rows, strict=True)]
        return self._describe_prefixes(torch.cat(prefixes), columns, evidence, guidance, generation_kwargs)

    def _describe_prefixes(self, prefix, columns, evidence: bool, guidance: float, generation_kwargs) -> DescribeOutput:
        """Decode prefixes (N, k, D_lm) whose image, layer and location are the `columns`."""
        if generation_kwargs.get("return_dict_in_generate"):
            raise ValueError("descriptions are sequences: leave out return_dict_in_generate, or call `generate`.")
        sequences = self.decode(prefix, guidance, **generation_kwargs)
        repeats = len(sequences) // len(prefix)  # more than one with num_return_sequences
        image_index, layer_index, locations = (column.repeat_interleave(repeats, dim=0) for column in columns)
        return DescribeOutput(
            sequences=sequences,
            image_index=image_index,
            layer_index=layer_index,
            locations=locations,
            token_evidence=self._token_evidence(prefix, sequences) if evidence else None,
            layer_names=self.layer_names,
        )

    def _described_layers(self, layers, whole: bool) -> list[int]:
        """Indices of the layers to describe, -1 for all together."""
        if layers is None:
            return ([-1] if whole else []) + list(range(len(self.layer_names)))
        requested = [layers] if isinstance(layers, str | int) else list(layers)
        return [-1 if name == ALL_LAYERS else resolve_layers(name, self.layer_names)[0] for name in requested]

    def _describe_layer(self, feature_maps, index, locations, window) -> tuple[Tensor, list[tuple[int, int]]]:
        """Prefixes of the described places of one layer (-1 for all), rows by image; and the places."""
        layers = None if index < 0 else index
        if locations is None:
            return self.ask(layers=layers, feature_maps=feature_maps), [(-1, -1)]
        if not isinstance(locations, str):
            prefix = self.ask(layers=layers, locations=locations, window=window, feature_maps=feature_maps)
            grid = tuple(feature_maps[max(index, 0)].shape[-2:])
            return prefix, read_locations(locations, grid, self.layer_names[index])
        if locations != ALL_LAYERS or index < 0:
            raise ValueError(f'locations={locations!r}: "all" is the only word, and needs layers asked one by one.')
        vectors = self._finite(pool_every_location(feature_maps[index], window), index)
        chunk = rows_per_chunk(self.language_model, self.config.prefix_length + 1, 1, 1)
        prefixes = [self._translate_one(part, index) for part in vectors.split(chunk)]
        H, W = feature_maps[index].shape[-2:]
        return torch.cat(prefixes), [(row, column) for row in range(H) for column in range(W)]

    def _translate_one(self, vectors: Tensor, index: int) -> Tensor:
        """Prefixes of pooled features (N, C_l) of one layer, the others hidden."""
        pooled: list[Tensor | None] = [None] * len(self.layer_names)
        pooled[index] = vectors
        return self.translate(pooled)

    @torch.no_grad()
    def describe_directions(
        self,
        vectors: Tensor,
        layer: str | int,
        base: Tensor | None = None,
        strengths: Sequence[float] = (1.0,),
        both_signs: bool = False,
        length: float | None = None,
        evidence: bool = False,
        guidance: float = 1.0,
        **generation_kwargs,
    ) -> DescribeOutput:
        """Describe directions of a layer's feature space: class vectors, probes, differences of means, SAE latents.

        Args:
            vectors: (M, C_l) directions, entering as pooled features of `layer`.
            layer: the layer whose space they live in, by name or index.
            base: (C_l,) or (M, C_l) point that the directions start from (a mean feature, say); None for the origin.
            strengths: each vector is multiplied by each of these; negative ones turn it around.
            both_signs: sweep every strength twice, as it is and turned around, from the lowest to the highest.
            length: vectors are brought to this length first (that of a typical feature, say), since the length of a class
                vector or a decoder row means nothing to the translator; None leaves them as they are.

        Returns:
            M * S rows, by vector, then by strength (S of them); `image_index` counts the vectors, `strengths` has the factors.
        """
        (index,) = resolve_layers(layer, self.layer_names)
        channels = self.backbone.channels[index]
        if vectors.ndim != 2 or vectors.shape[1] != channels:
            raise ValueError(
                f"vectors of shape {tuple(vectors.shape)}: layer {self.layer_names[index]!r} needs (directions, {channels})."
            )
        vectors = vectors.float()
        if length is not None:
            norms = vectors.norm(dim=1, keepdim=True)
            if not norms.all():
                raise ValueError(
                    f"vectors {torch.nonzero(norms[:, 0] == 0)[:5, 0].tolist()} are zero: they have no direction."
                )
            vectors = vectors * (length / norms)
        if not strengths:
            raise ValueError("strengths are empty: name at least one factor, such as 1.0.")
        swept = sorted({sign * float(one) for one in strengths for sign in (-1, 1)}) if both_signs else list(strengths)
        factors = torch.tensor(swept, dtype=torch.float32, device=vectors.device)
        points = vectors[:, None] * factors[:, None]  # (M, S, C_l)
        if base is not None:
            if base.shape not in ((channels,), (1, channels), (len(vectors), channels)):
                raise ValueError(
                    f"base of shape {tuple(base.shape)}: expected ({channels},) or ({len(vectors)}, {channels})."
                )
            points = points + base.to(points).view(-1, 1, channels)
        prefix = self._translate_one(self._finite(points.flatten(0, 1), index), index)
        rows = torch.arange(len(prefix))
        columns = [rows // len(factors), torch.full_like(rows, index), torch.full((len(prefix), 2), -1)]
        output = self._describe_prefixes(prefix, columns, evidence, guidance, generation_kwargs)
        repeats = len(output.sequences) // len(prefix)
        output.strengths = factors.cpu().repeat(len(vectors)).repeat_interleave(repeats)
        return output

    @torch.no_grad()
    def map_directions(
        self,
        vectors: Tensor,
        layer: str | int,
        pixel_values: Tensor | None = None,
        base: Tensor | None = None,
        feature_maps: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Where a direction is: the component of the layer's features along it, at every location.

        Args:
            vectors: (M, C_l) directions of `layer`.
            pixel_values: (B, 3, H, W).
            base: (C_l,) point that features are measured from (their mean, say); None for the origin.
            feature_maps: what `extract_features` returned, to map again without running the backbone.

        Returns:
            (B, M, H_l, W_l), in units of the layer's features, each direction taken at length one.
        """
        (index,) = resolve_layers(layer, self.layer_names)
        channels = self.backbone.channels[index]
        if vectors.ndim != 2 or vectors.shape[1] != channels:
            raise ValueError(
                f"vectors of shape {tuple(vectors.shape)}: layer {self.layer_names[index]!r} needs (directions, {channels})."
            )
        if feature_maps is None:
            feature_maps = self.extract_features(pixel_values, [index])
        features = feature_maps[index]
        units = F.normalize(vectors.to(device=features.device, dtype=torch.float32), dim=1)
        maps = torch.einsum("bchw,mc->bmhw", features.float(), units)
        return maps if base is None else maps - (units @ base.to(units).flatten())[:, None, None]

    def _token_evidence(self, prefix: Tensor, sequences: Tensor) -> Tensor:
        """(N, T) log p(token | feature) - log p(token | null prefix) of each row's own tokens; 0 on padding."""
        if len(sequences) != len(prefix):
            raise ValueError("evidence needs one sequence per question: leave out num_return_sequences.")
        given, null = self.sequence_log_probs(prefix, sequences)
        return given - null

    @torch.no_grad()
    def sequence_log_probs(self, prefix: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of generated tokens under the prefixes that they belong to, and under the null prefix.

        Args:
            prefix: (N, k, D_lm), as `ask` and `translate` give them.
            sequences: (N, T) tokens, as `generate` gives them.

        Returns:
            Two tensors (N, T) in nats, the first EOS of a row included, 0 on the padding after it.
        """
        length = sequences.shape[1]
        null = self.null_prefix()
        pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
        chunk = rows_per_chunk(self.language_model, self.config.prefix_length + 1, 1, length, logit_positions=length)
        for rows, tokens in zip(prefix.split(chunk), sequences.split(chunk), strict=True):
            words = self.get_input_embeddings()(tokens[:, :-1])
            starts = (self.embed_prefix(rows), self.embed_prefix(null).expand(len(rows), -1, -1))
            for start, collected in zip(starts, pieces, strict=True):
                embeds = torch.cat([start, words.to(start.dtype)], dim=1)
                logits = run_language_model(self.language_model, embeds, keep=length).logits
                collected.append(gather_log_probs(logits, tokens))
        mask = self.word_mask(sequences).to(pieces[0][0].device)
        return torch.cat(pieces[0]) * mask, torch.cat(pieces[1]) * mask

    def word_mask(self, sequences: Tensor) -> Tensor:
        """True on generated tokens up to and including the first EOS."""
        if self.config.eos_token_id is None:
            return torch.ones_like(sequences, dtype=torch.bool)
        ended = (sequences == self.config.eos_token_id).cumsum(dim=1)
        return (ended - (sequences == self.config.eos_token_id).long()) == 0


__all__ = ["ExplainMixin"]
