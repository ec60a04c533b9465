"""What a measure of maps sees, and the registry of measures.

A measure is one function of one phrase's map in one image; it then has a column in every table and in `scores.json`:

```python
@map_measure("peak")
def peak(view):
    "The highest value of the map, in nats per token."
    return float(view.values.max())
```

It may return None where it says nothing of this map. What is not the mean over phrases is said by `pool`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from devil_hf.evaluation.maps.measures import overlaps
from devil_hf.registry import Registry


@dataclass
class MapView:
    """One phrase's map of one image.

    Args:
        values: (rows, columns), the map on its own grid.
        maps: (K, height, width), the maps of all phrases of the image in one unit, enlarged to the crop.
        masks: (K, height, width) bool.
        at: which of the K phrases this is.
        knows_phrases: whether the map depends on the phrase, so that phrases can be compared.
        curves: "insertion" and "deletion", evidence at each share of locations, where the map's order was followed.
        whole: evidence of the phrase for the whole image.
    """

    values: np.ndarray
    maps: np.ndarray
    masks: np.ndarray
    at: int
    knows_phrases: bool = True
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    whole: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the map's own grid."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def mask(self) -> np.ndarray:
        """(height, width) bool, where the object is."""
        return self.masks[self.at]

    @property
    def large(self) -> np.ndarray:
        """(height, width), the map enlarged to the crop."""
        return self.maps[self.at]

    @cached_property
    def overlaps(self) -> np.ndarray:
        """See `measures.overlaps`, in shares of the crop."""
        return overlaps(self.large, self.mask) / self.mask.size


@dataclass
class Pooled:
    """A measure over many phrases: its value, and what images drawn with replacement are summed of.

    Args:
        value: over all of them.
        sums, weights: (images,) or (images, parts), see `statistics.bootstrap`.
    """

    value: float
    sums: np.ndarray
    weights: np.ndarray


Pool = Callable[[Sequence[Any], np.ndarray, np.ndarray], Pooled]


def mean_of_phrases(values: Sequence[float], images: np.ndarray, phrases: np.ndarray) -> Pooled:
    """The mean over phrases, whatever image they are of.

    Args:
        values: one per phrase and image.
        images, phrases: numbers of the image and of the phrase of each value, from 0.
    """
    sums = np.bincount(images, values)
    weights = np.bincount(images).astype(float)
    return Pooled(float(sums.sum() / weights.sum()), sums, weights)


@dataclass(frozen=True)
class MapMeasure:
    """A measure of maps.

    Args:
        of_phrase: its value for one map, None where it says nothing; of any type that `pool` understands.
        pool: from values to a score.
        by_order: whether it depends on nothing but the order of the places, and so is the same in every unit.
        from_zero: whether it needs maps whose zero means something, as that of evidence does and that of log-probabilities not.
        beside: whether it is a level to compare with (chance) and no score of the map.
    """

    of_phrase: Callable[[MapView], Any]
    pool: Pool = mean_of_phrases
    by_order: bool = False
    from_zero: bool = False
    beside: bool = False


MAP_MEASURES: Registry[MapMeasure] = Registry("map measure", "devil_hf.evaluation.maps")


def map_measure(
    name: str, pool: Pool = mean_of_phrases, by_order: bool = False, from_zero: bool = False, beside: bool = False
) -> Callable:
    """Decorator that registers the `of_phrase` of a `MapMeasure`."""

    def register(of_phrase: Callable[[MapView], Any]) -> Callable[[MapView], Any]:
        MAP_MEASURES.register(name, MapMeasure(of_phrase, pool, by_order, from_zero, beside))
        return of_phrase

    return register


__all__ = ["MAP_MEASURES", "MapMeasure", "MapView", "Pooled", "map_measure", "mean_of_phrases"]
