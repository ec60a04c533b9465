"""Layers are asked for in one way everywhere: names and whole numbers of any kind; everything else is refused with the names."""

import numpy as np
import pytest
import torch
from transformers import pipeline

from devil_hf.build.sources import select_layers
from devil_hf.evaluation.maps.combining import layer_evidence
from devil_hf.model.pooling_devil import resolve_layers

ONE = {
    "name": "layer3",
    "index": 2,
    "negative": -2,
    "numpy": np.int64(2),
    "small numpy": np.uint8(2),
    "torch": torch.tensor(2),
    "list": ["layer3"],
    "tuple": (2,),
    "array": np.array([2]),
    "tensor": torch.tensor([-2]),
}
TWO = {
    "names": ["layer2", "layer4"],
    "mixed": ("layer2", -1),
    "array": np.array([1, 3]),
    "tensor": torch.tensor([1, -1]),
    "numbers": [np.int32(1), torch.tensor(3)],
}
WRONG = {
    "nothing": [],
    "an empty array": np.array([], dtype=int),
    "unknown": "layer9",
    "unknown among known": ["layer1", "layer9"],
    "beyond the last": 4,
    "beyond the first": -5,
    "true": True,
    "true of numpy": np.True_,
    "true of torch": torch.tensor(True),
    "a mask": torch.tensor([True, False, False, False]),
    "a float": 1.0,
    "a float of numpy": np.float64(1),
    "a float of torch": torch.tensor(1.0),
    "twice": ["layer1", "layer1"],
    "twice in two ways": ["layer1", 0],
    "none among names": ["layer1", None],
    "bytes": b"layer1",
    "nested": [["layer1", "layer2"]],
}


def calls(model, pixel_values, phrases, processor, images):
    """Every public call that reads layers, as a function of them; what it returns is compared by its print."""
    features = model.extract_features(pixel_values)

    def prints(*tensors):
        return [None if tensor is None else tensor.double().round(decimals=4).tolist() for tensor in tensors]

    def described(layers):
        output = model.describe(layers=layers, feature_maps=features, max_new_tokens=2)
        return prints(output.sequences, output.layer_index)

    def piped(layers):
        pipe = pipeline("vision-feature-description", model=model, processor=processor)
        return str(pipe(images[0], layers=layers, phrases=["a dog"], max_new_tokens=2)["descriptions"])

    return {
        "resolve_layers": lambda layers: resolve_layers(layers, model.layer_names),
        "select_layers": lambda layers: select_layers(model.backbone, layers).layers,
        "extract_features": lambda layers: prints(*model.extract_features(pixel_values, layers)),
        "ask": lambda layers: prints(model.ask(feature_maps=features, layers=layers)),
        "generate": lambda layers: prints(model.generate(feature_maps=features, layers=layers, max_new_tokens=2)),
        "score": lambda layers: prints(model.score(feature_maps=features, layers=layers, **phrases).evidence),
        "attribute": lambda layers: list(model.attribute(phrases=phrases, feature_maps=features, layers=layers).maps),
        "layer_evidence": lambda layers: prints(layer_evidence(model, features, phrases, layers)),
        "describe": described,
        "pipeline": piped,
    }


@pytest.fixture(scope="module")
def asked(model, pixel_values, phrases, processor, images):
    return calls(model, pixel_values[:1], phrases, processor, images)


CALLS = [
    "resolve_layers",
    "select_layers",
    "extract_features",
    "ask",
    "generate",
    "score",
    "attribute",
    "layer_evidence",
    "describe",
    "pipeline",
]


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_name_a_layer_asks_the_same(asked, call):
    assert set(CALLS) == set(asked)
    for ways in (ONE, TWO):
        expected, *others = (asked[call](layers) for layers in ways.values())
        assert all(other == expected for other in others)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_layer_is_refused_with_the_names_that_there_are(asked, call):
    for layers in WRONG.values():
        with pytest.raises(ValueError, match="layer1"):
            asked[call](layers)


def test_windows_locations_and_directions_name_layers_in_the_same_way(model, pixel_values, phrases):
    features = model.extract_features(pixel_values[:1])
    vectors = torch.randn(2, model.backbone.channels[2])
    expected = model.attribute(phrases=phrases, feature_maps=features, layers="layer3", window={"layer3": 3}).maps["layer3"]
    directions = model.describe_directions(vectors, "layer3", max_new_tokens=2).sequences
    places = model.describe(feature_maps=features, locations={"layer3": [(0, 1)]}, max_new_tokens=2).sequences
    for name in ("layer3", 2, -2, np.int64(2)):
        found = model.attribute(phrases=phrases, feature_maps=features, layers=name, window={name: np.int64(3)}).maps
        assert torch.equal(found["layer3"], expected)
        assert torch.equal(model.describe_directions(vectors, name, max_new_tokens=2).sequences, directions)
        found = model.describe(feature_maps=features, locations={name: [(0, 1)]}, max_new_tokens=2)
        assert torch.equal(found.sequences, places)
    for name in ("layer9", True, 1.0, 9):
        for call in (
            lambda name=name: model.attribute(phrases=phrases, feature_maps=features, window={name: 3}),
            lambda name=name: model.describe_directions(vectors, name),
            lambda name=name: model.describe(feature_maps=features, locations={name: [(0, 1)]}),
        ):
            with pytest.raises(ValueError, match="layer1"):
                call()
    with pytest.raises(ValueError, match="one layer is needed here, not 2"):
        model.describe_directions(vectors, ["layer1", "layer3"])
    with pytest.raises(ValueError, match="window="):
        model.attribute(phrases=phrases, feature_maps=features, window=2.0)


def test_feature_maps_that_lack_a_layer_are_refused_by_its_name(model, pixel_values, phrases):
    partial = model.extract_features(pixel_values[:1], ["layer3"])
    assert [maps is None for maps in partial] == [True, True, False, True]
    for call in (
        lambda: model.ask(feature_maps=partial),
        lambda: model.generate(feature_maps=partial),
        lambda: model.score(feature_maps=partial, **phrases),
        lambda: model.attribute(feature_maps=partial, phrases=phrases),
        lambda: model.attribute(feature_maps=partial, phrases=phrases, combine="joint"),
        lambda: model.describe(feature_maps=partial),
        lambda: layer_evidence(model, partial, phrases),
        lambda: model(feature_maps=partial),
    ):
        with pytest.raises(ValueError, match="feature_maps hold nothing of layer 'layer1'"):
            call()
    assert torch.equal(model.ask(feature_maps=partial, layers="layer3"), model.ask(pixel_values[:1], layers=model.layer_names[2]))
    with pytest.raises(ValueError, match="one for each of"):
        model.ask(feature_maps=partial[:2])


def test_a_region_that_vanishes_is_hidden_whoever_asks(model, pixel_values):
    regions = torch.zeros(2, *pixel_values.shape[-2:])
    regions[0, :40, :60] = 1.0  # the second is empty, and vanishes on every layer
    expected = model.ask(pixel_values[:2], regions=regions)
    torch.testing.assert_close(model(pixel_values[:2], regions=regions).prefix, expected)
    torch.testing.assert_close(expected[1:], model.null_prefix())
    weights = [torch.full((2, 1, *maps.shape[-2:]), 1.0) for maps in model.extract_features(pixel_values[:2])]
    for given in (
        {"location_weights": weights},
        {"pooled_features": [torch.zeros(2, c) for c in model.backbone.channels]},
    ):
        with pytest.raises(ValueError, match="both say where to look"):
            model(pixel_values[:2], regions=regions, **given)


def test_the_null_prefix_is_scored_once_a_call(model, pixel_values, phrases, monkeypatch):
    counted = []
    null = type(model).null_prefix
    monkeypatch.setattr(type(model), "null_prefix", lambda self: counted.append(1) or null(self))
    model.attribute(pixel_values[:1], phrases, combine="informed")
    assert len(counted) == 1
