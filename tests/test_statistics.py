"""Each statistic is that of a naive count, or of the library that has it."""

from itertools import permutations
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import permutation_test

from devil_hf.statistics import (
    detectable_area,
    exchanged_rows,
    expected_calibration_error,
    holm,
    paired_swaps,
    reliability,
    roc_area,
    roc_areas,
    separation,
    sign_flip,
    size_for_absence,
    size_for_presence,
    two_samples,
)


def test_the_area_and_the_test_are_those_of_a_naive_count():
    generator = np.random.default_rng(0)
    values, truth = generator.normal(size=40).round(1), generator.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[truth] for b in values[~truth]]
    assert roc_area(values, truth) == pytest.approx(np.mean(pairs))
    assert np.isnan(roc_area([1.0, 2.0], [True, True]))
    differences = generator.normal(0.5, size=8)
    signs = (np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T * differences).mean(axis=1)
    assert sign_flip(differences) == pytest.approx((signs >= differences.mean() - 1e-12).mean())


def test_exchanged_pairs_are_those_of_scipy():
    generator = np.random.default_rng(3)
    one, other = generator.normal(0.8, size=(2, 8)), generator.normal(size=(2, 8))

    def ratio_of_means(x, y, axis):
        return np.exp(x).mean(axis=axis) / np.exp(y).mean(axis=axis) - np.exp(y).mean(axis=axis) / np.exp(x).mean(axis=axis)

    def difference(kept):
        first = (kept @ np.exp(one).T + (1 - kept) @ np.exp(other).T) / 8
        second = (kept @ np.exp(other).T + (1 - kept) @ np.exp(one).T) / 8
        return first / second - second / first

    observed, p = paired_swaps(difference, 8)
    for row in range(2):
        wanted = permutation_test((one[row], other[row]), ratio_of_means, permutation_type="samples", n_resamples=np.inf)
        assert (observed[row], p[row]) == pytest.approx((wanted.statistic, wanted.pvalue))
    _, drawn = paired_swaps(difference, 8, draws=200)
    assert drawn == pytest.approx(p, abs=0.08), "a sample of the exchanges says about the same"
    assert paired_swaps(lambda kept: np.zeros((len(kept), 3)), 30)[1].tolist() == [1.0] * 3, "no difference is none"


def test_draws_of_an_area_are_those_of_repeated_values():
    generator = np.random.default_rng(1)
    values, truth, times = generator.normal(size=30).round(1), generator.random(30) < 0.5, generator.integers(0, 3, 30)
    assert roc_area(values, truth, times) == pytest.approx(roc_area(values.repeat(times), truth.repeat(times)))
    assert np.isnan(roc_area(values, truth, truth)), "nothing false was drawn"
    draws = np.vstack([generator.integers(0, 3, (20, 30)), truth])
    assert roc_areas(values, truth, draws)[:-1] == pytest.approx([roc_area(values, truth, one) for one in draws[:-1]])
    assert np.isnan(roc_areas(values, truth, draws)[-1])


def test_a_family_of_true_hypotheses_is_rarely_rejected():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    families = np.random.default_rng(2).random((2_000, 10))
    assert 0.035 < np.mean([holm(p).min() <= 0.05 for p in families]) < 0.065


def test_one_sample_above_another():
    assert two_samples([3, 4, 5, 6], [0, 1, 2, 2.5]) == pytest.approx(1 / 70)
    assert two_samples([0, 1, 2, 2.5], [3, 4, 5, 6]) == pytest.approx(1.0)


def test_the_calibration_error_is_that_of_a_naive_count():
    generator = np.random.default_rng(5)
    confidences = np.append(generator.random(300), [0.0, 1.0])
    correct = generator.random(302) < confidences**2
    naive = 0.0
    for low in np.arange(10) / 10:
        inside = (confidences >= low) & ((confidences < low + 0.1) | (low == 0.9))
        naive += inside.mean() * abs(confidences[inside].mean() - correct[inside].mean())
    assert expected_calibration_error(confidences, correct) == pytest.approx(naive)
    table = reliability([0.05, 0.95, 1.0], [True, True, False])
    assert table[0].tolist() == [1, 0.05, 1] and table[9].tolist() == [2, 0.975, 0.5]
    assert np.isnan(table[1:9, 1:]).all() and np.isnan(expected_calibration_error([], []))


# ----------------------------------------------------------------------- one sample above another, and what a test can see


def samples(kind, area, size, generator):
    """Two samples of which a value of the first is above one of the second with the probability `area`."""
    shift = 2**0.5 * NormalDist().inv_cdf(area)
    noise, other = generator.normal(size=(2, size))
    if kind == "shifted":
        return noise + shift, other
    if kind == "paired":
        scenes = generator.normal(scale=5, size=size)
        return scenes + noise + shift, scenes + other
    share = (area - 0.5) / 0.5  # of images in which the thing is seen
    return np.where(generator.random(size) < share, noise + 10, noise), other


def test_a_separation_is_the_naive_count_and_never_certain():
    generator = np.random.default_rng(3)
    higher, lower = generator.normal(0.4, size=30).round(1), generator.normal(size=25).round(1)
    found = separation(higher, lower)
    assert found.area == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in higher for b in lower]))
    assert found.low < found.area < found.high and found.sizes == (30, 25)
    paired = separation([2, 1, 0, 5], [1, 1, 1, 1], paired=True)
    assert paired.area == pytest.approx((2 + 0.5) / 4) and paired.sizes == (4,)
    for kind in ({}, {"paired": True}):
        clear, same = separation(np.arange(40) + 100, np.arange(40), **kind), separation(np.ones(40), np.ones(40), **kind)
        assert clear.area == 1 and 0.85 < clear.low < 0.96
        assert same.area == 0.5 and same.low < 0.42 and same.high > 0.58, "equal values are not a large sample"


@pytest.mark.parametrize("kind", ["shifted", "seen in some", "paired"])
@pytest.mark.parametrize("area", [0.5, 0.6])
def test_each_bound_is_wrong_as_often_as_its_level_says(kind, area):
    generator = np.random.default_rng(4)
    found = [separation(*samples(kind, area, 120, generator), paired=kind == "paired") for _ in range(1_500)]
    for wrong in ([one.low > area for one in found], [one.high < area for one in found]):
        assert 0.02 < np.mean(wrong) < 0.07


def test_a_stated_power_is_the_share_that_is_found():
    generator = np.random.default_rng(5)
    for kind, sizes in (("shifted", (80, 80)), ("paired", (80,))):
        area, paired = detectable_area(sizes), kind == "paired"
        found = [separation(*samples(kind, area, 80, generator), paired=paired).low > 0.5 for _ in range(800)]
        assert 0.75 < np.mean(found) < 0.86
        size = size_for_absence(0.6, paired=paired)
        found = [separation(*samples(kind, 0.5, size, generator), paired=paired) for _ in range(800)]
        assert 0.75 < np.mean([one.low > 0.4 and one.high < 0.6 for one in found]) < 0.87
    assert np.isnan(detectable_area((5, 5))), "too few for any effect"


@pytest.mark.parametrize("paired", [False, True])
def test_fewer_values_than_needed_can_show_nothing(paired):
    """One value less than the least size, and even the clearest outcome leaves the claim open."""
    size = size_for_presence(0.05, paired)
    for count, enough in ((size, True), (size - 1, False)):
        assert (separation(np.ones(count), np.zeros(count), paired=paired).low > 0.5) == enough
    size = size_for_absence(0.6, power=0, paired=paired)
    for count, enough in ((size, True), (size - 1, False)):
        found = separation(np.ones(count), np.ones(count), paired=paired)
        assert (found.low > 0.4 and found.high < 0.6) == enough
    assert size_for_absence(0.6, area=0.57) > size_for_absence(0.6) > size and size_for_absence(0.6, area=0.6) is None


def test_rows_that_belong_together_are_told_from_exchanged_ones():
    generator = np.random.default_rng(0)
    truth = np.eye(4)[generator.integers(4, size=60)]
    noise = generator.normal(size=(60, 4))
    assert exchanged_rows(noise + truth, truth) < 0.001
    assert exchanged_rows(np.ones((60, 4)) * [9, 0, 0, 0], truth) == 1.0, "the same of every row"
    few = [list(order) for order in permutations(range(4))]
    values, weights = generator.normal(size=(4, 2)), generator.normal(size=(4, 2))
    exact = np.mean([(values * weights[order]).sum() >= (values * weights).sum() - 1e-9 for order in few])
    assert exchanged_rows(values, weights, draws=20_000) == pytest.approx(exact, abs=0.02)
