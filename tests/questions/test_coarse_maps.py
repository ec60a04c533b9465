"""Maps from coarse to fine: what is asked is exact, what is alike is interpolated, and nothing else is asked."""

import pytest
import torch
from scipy.stats import spearmanr

from devil_hf.questions.coarse_maps import Kriging, attribute_coarsely


@pytest.fixture(scope="module")
def features(model):
    """Two images of three kinds of texture in patches, on grids of 20 x 20 and coarser."""
    torch.manual_seed(0)
    kinds = torch.randint(3, (2, 5, 5)).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    maps = []
    for index, channels in enumerate(model.backbone.channels):
        whole = torch.randn(3, channels)[kinds].permute(0, 3, 1, 2) + 0.2 * torch.randn(2, channels, 20, 20)
        maps.append(whole[:, :, :: 2**index, :: 2**index].contiguous())
    return maps


def ask(model, phrases, features, **options):
    """The map, and how many places were read."""
    read = []
    translate = model.translate

    def counting(pooled, *arguments, **given):
        read.extend(len(one) for one in pooled if one is not None)
        return translate(pooled, *arguments, **given)

    model.translate = counting
    try:
        found = attribute_coarsely(model, None, phrases, feature_maps=features, **options)
    finally:
        del model.translate
    return found.maps, sum(read)


def test_all_places_are_the_maps_of_the_model(model, phrases, features):
    for options in ({}, {"combine": "joint"}, {"combine": "informed", "window": 3}, {"window": {"layer1": 3}, "measure": "sum"}):
        exact = model.attribute(phrases=phrases, feature_maps=features, **options).maps
        found, _ = ask(model, phrases, features, refine=1, **options)
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("refine", "places"), [(0.25, 100), (0.4, 160)])
def test_a_share_of_the_places_is_asked_and_the_others_are_alike(model, phrases, features, refine, places):
    exact = model.attribute(phrases=phrases, feature_maps=features, layers="layer1").maps["layer1"]
    maps, read = ask(model, phrases, features, layers="layer1", refine=refine)
    assert read == 2 * places
    found = maps["layer1"]
    assert found.shape == exact.shape and found.dtype == exact.dtype
    same = (found - exact).abs().flatten(2).amax(dim=1) < 1e-4
    assert (same.sum(dim=1) >= places).all()
    torch.testing.assert_close(found[:, :, ::2, ::2], exact[:, :, ::2, ::2], atol=1e-4, rtol=1e-4)
    likeness = [spearmanr(a, b)[0] for a, b in zip(found.flatten(0, 1).flatten(1), exact.flatten(0, 1).flatten(1), strict=True)]
    bilinear = torch.nn.functional.interpolate(exact[:, :, ::2, ::2], (20, 20), mode="bilinear")
    assert sum(likeness) / len(likeness) > 0.9
    assert (found - exact).square().mean() < 0.5 * (bilinear - exact).square().mean()


@pytest.mark.parametrize(
    "options",
    [{"combine": "joint"}, {"layers": "layer1", "window": 3}, {"combine": "joint", "window": {"layer1": 3}, "measure": "sum"}],
)
def test_layers_together_and_windows_are_asked_at_a_share_of_the_places(model, phrases, features, options):
    (exact,) = model.attribute(phrases=phrases, feature_maps=features, **options).maps.values()
    maps, read = ask(model, phrases, features, refine=0.4, **options)
    (found,) = maps.values()
    assert read == 2 * 160 * (len(features) if "combine" in options else 1)
    torch.testing.assert_close(found[:, :, ::2, ::2], exact[:, :, ::2, ::2], atol=1e-4, rtol=1e-4)
    assert (((found - exact).abs().flatten(2).amax(dim=1) < 1e-4).sum(dim=1) >= 160).all()
    likeness = [spearmanr(a, b)[0] for a, b in zip(found.flatten(0, 1).flatten(1), exact.flatten(0, 1).flatten(1), strict=True)]
    assert sum(likeness) / len(likeness) > 0.9


def test_an_image_is_interpolated_by_itself(model, phrases, features):
    both, _ = ask(model, phrases, features, layers="layer1", refine=0.3)
    for image in range(2):
        one, _ = ask(model, phrases, [maps[image : image + 1] for maps in features], layers="layer1", refine=0.3)
        torch.testing.assert_close(both["layer1"][image : image + 1], one["layer1"], atol=1e-5, rtol=1e-5)


def test_small_maps_are_asked_as_a_whole_and_rules_combine_what_was_found(model, phrases, features):
    exact = model.attribute(phrases=phrases, feature_maps=features, layers=["layer2", "layer3"], combine="mean").maps["mean"]
    found, read = ask(model, phrases, features, layers=["layer2", "layer3"], combine="mean", refine=0.25)
    assert read == 2 * (100 + 25)
    torch.testing.assert_close(found["mean"], exact, atol=1e-4, rtol=1e-4)


def test_what_is_least_like_the_places_asked_is_the_least_certain():
    features = torch.tensor([[0.0, 0], [1, 0], [0, 0.1], [5, 5], [1, 0]]).double()
    kriging = Kriging(features, torch.tensor([0, 1]))
    uncertain = kriging.uncertainty()
    assert uncertain.argmax() == 3 and uncertain[[0, 1]].tolist() == [-1, -1] and uncertain[4] < uncertain[2] < uncertain[3]
    kriging.add(torch.tensor([3]))
    values = kriging.interpolate(torch.tensor([[1.0], [2], [9]]))
    torch.testing.assert_close(values[[0, 1, 3, 4], 0], torch.tensor([1.0, 2, 9, 2]).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize("refine", [0, 0.2, 1.1, float("nan"), -1])
def test_a_share_that_is_none_is_refused(model, phrases, features, refine):
    with pytest.raises(ValueError, match="refine="):
        attribute_coarsely(model, None, phrases, refine, feature_maps=features)


def test_unknown_rules_and_windows_of_layers_that_are_not_asked_are_refused(model, phrases, features):
    with pytest.raises(TypeError, match="scorer=1: coarse maps have their own"):
        attribute_coarsely(model, None, phrases, feature_maps=features, scorer=1)
    with pytest.raises(ValueError, match="combine="):
        attribute_coarsely(model, None, phrases, feature_maps=features, combine="none")
    with pytest.raises(ValueError, match="window"):
        attribute_coarsely(model, None, phrases, feature_maps=features, layers="layer1", window={"layer2": 3})
