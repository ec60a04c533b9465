"""Attribution maps from coarse to fine: not every place is asked, the others are interpolated (opt-in, not exact).

What a model says of a place follows from the features there alone. So places are interpolated between those whose features are
alike, wherever they lie, and not between neighbours: features of fine layers change from place to place. Every second place of
every second row is asked first; then those where the interpolation is the least certain, which is known before they are asked:
where nothing alike was asked. The interpolation is that of Gaussian processes (kriging) with the kernel of Matern, of
smoothness 3/2, on features that are normalised as the translator does; its one length is the distance that is usual in the image.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from devil_hf.model.explaining_devil import COMBINATIONS, PhraseScorer, resize_to_finest
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.outputs_devil import AttributionOutput
from devil_hf.model.pooling_devil import Layers, check_window, pool_every_location, resolve_layers

LEAST = 0.25  # the share of places that every second of every second row is
FEW = 256  # places: a map of no more is asked as a whole
MOST = 128 * 128  # places: of more, the distances between all that are asked fill the memory
LENGTH, NOISE = 2.0, 1e-3  # of the kernel: in usual distances, and in variances


def check_share(refine: float) -> float:
    """The share of places to ask; a ValueError outside of [.25, 1]."""
    if not LEAST <= refine <= 1:
        raise ValueError(f"refine={refine!r} must be the share of places to ask, from {LEAST} (every second of each row) to 1.")
    return float(refine)


@torch.no_grad()
def attribute_coarsely(
    model: DevilModel,
    pixel_values: Tensor | None = None,
    phrases: Mapping[str, Tensor] | None = None,
    refine: float = 0.3,
    layers: Layers = None,
    measure: str = "evidence",
    window: int | Mapping[str, int] = 1,
    combine: str | None = None,
    chunk_size: int | None = None,
    feature_maps: Sequence[Tensor | None] | None = None,
) -> AttributionOutput:
    """What `model.attribute` returns, asked at the share `refine` of the places and interpolated at the others.

    Args:
        refine: from .25, every second place alone, to 1, which asks all. Maps of at most 256 places are asked as a whole.
        pixel_values, phrases, layers, measure, window, combine, chunk_size, feature_maps: as in `model.attribute`.

    Raises:
        ValueError: for a share that is none, maps of more than 128 x 128 places, and whatever `model.attribute` refuses.
    """
    share = check_share(refine)
    names, visible = model.layer_names, resolve_layers(layers, model.layer_names)
    if combine not in (None, *COMBINATIONS):
        raise ValueError(f"combine={combine!r} is not one of {(None, *COMBINATIONS)}.")
    features = model.read_features(pixel_values, feature_maps, visible)
    seen = {index: features[index] for index in visible}
    rule = COMBINATIONS[combine] if combine is not None else None
    parts = [{index: maps} for index, maps in seen.items()]
    if joint := combine is not None and rule is None:
        parts = [dict(zip(seen, resize_to_finest(seen), strict=True))]

    def ask(maps: Mapping[int, Tensor]) -> Tensor:
        """(B, K, 1, M) answers for pooled features (B, C_l, 1, M) of layers asked together."""
        output = model.attribute(
            phrases=phrases,
            feature_maps=[maps.get(index) for index in range(len(names))],
            layers=list(maps),
            measure=measure,
            combine=combine if joint else None,
            chunk_size=chunk_size,
        )
        return next(iter(output.maps.values()))

    sides = _sides(window, names, visible)
    found = [_map_of({index: _pooled(maps, sides[index]) for index, maps in part.items()}, share, ask) for part in parts]
    if joint:
        return AttributionOutput(maps={str(combine): found[0]}, measure=measure)
    maps = {names[index]: one for index, one in zip(visible, found, strict=True)}
    if combine is not None and rule is not None:
        scorer = PhraseScorer(model, model.check_phrases({} if phrases is None else phrases))
        maps = {combine: rule(maps, lambda: scorer.layer_evidence(features, visible))}
    return AttributionOutput(maps=maps, measure=measure)


def _sides(window: int | Mapping[str, int], names: Sequence[str], visible: Sequence[int]) -> dict[int, int]:
    """Sides of windows by layer index, 1 for layers that a mapping leaves out."""
    if not isinstance(window, Mapping):
        return dict.fromkeys(visible, check_window(window))
    named = resolve_layers(list(window), names) if window else []
    if unasked := [names[index] for index in named if index not in visible]:
        raise ValueError(f"window has sides for {unasked}, which are not asked for: leave them out.")
    sides = dict(zip(named, map(check_window, window.values()), strict=True))
    return {index: sides.get(index, 1) for index in visible}


def _pooled(maps: Tensor, side: int) -> Tensor:
    """(B, C, H, W) features pooled around every place."""
    B, C, H, W = maps.shape
    return pool_every_location(maps, side).view(B, H, W, C).permute(0, 3, 1, 2)


def _map_of(features: Mapping[int, Tensor], share: float, ask: Callable[[Mapping[int, Tensor]], Tensor]) -> Tensor:
    """(B, K, H, W) of pooled features (B, C_l, H, W) of layers that are asked together."""
    B, _, H, W = next(iter(features.values())).shape
    flat = {index: maps.flatten(2) for index, maps in features.items()}  # (B, C_l, H * W)
    if H * W <= FEW or share == 1:
        return ask({index: maps[:, :, None] for index, maps in flat.items()}).view(B, -1, H, W)
    if H * W > MOST:
        raise ValueError(f"maps of {H} x {W} places are too large to interpolate: ask coarser layers, or every place.")

    def ask_at(places: Tensor) -> Tensor:
        """(B, K, M) answers at places (B, M)."""
        at = {i: maps.gather(2, places[:, None].expand(-1, maps.shape[1], -1))[:, :, None] for i, maps in flat.items()}
        return ask(at)[:, :, 0]

    every_second = torch.arange(H * W).view(H, W)[::2, ::2].flatten()
    first = every_second.expand(B, -1).to(next(iter(flat.values())).device)
    more = max(round(share * H * W) - first.shape[1], 0)
    # Norms of one for each layer, in double precision: distances of features that are alike are small differences.
    alike = [F.layer_norm(maps.mT.double(), maps.shape[1:2]) / maps.shape[1] ** 0.5 for maps in flat.values()]
    images = [Kriging(one, first[0]) for one in torch.cat(alike, dim=2)]
    places, values = first, ask_at(first)
    if more:
        second = torch.stack([image.uncertainty().topk(more).indices for image in images])
        places, values = torch.cat([first, second], dim=1), torch.cat([values, ask_at(second)], dim=2)
        for image, added in zip(images, second, strict=True):
            image.add(added)
    filled = [image.interpolate(one.T).T for image, one in zip(images, values, strict=True)]
    # What was asked stays as it was answered.
    whole = torch.stack(filled).to(values).scatter(2, places[:, None].expand_as(values), values)
    return whole.view(B, -1, H, W)


class Kriging:
    """Interpolation between the places of one image, `features` (P, C), of which those with the numbers `known` are asked."""

    def __init__(self, features: Tensor, known: Tensor):
        self.features, self.known = features, known
        distances = torch.cdist(features, features[known])
        self.length = LENGTH * distances[known].mean().clamp_min(1e-6)
        self._read(distances)

    def _read(self, distances: Tensor) -> None:
        self.distances, scaled = distances, 3**0.5 * distances / self.length
        self.kernel = (1 + scaled) * (-scaled).exp()  # (P, M), Matern of smoothness 3/2
        noise = NOISE * torch.eye(len(self.known), dtype=self.kernel.dtype, device=self.kernel.device)
        self.factor = torch.linalg.cholesky(self.kernel[self.known] + noise)

    def add(self, known: Tensor) -> None:
        """Places that are asked as well."""
        self.known = torch.cat([self.known, known])
        self._read(torch.cat([self.distances, torch.cdist(self.features, self.features[known])], dim=1))

    def uncertainty(self) -> Tensor:
        """(P,) variances, below those of all others where a place is asked already."""
        explained = torch.linalg.solve_triangular(self.factor, self.kernel.T, upper=False).square().sum(dim=0)
        return (1 - explained).index_fill(0, self.known, -1.0)

    def interpolate(self, values: Tensor) -> Tensor:
        """(P, K) of values (M, K) at the places that are asked."""
        values = values.to(self.kernel)
        mean = values.mean(dim=0)
        return self.kernel @ torch.cholesky_solve(values - mean, self.factor) + mean


__all__ = ["Kriging", "attribute_coarsely", "check_share"]
