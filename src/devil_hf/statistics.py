"""One definition of each statistic that several evaluations need.

Intervals are percentiles of a statistic over images drawn with replacement. Every statistic with an interval is a ratio of sums
over images: a mean (value over one), a micro-averaged F1 (twice the hits over words said and true). One set of draws serves
them all, so the difference of two is a paired one, and each is a matrix product; scipy's bootstrap draws anew per statistic.

What is not defined (nothing to divide by, no variance, one image drawn again and again) is NaN as a number and None as an
interval, never 0; whoever writes it down leaves it out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from devil_hf.extras import needs

LARGEST_SAMPLE = 1_000_000  # beyond which no size is looked for


@dataclass
class Ratio:
    """A statistic of N images: the sum of `numerator` (N,) over the sum of `denominator` (N,); NaN where that is zero."""

    numerator: np.ndarray
    denominator: np.ndarray

    @classmethod
    def mean(cls, values: np.ndarray) -> "Ratio":
        """The mean of values (N,), without the NaN among them."""
        known = ~np.isnan(values)
        return cls(np.where(known, values, 0.0), known.astype(float))

    @property
    def value(self) -> float:
        """The statistic of the images as they are."""
        return float(self.over(np.ones((1, len(self.numerator))))[0])

    def over(self, draws: np.ndarray) -> np.ndarray:
        """The statistic (D,) of each of D draws (D, N)."""
        below = draws @ self.denominator
        return np.divide(draws @ self.numerator, below, out=np.full_like(below, np.nan), where=below > 0)

    def interval(self, draws: np.ndarray, less: "Ratio | None" = None) -> tuple[float, float] | None:
        """The 95 % interval over draws (D, N) of it, or of it `less` another, paired; None for fewer than two images."""
        both = [self] if less is None else [self, less]
        if any(np.count_nonzero(one.denominator) < 2 for one in both):
            return None
        return interval(self.over(draws) if less is None else self.over(draws) - less.over(draws))


def bootstrap_draws(images: int, draws: int = 2_000, seed: int = 0) -> np.ndarray:
    """How often each draw took each image, (draws, images)."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=draws).astype(float)


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval (low, high) of a statistic over draws (D,) without those that have none (NaN); None without any."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, (tail, 1 - tail))
    return float(low), float(high)


def bootstrap(values: ArrayLike, weights: ArrayLike, resamples: int = 2_000, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of sum(values) / sum(weights) when images are drawn with replacement; None for fewer than two images.

    Args:
        values: (images,) or (images, parts): sums over each image's phrases; with parts, the mean of the parts' ratios.
        weights: of the same shape: how much each sum counts (number of phrases, pixels of the union).
    """
    values, weights = (np.asarray(one, dtype=np.float64) for one in (values, weights))
    if np.count_nonzero(weights.reshape(len(weights), -1).any(axis=1)) < 2:
        return None
    draws = bootstrap_draws(len(values), resamples, seed)
    return interval(ratio(draws @ values, draws @ weights))


def ratio(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """values / weights, averaged over the parts (last axis of two) that have any weight; NaN where none has."""
    shares = np.divide(values, weights, out=np.full(np.shape(weights), np.nan), where=weights > 0)
    if shares.ndim < 2:
        return shares
    known = np.isfinite(shares)
    count = known.sum(axis=-1)
    return np.divide(np.where(known, shares, 0).sum(axis=-1), count, out=np.full(len(count), np.nan), where=count > 0)


def average_precision(values: ArrayLike, truth: ArrayLike) -> float:
    """Area under the precision-recall curve of what is true (N,), ranked by values (N,); ties are one step, NaN if none is true.

    Raises:
        MissingExtraError: without scikit-learn.
    """
    needs("sklearn", "evaluate")
    from sklearn.metrics import average_precision_score

    if not np.any(truth):
        return float("nan")
    return float(average_precision_score(truth, values))


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's correlation of two series (N,), ties at their mean rank; NaN where either is constant or has one value.

    Raises:
        MissingExtraError: without scipy.
    """
    needs("scipy", "evaluate")
    from scipy.stats import rankdata

    # Of the ranks; `spearmanr` computes a p-value as well, which costs ten times as much for maps of some hundred places.
    ranks = np.array([rankdata(one), rankdata(other)])
    return float("nan") if not np.ptp(ranks, axis=1).all() else float(np.corrcoef(ranks)[0, 1])


def false_discovery(p: ArrayLike) -> np.ndarray:
    """q-values of p-values (n,) by Benjamini and Hochberg (1995).

    Raises:
        MissingExtraError: without scipy.
    """
    needs("scipy", "evaluate")
    from scipy.stats import false_discovery_control

    return false_discovery_control(np.asarray(p, dtype=np.float64), method="bh")


def roc_area(values: ArrayLike, truth: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve of what is true (N,) by values (N,), ties halved; NaN unless there is something of both.

    Args:
        weights: (N,) how often each value counts, for instance in a draw of the bootstrap.

    Raises:
        MissingExtraError: without scikit-learn.
    """
    needs("sklearn", "evaluate")
    from sklearn.metrics import roc_auc_score

    counted = np.asarray(truth) if weights is None else np.asarray(truth)[np.asarray(weights) > 0]
    if len(set(counted.tolist())) < 2:
        return float("nan")
    return float(roc_auc_score(truth, values, sample_weight=weights))


def roc_areas(values: ArrayLike, truth: ArrayLike, draws: np.ndarray) -> np.ndarray:
    """`roc_area` (D,) of each of D draws (D, N) that say how often each value counts; NaN for a draw without both kinds.

    One sort serves them all; a call of scikit-learn for each costs a hundred times as much.
    """
    values, truth = np.asarray(values, dtype=np.float64), np.asarray(truth, dtype=bool)
    order = np.argsort(values)
    values, truth, times = values[order], truth[order], draws[:, order]
    first, last = (np.searchsorted(values, values, side) for side in ("left", "right"))  # of those that are equal
    below = np.concatenate([np.zeros((len(draws), 1)), np.cumsum(times * ~truth, axis=1)], axis=1)
    won = (times * truth * (below[:, first] + below[:, last]) / 2).sum(axis=1)
    return ratio(won, (times * truth).sum(axis=1) * below[:, -1])


def holm(p: ArrayLike) -> np.ndarray:
    """p-values (n,) adjusted by Holm (1979): at most a share of level of all families has any that is below level by chance."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def two_samples(higher: ArrayLike, lower: ArrayLike) -> float:
    """One-sided p-value of one sample (N,) being above another (M,), by the rank test of Mann and Whitney (1947).

    Raises:
        MissingExtraError: without scipy.
    """
    needs("scipy", "evaluate")
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(higher, lower, alternative="greater").pvalue)


def sign_flip(differences: ArrayLike, draws: int = 9_999, seed: int = 0) -> float:
    """One-sided p-value of paired differences (N,) being above zero, by taking their signs at random.

    Raises:
        MissingExtraError: without scipy.
    """
    needs("scipy", "evaluate")
    from scipy.stats import permutation_test

    data = (np.asarray(differences, dtype=np.float64),)
    options = {"permutation_type": "samples", "alternative": "greater", "n_resamples": draws, "rng": seed}
    return float(permutation_test(data, lambda x, axis: x.mean(axis=axis), vectorized=True, **options).pvalue)


def exchanged_rows(values: ArrayLike, weights: ArrayLike, draws: int = 9_999, seed: int = 0) -> float:
    """One-sided p-value of the sum of values (N, K) times weights (N, K), by exchanging the rows of weights at random."""
    kinds, own = np.unique(np.asarray(weights, dtype=np.float64), axis=0, return_inverse=True)
    sums = np.asarray(values, dtype=np.float64) @ kinds.T  # of every row of values with every kind of weights
    rows, own = np.arange(len(sums)), own.reshape(-1)
    observed, generator, above = sums[rows, own].sum(), np.random.default_rng(seed), 1
    for start in range(0, draws, 1_000):
        given = generator.permuted(np.tile(own, (min(1_000, draws - start), 1)), axis=1)
        above += int((sums[rows, given].sum(axis=1) >= observed - 1e-9).sum())  # sums in another order are no other sum
    return above / (1 + draws)


def reliability(confidences: ArrayLike, correct: ArrayLike, bins: int = 10) -> np.ndarray:
    """(bins, 3): how many answers have a confidence in each of `bins` equal parts of [0, 1], their mean confidence, and how many
    of them are correct, as a share; NaN in a bin without any.

    Args:
        confidences: (N,) probability that each answer gives itself.
        correct: (N,) whether it is.
    """
    confident, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    at = np.clip((confident * bins).astype(int), 0, bins - 1)
    counts, *sums = (np.bincount(at, weights, bins) for weights in (None, confident, right))
    return np.stack([counts, *(np.divide(one, counts, out=np.full(bins, np.nan), where=counts > 0) for one in sums)], axis=1)


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """The mean over answers of |confidence - share correct| of their bin (Guo et al., 2017), see `reliability`."""
    counts, confidence, share = reliability(confidences, correct, bins).T
    filled = counts > 0
    return float((counts * np.abs(confidence - share))[filled].sum() / counts.sum()) if filled.any() else float("nan")


def paired_swaps(
    difference: Callable[[np.ndarray], np.ndarray], pairs: int, draws: int = 9_999, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided permutation test of many differences at once, by exchanging the two members of pairs at random.

    All 2^pairs exchanges are taken where they are no more than `draws`. scipy's test takes one difference at a time; here one
    draw serves them all, and a difference that is made of sums over pairs is a matrix product.

    Args:
        difference: of exchanges (D, pairs), 1 where a pair stays as it is and 0 where its members are exchanged, the differences
            (D, ...) that come out.
        pairs: how many there are.

    Returns:
        The differences (...) as they are, and their p-values.
    """
    observed = difference(np.ones((1, pairs)))[0]
    size = np.abs(observed) * (1 - 1e-9) - 1e-12  # sums in another order are no other difference
    if pairs <= 60 and 2**pairs <= draws:
        kept = (np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1
        return observed, (np.abs(difference(kept.astype(float))) >= size).mean(axis=0)
    generator = np.random.default_rng(seed)
    above = np.ones(np.shape(observed))
    for start in range(0, draws, 1_000):
        kept = generator.integers(0, 2, (min(1_000, draws - start), pairs)).astype(float)
        above = above + (np.abs(difference(kept)) >= size).sum(axis=0)
    return observed, above / (1 + draws)


# ------------------------------------------------------------- one sample above another, and what a test of it can see


@dataclass(frozen=True)
class Separation:
    """How far one sample lies above another: the area under the ROC curve, with one-sided bounds.

    Args:
        area: chance that a value of the one is above one of the other, of a pair where they are paired; ties are halved.
        low, high: each is passed by the true area with a probability of at most `level`.
        level: that error rate.
        sizes: of both samples; one number where they are paired.
    """

    area: float
    low: float
    high: float
    level: float
    sizes: tuple[int, ...]


def separation(higher: ArrayLike, lower: ArrayLike, level: float = 0.05, paired: bool = False) -> Separation:
    """The area (N,) above (M,), bounded by the variance of DeLong et al. (1988), on the logit scale.

    No sample is so clear that it leaves no doubt: for its bounds the area is at least half a value of the smaller sample from 0
    and 1, and its variance at least that of Hanley and McNeil (1982). Of pairs, the area is the share in which the one is above,
    and binomial.
    """
    above, below = (np.asarray(one, dtype=np.float64) for one in (higher, lower))
    if paired:
        area = float(np.mean((above > below) + 0.5 * (above == below)))
        return _bounded(area, 0.0, level, (len(above),))
    shares = [_share_below(above, below), 1 - _share_below(below, above)]  # of each value, how much of the other sample it beats
    measured = sum(float(np.var(one, ddof=1)) / len(one) for one in shares)
    return _bounded(float(shares[0].mean()), measured, level, (len(above), len(below)))


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    ranked = np.sort(others)
    return (np.searchsorted(ranked, values, "left") + np.searchsorted(ranked, values, "right")) / (2 * len(others))


def _bounded(area: float, measured: float, level: float, sizes: tuple[int, ...]) -> Separation:
    reach, half = NormalDist().inv_cdf(1 - level), 0.5 / min(sizes)
    ends = []
    for side in (-1, 1):
        # Shares of pairs are counts, so that a bound has half a pair more to reach.
        inside = float(np.clip(area + side * half * (len(sizes) == 1), half, 1 - half))
        error = np.sqrt(max(measured, area_variance(inside, sizes))) / (inside * (1 - inside))
        ends.append(float(1 / (1 + np.exp(-(np.log(inside / (1 - inside)) + side * reach * error)))))
    return Separation(area, min(ends[0], area), max(ends[1], area), level, sizes)


def area_variance(area: float, sizes: tuple[int, ...]) -> float:
    """Variance of an area of samples of these sizes by Hanley and McNeil (1982); of one size, of pairs, the binomial one."""
    spread = area * (1 - area)
    if len(sizes) == 1:
        return spread / sizes[0]
    one, other = sizes
    both_above, both_below = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    return (spread + (one - 1) * both_above + (other - 1) * both_below) / (one * other)


def detectable_area(sizes: tuple[int, ...], level: float = 0.05, power: float = 0.8, bound: float = 0.5) -> float:
    """The smallest area that samples show with a probability of `power`; NaN where they are too small for any.

    Args:
        bound: what counts. An area is shown where its lower bound is above 1/2 and its upper bound not below this.
    """
    shown, reached = NormalDist().inv_cdf(1 - level), NormalDist().inv_cdf(power)
    areas = np.linspace(0.501, 1 - 0.5 / min(sizes), 1_000)
    errors = np.sqrt([area_variance(area, sizes) for area in areas]) / (areas * (1 - areas))
    logits = np.log(areas / (1 - areas))
    seen = (logits >= (shown + reached) * errors) & (logits >= np.log(bound / (1 - bound)) - (shown - reached) * errors)
    return float(areas[seen][0]) if seen.any() else float("nan")


def size_for_absence(
    bound: float, level: float = 0.05, power: float = 0.8, paired: bool = False, area: float = 0.5
) -> int | None:
    """How many values each sample needs for both bounds of an area to lie within `bound` of 1/2 on either side.

    Args:
        bound: above 1/2, the area that the upper bound must stay below, and one minus the lower bound.
        power: with this probability, where the true area is `area`; 0 for where that is the area that is found.

    Returns:
        None where `area` is not within `bound` itself.
    """
    reach = NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf((1 + power) / 2)
    area, size = max(area, 1 - area), 2
    while size < LARGEST_SAMPLE and area < bound:
        inside, middle = bound - 0.5 / size * paired, area * (1 - area)
        error = np.sqrt(area_variance(area, (size,) if paired else (size, size))) / middle
        if inside > area and np.log(inside / (1 - inside)) - np.log(area / (1 - area)) > reach * error:
            return size
        size = max(size + 1, size * 101 // 100)
    return None


def size_for_presence(level: float = 0.05, paired: bool = False) -> int:
    """How many values each sample needs for the lower bound to be above 1/2 where the samples do not overlap."""
    size = 2
    while _bounded(1.0, 0.0, level, (size,) if paired else (size, size)).low <= 0.5:
        size += 1
    return size


__all__ = [
    "Ratio",
    "Separation",
    "area_variance",
    "average_precision",
    "bootstrap",
    "bootstrap_draws",
    "detectable_area",
    "exchanged_rows",
    "expected_calibration_error",
    "false_discovery",
    "holm",
    "interval",
    "paired_swaps",
    "rank_correlation",
    "ratio",
    "reliability",
    "roc_area",
    "roc_areas",
    "separation",
    "sign_flip",
    "size_for_absence",
    "size_for_presence",
    "two_samples",
]
