"""Measures of maps agree with slow and with foreign implementations, and reward nothing that a map does not know."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from devil_hf.evaluation.maps.measures import (
    LEVELS,
    centre_prior,
    choice,
    energy_pointing,
    enlarge,
    overlaps,
    pixel_precision,
    relative,
    tile_crops,
)
from devil_hf.evaluation.maps.pointing import chance_pointing, hit_cells, pointing
from devil_hf.evaluation.maps.scores import Sample, summarise
from devil_hf.statistics import bootstrap

SIZE = (24, 32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def mask():
    mask = np.zeros(SIZE, dtype=bool)
    mask[4:13, 9:20] = True
    return mask


def iou_at(values, mask):
    inside, joined = overlaps(values, mask).T
    return inside / joined


def test_a_perfect_map_scores_one_on_everything(mask):
    perfect = mask.astype(float)
    assert pointing(perfect, mask) == energy_pointing(perfect, mask) == pixel_precision(perfect, mask) == 1
    assert (iou_at(perfect, mask)[1:] == 1).all()
    for at in range(2):
        assert choice(np.stack([perfect, 1 - perfect]), np.stack([mask, ~mask]), at) == 1


def test_a_constant_map_scores_chance(mask):
    area = mask.mean()
    for value in (3.0, 0.1):
        flat = np.full(SIZE, value)
        assert energy_pointing(flat, mask) == pytest.approx(area)
        assert pixel_precision(flat, mask) == pytest.approx(area)
        assert iou_at(flat, mask) == pytest.approx(np.full(len(LEVELS), area))
    assert pointing(np.zeros((3, 4)), mask) == pytest.approx(chance_pointing((3, 4), mask))
    apart = np.stack([np.roll(mask, 8 * at, axis=1) & (np.arange(32) // 8 == (1 + at) % 4) for at in range(4)])
    assert [choice(np.zeros((4, *SIZE)), apart, at) for at in range(4)] == [0.25] * 4


def test_a_map_that_never_speaks_for_its_phrase_points_no_energy_at_it(mask):
    assert energy_pointing(-np.ones(SIZE), mask) == 0


def test_pointing_is_the_hit_of_the_maximum_and_ties_share(rng, mask):
    for _ in range(30):
        values = rng.normal(size=(6, 8))
        hits = hit_cells((6, 8), mask)
        assert pointing(values, mask) == float(hits.flat[values.argmax()])
    top = values.max() + 1
    values[hits] = top
    values.flat[int(np.flatnonzero(~hits)[0])] = top  # several maxima, one of them beside the object
    assert pointing(values, mask) == hits.sum() / (hits.sum() + 1)


@pytest.mark.parametrize("levels", [3, 400])
def test_average_precision_is_scikit_learns(rng, levels, mask):
    from sklearn.metrics import average_precision_score

    for _ in range(5):
        values = rng.integers(0, levels, SIZE) + 2.0 * mask  # few levels: many ties
        assert pixel_precision(values, mask) == pytest.approx(average_precision_score(mask.ravel(), values.ravel()))


def test_overlaps_agree_with_a_loop_over_levels(rng, mask):
    values = rng.normal(size=SIZE).round(1) + mask
    for level, (inside, joined) in zip(LEVELS, overlaps(values, mask), strict=True):
        chosen = relative(values) >= level
        assert (inside, joined) == ((chosen & mask).sum(), (chosen | mask).sum())


def test_energy_agrees_with_a_loop(rng, mask):
    values = rng.normal(size=SIZE)
    inside = total = 0.0
    for place in product(range(SIZE[0]), range(SIZE[1])):
        mass = max(values[place], 0)
        total += mass
        inside += mass * mask[place]
    assert energy_pointing(values, mask) == pytest.approx(inside / total)


def test_choice_agrees_with_a_loop_and_asks_only_between_objects(rng, mask):
    values, masks = rng.normal(size=(3, *SIZE)), np.stack([mask, ~mask, np.roll(mask, 14, axis=1)])
    assert not (masks[0] & masks[2]).any()
    assert choice(values[:1], masks[:1], 0) is None and choice(values, np.stack([mask] * 3), 0) is None
    for phrase, against in ((0, (1, 2)), (1, (0,)), (2, (0,))):
        places = list(zip(*np.nonzero(masks[phrase]), strict=True))
        won = [all(values[phrase, i, j] > values[other, i, j] for other in against) for i, j in places]
        assert choice(values, masks, phrase) == pytest.approx(np.mean(won))


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 7), (24, 32)])
def test_maps_are_enlarged_as_torch_does(rng, grid):
    values = rng.normal(size=(2, *grid))
    expected = F.interpolate(torch.tensor(values)[None], SIZE, mode="bilinear", align_corners=False)[0].numpy()
    assert enlarge(values, SIZE) == pytest.approx(expected)


def test_the_centre_prior_is_highest_in_the_middle():
    prior = centre_prior((5, 7))
    assert np.unravel_index(prior.argmax(), prior.shape) == (2, 3) and prior == pytest.approx(prior[::-1, ::-1])


@pytest.mark.parametrize("edge", [8, 14, 24, 28, 40, 48, 56])
def test_the_centre_prior_of_a_board_is_that_of_each_of_its_images(edge):
    board = centre_prior((edge, edge), tiles=2)
    half = edge // 2
    alone = centre_prior((half, half))
    assert (alone == alone.max()).sum() == (1 if half % 2 else 4)
    for row, column in product((0, half), (0, half)):
        assert (board[row : row + half, column : column + half] == alone).all()  # ties, too, to the last bit


def test_the_centre_prior_of_a_board_that_cannot_be_halved_favours_no_image():
    for edge in (7, 9, 25):
        board = centre_prior((edge, edge), tiles=2)
        assert (board == board[::-1]).all() and (board == board[:, ::-1]).all()
        top = board == board.max()
        assert top[: edge // 2, : edge // 2].any() and not top[edge // 2].any()


def test_boards_hold_every_image_in_its_own_quarter(rng):
    crops = rng.normal(size=(3, 3, 8, 8))
    board = tile_crops(crops)
    assert board.shape == (3, 8, 8) and (board[:, 4:, 4:] == 0).all()
    quarters = (board[:, :4, :4], board[:, :4, 4:], board[:, 4:, :4])
    for quarter, crop in zip(quarters, crops, strict=True):
        expected = F.avg_pool2d(torch.tensor(crop)[None], 2)[0].numpy()
        assert quarter == pytest.approx(expected)
    assert tile_crops(crops[:1]) is not None and (tile_crops(crops[:1]) == crops[0]).all()
    with pytest.raises(ValueError, match="5 images do not fit"):
        tile_crops(np.zeros((5, 8, 8)))


def test_means_are_over_phrases_and_intervals_over_images(rng):
    samples = [Sample(n // 3, "dog", ("class",), {"pointing": float(n % 2)}) for n in range(60)]
    value, (low, high) = summarise(samples, 500, 0)["pointing"]
    assert value == 0.5 and low < 0.5 < high
    lucky = [Sample(0, "dog", ("class",), {"pointing": 1.0})] * 50 + [Sample(1, "dog", ("class",), {"pointing": 0.0})]
    assert summarise(lucky, 500, 0)["pointing"][1] == (0.0, 1.0)  # two images, however many phrases they have


def test_miou_pools_the_images_of_a_class_before_it_averages_classes(mask):
    half = np.zeros(SIZE)
    half[:, :16] = 1
    parts = [("dog", half, mask), ("dog", mask * 1.0, mask), ("cat", 1.0 - mask, ~mask)]
    samples = [
        Sample(n, phrase, ("class",), {"miou": overlaps(values, truth) / truth.size})
        for n, (phrase, values, truth) in enumerate(parts)
    ]
    dogs = ((half > 0) & mask).sum() + mask.sum(), ((half > 0) | mask).sum() + mask.sum()
    assert summarise(samples, 50, 0)["miou"][0] == pytest.approx((dogs[0] / dogs[1] + 1) / 2)


def test_bootstrap_intervals_repeat_and_narrow_with_more_images(rng):
    few, many = rng.random(20), rng.random(2_000)
    assert bootstrap(few, np.ones(20)) == bootstrap(few, np.ones(20))
    width = [high - low for low, high in (bootstrap(few, np.ones(20)), bootstrap(many, np.ones(2_000), 300))]
    assert width[1] < width[0] / 5
    # For a mean of many, the interval is the textbook's.
    low, high = bootstrap(many, np.ones(2_000), 2_000)
    assert (high - low) / 2 == pytest.approx(1.96 * many.std() / 2_000**0.5, rel=0.1)


@pytest.mark.parametrize("bad", [np.full(SIZE, np.nan), np.zeros((2, *SIZE))])
def test_maps_that_cannot_be_judged_are_refused(bad, mask):
    for metric in (pointing, energy_pointing, pixel_precision, overlaps):
        with pytest.raises(ValueError, match="two dimensions"):
            metric(bad, mask)


def test_empty_masks_are_refused():
    for metric in (pointing, energy_pointing, pixel_precision, overlaps):
        with pytest.raises(ValueError, match="no object"):
            metric(np.zeros(SIZE), np.zeros(SIZE, dtype=bool))
