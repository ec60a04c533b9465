"""Attribution maps from coarse to fine: not every place is asked, the others are interpolated (opt-in, not exact).

What a model says of a place follows from the features there alone. So places are interpolated between those whose features are
alike, wherever they lie, and not between neighbours: features of fine layers change from place to place. Every second place of
every second row is asked first; then those where the interpolation is the least certain, which is known before they are asked:
where nothing alike was asked. The interpolation is that of Gaussian processes (kriging) with the kernel of Matern, of
smoothness 3/2, on features that are normalised as the translator does; its one length is the distance that is usual in the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from devil_hf.model.explaining_devil import PhraseScorer
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.outputs_devil import AttributionOutput
from devil_hf.model.pooling_devil import pool_every_location

LEAST = 0.25  # the share of places that every second of every second row is
FEW = 256  # places: a map of no more is asked as a whole
MOST = 128 * 128  # places: of more, the distances between all that are asked fill the memory
LENGTH, NOISE = 2.0, 1e-3  # of the kernel: in usual distances, and in variances


def check_share(refine: float) -> float:
    """The share of places to ask; a ValueError outside of [.25, 1]."""
    if not LEAST <= refine <= 1:
        raise ValueError(f"refine={refine!r} must be the share of places to ask, from {LEAST} (every second of each row) to 1.")
    return float(refine)


def attribute_coarsely(
    model: DevilModel,
    pixel_values: Tensor | None = None,
    phrases: Mapping[str, Tensor] | None = None,
    refine: float = 0.3,
    **question,
) -> AttributionOutput:
    """What `model.attribute` returns, asked at the share `refine` of the places and interpolated at the others.

    Args:
        refine: from .25, every second place alone, to 1, which asks all. Maps of at most 256 places are asked as a whole.
        pixel_values, phrases, question: as in `model.attribute`.

    Raises:
        ValueError: for a share that is none, maps of more than 128 x 128 places, and whatever `model.attribute` refuses.
        TypeError: for a `scorer`.
    """
    if "scorer" in question:
        raise TypeError(f"scorer={question['scorer']!r:.80}: coarse maps have their own, give yours to model.attribute")
    return model.attribute(pixel_values, phrases, scorer=partial(CoarseScorer, share=check_share(refine)), **question)


@dataclass
class CoarseScorer(PhraseScorer):
    """Scores for a share of the places of every map; the others are interpolated, image by image."""

    share: float = 1.0

    def map(self, feature_maps: Mapping[int, Tensor], windows: Mapping[int, int]) -> Tensor:
        """See `PhraseScorer.map`."""
        B, _, H, W = next(iter(feature_maps.values())).shape
        if H * W <= FEW or self.share == 1:
            return super().map(feature_maps, windows)
        if H * W > MOST:
            raise ValueError(f"maps of {H} x {W} places are too large to interpolate: ask coarser layers, or every place.")
        images = []
        for image in range(B):
            one = {index: pool_every_location(maps[image : image + 1], windows[index]) for index, maps in feature_maps.items()}
            images.append(self._image(one, (H, W)).T.view(-1, H, W))
        return torch.stack(images)

    def _image(self, features: Mapping[int, Tensor], grid: tuple[int, int]) -> Tensor:
        """(P, K) for all P places of one image, of pooled features (P, C_l) of layers that are asked together."""

        def ask(places: Tensor) -> Tensor:
            """(M, K) answers at places (M,)."""
            maps = {index: one[places].T[None, :, None] for index, one in features.items()}
            return super(CoarseScorer, self).map(maps, dict.fromkeys(maps, 1))[0, :, 0].T

        count = grid[0] * grid[1]
        places = torch.arange(count).view(grid)[::2, ::2].flatten().to(next(iter(features.values())).device)
        more = max(round(self.share * count) - len(places), 0)
        # Norms of one for each layer, in double precision: distances of features that are alike are small differences.
        alike = [F.layer_norm(one.double(), one.shape[1:]) / one.shape[1] ** 0.5 for one in features.values()]
        image, values = Kriging(torch.cat(alike, dim=1), places), ask(places)
        if more:
            second = image.uncertainty().topk(more).indices
            places, values = torch.cat([places, second]), torch.cat([values, ask(second)])
            image.add(second)
        # What was asked stays as it was answered.
        return image.interpolate(values).to(values).index_copy(0, places, values)


class Kriging:
    """Interpolation between the places of one image, `features` (P, C), of which those with the numbers `known` are asked."""

    def __init__(self, features: Tensor, known: Tensor):
        self.features, self.known = features, known
        distances = torch.cdist(features, features[known])
        self.length = LENGTH * distances[known].mean().clamp_min(1e-6)
        self._read(self._likeness(distances))

    def _likeness(self, distances: Tensor) -> Tensor:
        scaled = 3**0.5 * distances / self.length
        return (1 + scaled) * (-scaled).exp()  # Matern of smoothness 3/2

    def _read(self, kernel: Tensor) -> None:
        self.kernel = kernel  # (P, M)
        noise = NOISE * torch.eye(len(self.known), dtype=self.kernel.dtype, device=self.kernel.device)
        self.factor = torch.linalg.cholesky(self.kernel[self.known] + noise)

    def add(self, known: Tensor) -> None:
        """Places that are asked as well."""
        self.known = torch.cat([self.known, known])
        self._read(torch.cat([self.kernel, self._likeness(torch.cdist(self.features, self.features[known]))], dim=1))

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
