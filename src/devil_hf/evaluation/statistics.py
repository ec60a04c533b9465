"""Confidence intervals by the bootstrap over images: percentiles of a statistic over images drawn with replacement.

Every statistic here is a ratio of sums over images: a mean (value over one), a micro-averaged F1 (twice the hits over words
said and true). The same draws serve every statistic, so the difference of two is a paired one.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Ratio:
    """A statistic of N images: the sum of `numerator` (N,) over the sum of `denominator` (N,); 0 where that is zero."""

    numerator: np.ndarray
    denominator: np.ndarray

    @classmethod
    def mean(cls, values: np.ndarray) -> "Ratio":
        """The mean of values (N,), without the NaN among them."""
        known = ~np.isnan(values)
        return cls(np.where(known, values, 0.0), known.astype(float))

    @property
    def value(self) -> float:
        return float(self.over(np.ones((1, len(self.numerator))))[0])

    def over(self, draws: np.ndarray) -> np.ndarray:
        """The statistic (D,) of each of D draws (D, N)."""
        below = draws @ self.denominator
        return np.divide(draws @ self.numerator, below, out=np.zeros_like(below), where=below > 0)


def bootstrap_draws(images: int, draws: int = 2_000, seed: int = 0) -> np.ndarray:
    """How often each draw took each image, (draws, images)."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=draws).astype(float)


def interval(values: np.ndarray, confidence: float = 0.95) -> list[float]:
    """The percentile interval [low, high] of a statistic over draws (D,); NaN, where a draw has none, is left out."""
    tail = (1 - confidence) / 2
    return [float(end) for end in np.nanquantile(values, (tail, 1 - tail))]
