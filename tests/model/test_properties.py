"""Whatever is asked of the model and processor: finite numbers of the promised shape, or an error that names what is wrong."""

import io

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image

from devil_hf.model.image_processing_devil import SETTINGS as ALL_SETTINGS
from devil_hf.model.image_processing_devil import load_images
from devil_hf.model.outputs_devil import AttributionOutput, word_evidence
from devil_hf.model.pipeline_devil import VisionFeatureDescriptionPipeline

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from(
        [np.int64(1), torch.tensor(1), np.array([1, 2]), torch.ones(2, 2), {}, {"layer1": 3}, b"x", 10**30, "all", "x"]
    ),
    st.floats(),
    st.text(max_size=4),
)
NAMES = ["layer1", "layer2", "layer3", "layer4"]
LAYERS = st.one_of(
    st.none(),
    st.integers(-6, 6),
    st.sampled_from([*NAMES, "all", ""]),
    st.lists(st.sampled_from([*NAMES, -1, 0]), max_size=3),
    ANYTHING,
)
NUMBER = st.one_of(st.floats(0, 1), st.sampled_from([-1.0, 2.0, 1e38, float("nan"), float("inf")]))
PLACES = st.one_of(st.lists(st.tuples(st.integers(-1, 6), st.integers(-1, 6)), max_size=3), ANYTHING)
FORMS = st.sampled_from([lambda t: t, lambda t: t.numpy(), lambda t: t.tolist(), lambda t: t.bfloat16(), lambda t: t.double()])


def answered(call, names):
    """What a call answers, or None where it refuses and says what; everything else is a fault."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        said = str(error)
    assert any(name in said for name in names), f"the error names none of {names}: {said}"
    return None


def check_prefix(prefix):
    if prefix is not None:
        assert prefix.ndim == 3 and len(prefix) and torch.isfinite(prefix).all()


@pytest.fixture(scope="module")
def features(model, pixel_values):
    return model.extract_features(pixel_values)


@given(layers=LAYERS, locations=PLACES, window=st.one_of(st.sampled_from([1, 3, 5]), ANYTHING))
@torch.no_grad()
def test_any_layers_places_and_windows(layers, locations, window, model, features):
    check_prefix(
        answered(
            lambda: model.ask(layers=layers, locations=locations, window=window, feature_maps=features),
            ["layer", "location", "window"],
        )
    )


@given(data=st.data())
@torch.no_grad()
def test_any_regions(data, model, pixel_values, features):
    shape = data.draw(
        st.one_of(
            st.sampled_from([(3, 160, 160), (3, 2, 160, 160), (3, 40, 40)]), st.lists(st.sampled_from([0, 1, 3, 20]), max_size=4)
        )
    )
    regions = torch.full(tuple(shape), data.draw(NUMBER))
    if regions.ndim >= 3 and regions.numel():
        regions[..., : data.draw(st.integers(0, 160)), :] = data.draw(NUMBER)
    regions = data.draw(st.one_of(st.just(data.draw(FORMS)(regions)), ANYTHING))
    given_ = {"feature_maps": features} if data.draw(st.booleans()) else {"pixel_values": pixel_values}
    check_prefix(answered(lambda: model.ask(**given_, regions=regions), ["region"]))


@given(data=st.data())
@torch.no_grad()
def test_any_weights_and_layer_masks(data, model, features):
    grid = tuple(features[3].shape[-2:])
    weights = torch.rand(
        *data.draw(st.sampled_from([(1,), (2,), (3, 2), (0,), (5, 1)])), *data.draw(st.sampled_from([grid, (2, 2)]))
    )
    if data.draw(st.booleans()):
        weights = weights / weights.sum(dim=(-2, -1), keepdim=True)
    if data.draw(st.booleans()):
        weights = weights * data.draw(NUMBER)
    weights = data.draw(st.sampled_from([None, [None, None, None, data.draw(FORMS)(weights)], [weights], weights, 3]))
    mask = data.draw(
        st.one_of(
            st.none(),
            st.lists(st.booleans(), max_size=5),
            st.sampled_from([torch.zeros(3, 4), np.ones((6, 4)), torch.zeros(2, 4)]),
            ANYTHING,
        )
    )
    check_prefix(
        answered(
            lambda: model.ask(layers=3, feature_maps=features, location_weights=weights, layer_mask=mask),
            ["weights", "layer_mask"],
        )
    )


@given(data=st.data())
@torch.no_grad()
def test_any_tokens_and_masks(data, model, features, pixel_values):
    rows, width = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    ids = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(-1, 330), min_size=width, max_size=width), min_size=rows, max_size=rows))
    )
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=rows, max_size=rows))
    )
    if data.draw(st.booleans()) and mask.ndim == 2:
        mask = mask.sort(dim=1, descending=True).values
    ids, mask = (data.draw(st.one_of(st.just(data.draw(FORMS)(one)), ANYTHING)) for one in (ids, mask))
    names = ["input_ids", "attention_mask", "token", "captions"]
    score = answered(lambda: model.score(feature_maps=features, input_ids=ids, attention_mask=mask, layers=-1), names)
    if score is not None:
        read = torch.as_tensor(ids if isinstance(ids, torch.Tensor) else np.array(ids))
        mask = (
            torch.ones_like(read) if mask is None else torch.as_tensor(mask if isinstance(mask, torch.Tensor) else np.array(mask))
        )
        for row in range(len(read)):
            alone = model.score(feature_maps=features, input_ids=read[row][mask[row] > 0][None], layers=-1)
            torch.testing.assert_close(score.log_probs[:, row], alone.log_probs[:, 0], atol=1e-4, rtol=1e-4)
    output = answered(lambda: model(pixel_values, ids, mask), names)
    assert output is None or output.loss is None or torch.isfinite(output.loss)


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "guidance": st.one_of(st.floats(0, 5), ANYTHING),
            "num_beams": st.one_of(st.integers(1, 3), st.sampled_from([0, -1, 2.5, "two", None])),
            "max_new_tokens": st.one_of(st.integers(1, 4), st.sampled_from([0, -5, 2.5, 10**6, "x"])),
            "max_length": st.sampled_from([-1, 0, 3, 12, 10**6, "x"]),
            "num_return_sequences": st.sampled_from([0, 1, 2, -1]),
            "do_sample": st.booleans(),
            "temperature": st.sampled_from([0.5, 0.0, -1.0]),
            "top_p": st.sampled_from([0.5, 1.5]),
            "input_ids": st.just(torch.ones(1, 1, dtype=torch.long)),
            "beams": st.just(3),
        },
    )
)
@torch.no_grad()
def test_any_options_of_generation(options, model, features):
    names = [*options, "new tokens", "max_length", "generation", "num_beams", "beam", "greedy", "GenerationConfig", "sequences"]
    ids = answered(lambda: model.generate(feature_maps=features, layers=-1, **options), names)
    if ids is not None:
        assert ids.ndim == 2 and ids.shape[0] == 3 * options.get("num_return_sequences", 1) and ids.shape[1] >= 1


@given(
    layers=LAYERS,
    window=st.one_of(st.just(1), ANYTHING),
    measure=st.sampled_from(["sum", "evidence", "loud", None]),
    combine=st.sampled_from([None, "mean", "informed", "joint", "x", []]),
    chunk=st.one_of(st.none(), ANYTHING),
)
@torch.no_grad()
def test_any_maps(layers, window, measure, combine, chunk, model, features, phrases):
    output = answered(
        lambda: model.attribute(
            phrases=phrases,
            feature_maps=features,
            layers=layers,
            window=window,
            measure=measure,
            combine=combine,
            chunk_size=chunk,
        ),
        ["layer", "window", "measure", "combine", "chunk_size"],
    )
    if output is not None:
        assert output.maps and all(torch.isfinite(one).all() and one.shape[:2] == (3, 4) for one in output.maps.values())


@given(
    layers=LAYERS,
    locations=st.one_of(PLACES, st.dictionaries(st.sampled_from([*NAMES, -1]), PLACES, max_size=2)),
    window=st.one_of(st.just(1), ANYTHING),
)
@torch.no_grad()
def test_any_descriptions(layers, locations, window, model, processor, features):
    output = answered(
        lambda: model.describe(
            layers=layers,
            locations=locations,
            window=window,
            feature_maps=[one[:1] for one in features],
            max_new_tokens=2,
            evidence=True,
        ),
        ["layer", "location", "window"],
    )
    if output is not None:
        rows = processor.post_process_descriptions(output)
        assert len(rows) == len(output.sequences) and all(np.isfinite(row["evidence"]) for row in rows)


@given(
    text=st.one_of(
        st.text(max_size=12),
        st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["red <pad>", "<eos>"])), max_size=3),
        ANYTHING,
    ),
    carrier=st.one_of(st.none(), st.text(max_size=4), ANYTHING),
    max_length=st.one_of(st.none(), ANYTHING),
)
def test_any_phrases(text, carrier, max_length, processor):
    names = ["phrase", "text", "max_length", "carrier", "nothing to process"]
    tokens = answered(lambda: processor(text=text, carrier=carrier, max_length=max_length), names)
    if tokens is not None:
        special = torch.tensor(processor.tokenizer.all_special_ids)
        read = tokens["input_ids"][tokens["attention_mask"].bool()]
        assert not torch.isin(read, special).any() and (tokens["attention_mask"].sum(dim=1) > 0).all()


@st.composite
def pictures(draw):
    width, height = draw(st.sampled_from([(1, 1), (1, 300), (400, 1), (17, 5), (64, 48)]))
    mode = draw(st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "PA"]))
    picture = Image.new(mode, (width, height))
    kind = draw(st.sampled_from(["as it is", "rotated", "animated", "array", "path text"]))
    if kind == "rotated":
        picture.getexif()[274] = draw(st.integers(-1, 70000))
    if kind == "animated":
        content = io.BytesIO()
        Image.new("RGB", (width, height)).save(
            content, "GIF", save_all=True, append_images=[Image.new("RGB", (width, height), "red")]
        )
        picture = Image.open(content)
    if kind == "array":
        shape = draw(
            st.sampled_from(
                [(height, width), (3, height, width), (height, width, 3), (height, width, 7), (0, 3), (2, height, width, 3)]
            )
        )
        kinds = draw(st.sampled_from([np.uint8, np.uint16, np.int64, np.float32, np.float64, bool, complex, object]))
        picture = np.full(shape, draw(st.sampled_from([0, 1, 0.5, 255, 65535, -1, np.nan])), dtype=np.float64).astype(kinds)
    return "no such file" if kind == "path text" else picture


@pytest.mark.filterwarnings("ignore")
@given(picture=st.one_of(pictures(), ANYTHING))
def test_any_picture(picture, processor):
    def call():
        try:
            return processor(images=picture)["pixel_values"]
        except OSError as error:
            raise ValueError(str(error)) from error

    pixel_values = answered(call, ["image", "nothing to process", "no such file", "cannot read"])
    if pixel_values is not None:
        assert pixel_values.shape[1:] == (3, 160, 160) and torch.isfinite(pixel_values).all()


SIZES = st.one_of(st.integers(-1, 300), st.lists(st.sampled_from([0, 1, 64, 10**7]), max_size=3), ANYTHING)
SHARES = st.one_of(NUMBER, st.sampled_from([1, 1e-300, 1e9]), ANYTHING)
CHANNELS = st.one_of(st.lists(NUMBER, max_size=4), st.sampled_from([[1, 1, 1], [0, 0, 0], (0.5, 0.5, 0.5)]), ANYTHING)
CROPS = {"crop_size": SIZES, "crop_pct": SHARES, "crop_mode": st.one_of(st.sampled_from(["squash", "border"]), ANYTHING)}


@pytest.mark.filterwarnings("ignore")
@given(
    settings=st.fixed_dictionaries(
        {},
        optional=CROPS
        | {
            "resample": ANYTHING,
            "image_mean": CHANNELS,
            "image_std": CHANNELS,
            "return_tensors": st.sampled_from(["pt", "np", None]),
        },
    )
)
def test_any_settings_of_a_call(settings, processor, images):
    images_to_pixels = processor.image_processor
    names = [*settings, "crop_size"]
    found = answered(lambda: images_to_pixels(images[0], **{"return_tensors": "pt"} | settings)["pixel_values"], names)
    if found is None:
        return
    assert np.isfinite(np.asarray(found)).all()
    own = {name: getattr(images_to_pixels, name) if settings.get(name) is None else settings[name] for name in ALL_SETTINGS}
    edges = images_to_pixels.geometry((5, 5), own["crop_size"]).crop_size
    assert np.asarray(found).shape[-2:] == edges, "what is given is what counts"
    again = type(images_to_pixels)(**own)(images[0], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(np.asarray(found), np.asarray(again), err_msg="of a call as of a processor")


@given(
    edges=st.tuples(*[st.one_of(st.integers(-1, 9000), st.sampled_from([np.int64(3), torch.tensor(4), 10**30, 5.5, None]))] * 2),
    settings=st.fixed_dictionaries({}, optional=CROPS),
)
def test_any_geometry(edges, settings, processor):
    found = answered(lambda: processor.image_processor.geometry(edges, **settings), ["image_size", "crop_size", *settings])
    if found is not None:
        assert min(*found.resized_size, *found.crop_size) >= 1 and found.image_size == tuple(map(int, edges))
        assert np.isfinite(found.image_to_crop(0, 0)).all()


@given(data=st.data(), layers=LAYERS)
@torch.no_grad()
def test_any_pixel_values(data, layers, model, pixel_values):
    shape = data.draw(
        st.one_of(st.sampled_from([(1, 3, 160, 160), (1, 3, 33, 70)]), st.lists(st.sampled_from([0, 1, 3]), max_size=4))
    )
    pixels = torch.full(tuple(shape), data.draw(NUMBER))
    pixels = data.draw(st.one_of(st.just(data.draw(FORMS)(pixels)), ANYTHING))
    names = ["pixel_values", "layer", "features", "backbone cannot read", "nothing to look at"]
    maps = answered(lambda: model.extract_features(pixels, layers), names)
    assert maps is None or all(one is None or (one.ndim == 4 and torch.isfinite(one).all()) for one in maps)


@given(data=st.data(), layer=LAYERS, guidance=st.one_of(st.just(1.0), ANYTHING), evidence=st.booleans())
@torch.no_grad()
def test_any_directions(data, layer, guidance, evidence, model, processor):
    width = model.backbone.channels[-1]
    shape = data.draw(st.sampled_from([(1, width), (2, width), (width,), (0, width), (1, 3), ()]))
    vectors = torch.full(shape, data.draw(NUMBER))
    vectors = data.draw(st.one_of(st.just(data.draw(FORMS)(vectors)), ANYTHING))
    call = lambda: model.describe_directions(vectors, layer, evidence, guidance, max_new_tokens=2)  # noqa: E731
    output = answered(call, ["vectors", "layer", "guidance", "features", "prefix"])
    if output is not None:
        rows = processor.post_process_descriptions(output)
        assert len(rows) == len(vectors) and all(not evidence or np.isfinite(row["evidence"]) for row in rows)


@given(
    data=st.data(),
    sizes=st.one_of(st.lists(st.tuples(st.integers(-1, 90), st.integers(-1, 90)), min_size=1, max_size=4), ANYTHING),
)
def test_any_maps_in_images_of_any_size(data, sizes, processor):
    shape = data.draw(st.sampled_from([(2, 3, 5, 5), (1, 1, 1, 1), (2, 0, 5, 5), (2, 3, 5), (0, 1, 2, 2)]))
    maps = torch.full(shape, data.draw(NUMBER))
    outputs = data.draw(st.one_of(st.just({"layer1": data.draw(FORMS)(maps)}), ANYTHING))
    names = ["maps", "image_size", "target_sizes", "layer"]
    placed = answered(lambda: processor.post_process_attribution(outputs, target_sizes=sizes), names)
    if placed is not None:
        assert all(one.shape[1:] == size for values in placed.values() for one, size in zip(values, sizes, strict=True))


def mostly(good, other=ANYTHING):
    return st.sampled_from([good, good, good, other]).flatmap(lambda one: one)


IMAGES = st.sampled_from([Image.new("RGB", (64, 48), "teal"), Image.new("L", (9, 40)), np.zeros((8, 8, 3), dtype=np.uint8)])


@pytest.mark.filterwarnings("ignore")
@given(data=st.data(), picture=mostly(IMAGES | st.lists(IMAGES, min_size=2, max_size=2), pictures() | ANYTHING))
def test_any_overlay(data, picture, processor):
    """Pictures of the size of the images, on a scale that holds every value of the maps, or an error."""
    several = 2 if isinstance(picture, list) and len(picture) == 2 else 1
    good, wrong = [(several, 2, 5, 5), (several, 1, 1, 1)], [(2, 2, 3, 4), (1, 0, 5, 5), (1, 2, 5), (0, 1, 2, 2)]
    shape = data.draw(mostly(st.sampled_from(good), st.sampled_from(wrong)))
    value, other = (data.draw(NUMBER | st.sampled_from([-1e-45, 3e38, -3e38, 1e300])) for _ in range(2))
    maps = torch.full(shape, value, dtype=torch.float64)
    maps[..., : data.draw(st.integers(0, 3))] = other
    kinds = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64)
    forms = [lambda one, kind=kind: one.to(kind) for kind in kinds]
    maps = data.draw(st.sampled_from([*forms, lambda one: one.float().requires_grad_(), lambda one: one.numpy()]))(maps)
    measure = data.draw(st.sampled_from(["evidence", "sum", None]))
    whole = [{"layer1": maps}, {"layer1": maps, 3: maps}, AttributionOutput(maps={"layer1": maps}, measure=measure)]
    outputs = data.draw(mostly(st.sampled_from(whole), st.just({}) | ANYTHING))

    def call():
        try:
            return load_images(picture), processor.overlay(outputs, picture)
        except OSError as error:
            raise ValueError(str(error)) from error

    found = answered(call, ["image", "map", "layer", "no such file", "cannot read", "colour scale", "model.attribute"])
    if found is None:
        return
    event("answered")
    images, overlays = found
    low, high = overlays.value_range
    assert np.isfinite([low, high]).all() and low < high
    finite = maps[torch.isfinite(maps)]
    assert not finite.numel() or (low <= float(finite.min()) and float(finite.max()) <= high)
    assert low == -high or (measure == "sum" and outputs is whole[-1])
    for rows in overlays.pictures.values():
        for image, row in zip(images, rows, strict=True):
            assert len(row) == shape[1]
            for one in row:
                assert (one.mode, one.size) == ("RGB", image.size)
                if finite.numel() == maps.numel() and low == -high and float(finite.min()) == high and image.size == (64, 48):
                    red, _, blue = np.asarray(one)[24, 32].tolist()
                    assert red > blue, "the highest value of the scale is warm"


@pytest.mark.filterwarnings("ignore")
@given(
    inputs=mostly(IMAGES | st.lists(IMAGES, max_size=3), st.lists(IMAGES, max_size=2).map(tuple) | pictures() | ANYTHING),
    options=st.fixed_dictionaries(
        {"max_new_tokens": st.just(2)},
        optional={
            "layers": mostly(st.sampled_from(["layer4", ["layer1", -1], "all", None]), LAYERS),
            "window": mostly(st.sampled_from([1, 3])),
            "locations": mostly(st.just([(0, 0), (4, 1)]), PLACES),
            "phrases": mostly(st.sampled_from(["a dog", ["red", "a cat"]]), st.text(max_size=4) | ANYTHING),
            "carrier": mostly(st.just("the")),
            "measure": mostly(st.sampled_from(["sum", "evidence"]), st.just("loud")),
            "combine": mostly(st.sampled_from(["mean", "joint"]), st.just("x")),
            "evidence": st.booleans(),
            "batch_size": st.sampled_from([1, 2, 3]),
        },
    ),
)
@torch.no_grad()
def test_any_pipeline(inputs, options, model, processor):
    """Words and maps of every image, in a batch as alone, or an error."""
    describe = VisionFeatureDescriptionPipeline(model=model, processor=processor)

    def call():
        try:
            return describe(inputs, **options)
        except OSError as error:
            raise ValueError(str(error)) from error

    names = [*options, "image", "layer", "location", "phrase", "text", "no such file", "cannot read"]
    found = answered(call, names)
    if found is None:
        return
    event("answered")
    several = isinstance(inputs, list | tuple) or getattr(inputs, "ndim", 0) == 4
    assert isinstance(found, list) == several
    rows, sources = (found, inputs) if several else ([found], [inputs])
    assert len(rows) == len(sources)
    for row, source in zip(rows, sources, strict=True):
        assert row["descriptions"] and all(isinstance(one["description"], str) for one in row["descriptions"])
        assert ("maps" in row) == (options.get("phrases") is not None)
        if "maps" in row:
            (picture,) = load_images(source)
            shape = (len(row["phrases"]), picture.height, picture.width)
            assert row["maps"] and all(one.shape == shape for one in row["maps"].values())
            if max(picture.size) < 10 * min(picture.size):  # of a strip, the crop may hold no pixel's centre
                assert all(one.isfinite().flatten(1).any(dim=1).all() for one in row["maps"].values())
        if len(rows) > 1:
            alone = describe(source, **options)
            assert [one["description"] for one in alone["descriptions"]] == [one["description"] for one in row["descriptions"]]
            for name, one in row.get("maps", {}).items():
                torch.testing.assert_close(alone["maps"][name], one, atol=1e-4, rtol=1e-4, equal_nan=True)


@given(data=st.data())
def test_any_masks(data, processor):
    mask = np.full(data.draw(st.lists(st.sampled_from([0, 1, 9, 64]), max_size=4)), data.draw(NUMBER))
    mask = data.draw(st.sampled_from([mask, torch.from_numpy(mask).bfloat16(), mask.astype(bool), mask.tolist(), "mask", None]))
    regions = answered(lambda: processor.masks_to_regions([mask]), ["mask", "region"])
    assert regions is None or (regions.shape[-2:] == (160, 160) and torch.isfinite(regions).all())


@given(pieces=st.lists(st.text("ab. é狗", max_size=5), max_size=6), nats=st.lists(st.floats(-9, 9), min_size=6, max_size=6))
def test_words_of_any_tokens_are_the_text_and_keep_its_nats(pieces, nats):
    class Tokenizer:
        def decode(self, tokens, skip_special_tokens=True):
            return "".join(pieces[token] for token in tokens)

    words = word_evidence(Tokenizer(), [(at, nats[at]) for at in range(len(pieces))])
    assert [word for word, _ in words] == "".join(pieces).split()
    if words:
        assert sum(share for _, share in words) == pytest.approx(sum(nats[: len(pieces)]), abs=1e-6)
