"""Each statistic is that of a naive count, or of the library that has it."""

import numpy as np
import pytest
from scipy.stats import permutation_test

from devil_hf.statistics import (
    expected_calibration_error,
    holm,
    paired_swaps,
    reliability,
    roc_area,
    roc_areas,
    sign_flip,
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
