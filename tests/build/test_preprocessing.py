"""Preprocessing that stands in somebody's file: as transformers reads it, or refused by name."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from devil_hf import DevilImageProcessor
from devil_hf.build import backbone_from_source, image_processor_of
from devil_hf.build.preprocessing import RESAMPLING, data_config_of

DEFAULT = {"input_size": [3, 40, 48], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3}
DEFAULT |= {"crop_pct": 0.875, "crop_mode": "center"}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((500, 375))
STRANGE = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2**20, 10**400, "", "x", "0.5", [], {}, [[]], [None], {"x": 1}, [1, 2, 3, 4]]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(-1, 300), st.floats()), max_size=4),
)
NUMBERS = st.one_of(st.floats(0.01, 300), st.lists(st.floats(0.01, 2), min_size=3, max_size=3), STRANGE)
EDGES = st.one_of(
    st.integers(1, 90),
    st.lists(st.integers(1, 90), min_size=2, max_size=2),
    st.fixed_dictionaries({}, optional={name: st.integers(1, 90) | STRANGE for name in ("height", "width", "shortest_edge")}),
    STRANGE,
)
OURS = {"crop_size": "input_size", "image_mean": "mean", "image_std": "std", "resample": "interpolation"}


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.4, 0.5, 0.6], "image_std": 0.25},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
        {"do_rescale": False, "image_mean": [123.0, 116.0, 103.0], "image_std": [58.0, 57.0, 57.0]},
        {"do_normalize": False},
        {"do_normalize": False, "rescale_factor": 1 / 510},
        {"size": [32, 48], "resample": 3},
    ],
)
def test_settings_mean_what_they_mean_to_transformers(settings):
    settings = {"size": {"height": 32, "width": 40}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} | settings
    ours = image_processor_of(data_config_of(settings, DEFAULT))(PICTURE, return_tensors="np")["pixel_values"]
    theirs = ViTImageProcessorPil(**settings)
    given = {name: settings[name] for name in ("image_mean", "image_std")}
    means = {name: [value] * 3 if isinstance(value, float) else value for name, value in given.items()}
    np.testing.assert_allclose(ours, theirs(PICTURE, return_tensors="np", **means)["pixel_values"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ViT", {}),
        ("ViT", {"size": 224}),
        ("ViT", {"do_normalize": None}),
        ("DeiT", {"size": 256}),
        ("Beit", {"size": 192, "do_center_crop": False}),
        ("CLIP", {}),
        ("CLIP", {"size": 256, "crop_size": 224}),
        ("Siglip", {}),
        ("Bit", {}),
        ("ConvNext", {}),
        ("ConvNext", {"size": 224, "crop_pct": 0.875}),
        ("EfficientNet", {}),
        ("EfficientNet", {"rescale_factor": 1 / 127.5}),
        ("DPT", {}),
        ("MobileNetV2", {}),
    ],
)
def test_files_of_a_class_mean_what_they_mean_to_it(name, settings):
    theirs = getattr(transformers, f"{name}ImageProcessorPil")(**settings)(PHOTO, return_tensors="np")["pixel_values"]
    for kind in ({"image_processor_type": f"{name}ImageProcessorFast"}, {"feature_extractor_type": f"{name}FeatureExtractor"}):
        ours = image_processor_of(data_config_of(settings | kind, DEFAULT))(PHOTO, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "LevitImageProcessor"}, "LevitImageProcessor.*a way of its own"),
        ({"image_processor_type": "MobileViTImageProcessor"}, "do_flip_channel_order=True"),
        ({"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}, "rescale_offset=True"),
        ({"image_processor_type": "CLIPImageProcessor", "do_resize": False}, "do_resize=False"),
        ({"include_top": True, "do_normalize": False}, "include_top"),
        ({"do_resize": None}, "do_resize=None"),
        ({"resample": True}, "resample=True"),
    ],
)
def test_settings_that_no_transform_of_ours_has_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        data_config_of(settings, DEFAULT)


@given(
    settings=st.fixed_dictionaries(
        {},
        optional={
            "image_mean": NUMBERS,
            "image_std": NUMBERS,
            "size": EDGES,
            "crop_size": EDGES,
            "crop_pct": st.floats(0.5, 1) | STRANGE,
            "resample": st.integers(-1, 6) | STRANGE,
            "rescale_factor": st.floats(1e-4, 1) | STRANGE,
            "do_normalize": st.booleans() | STRANGE,
            "do_rescale": st.booleans() | STRANGE,
            "do_center_crop": st.booleans() | STRANGE,
            "image_processor_type": st.sampled_from(["CLIPImageProcessor", "ConvNextImageProcessor"]) | STRANGE,
            "include_top": st.booleans() | STRANGE,
        },
    )
    | STRANGE
)
def test_any_image_processor_of_transformers(settings):
    check(lambda: image_processor_of(data_config_of(settings, DEFAULT)), settings)


@given(
    config=st.fixed_dictionaries(
        {},
        optional={
            "mean": NUMBERS,
            "std": NUMBERS,
            "input_size": st.tuples(st.just(3), st.integers(1, 90), st.integers(1, 90)) | STRANGE,
            "crop_pct": st.floats(0.5, 1) | STRANGE,
            "crop_mode": st.sampled_from(["squash", "border"]) | STRANGE,
            "interpolation": st.sampled_from([*RESAMPLING]) | STRANGE,
        },
    )
)
def test_any_data_configuration(config):
    check(lambda: image_processor_of(config), config)


@given(
    settings=st.fixed_dictionaries(
        {},
        optional={
            "image_mean": NUMBERS,
            "image_std": NUMBERS,
            "crop_size": EDGES,
            "crop_pct": st.floats(0.5, 1) | STRANGE,
            "crop_mode": st.sampled_from(["squash", "border"]) | STRANGE,
            "resample": st.integers(-1, 6) | STRANGE,
        }
        | dict.fromkeys(["size", "do_resize", "_preprocess", "geometry", "valid_kwargs", "backend", "x"], STRANGE),
    )
)
def test_any_file_of_our_own_processor(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    DevilImageProcessor(crop_size=48).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    check(lambda: DevilImageProcessor.from_pretrained(folder), settings)


def check(build, settings):
    """Finite pixels of the size that it says, or a ValueError that names one of the settings; everything else is a fault."""
    processor = said = None
    try:
        processor = build()
    except ValueError as error:
        said = str(error)
    if processor is None:
        names = [*settings, *(OURS.get(name) for name in settings), "size"] if isinstance(settings, dict) else ["JSON object"]
        names += [f"image_{name}" for name in ("mean", "std") if name in names] + ["crop_size", "channels"]
        assert any(name and name in said for name in names), said
        return
    if max(processor.crop_size.height, processor.crop_size.width) > 500:
        return
    pixels = processor(PICTURE, return_tensors="pt")["pixel_values"]
    assert torch.isfinite(pixels).all()
    assert pixels.shape == (1, 3, processor.crop_size.height, processor.crop_size.width)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_mean": 0.5, "size": {"longest_edge": 9}}', "size=.*longest_edge.*shortest_edge.*mend it"),
        ('{"resample": "bicubic"}', "resample='bicubic' is not one of"),
        ("[1]", "must be a JSON object"),
        ('{"image_mean": 0.', "preprocessor_config.json"),
    ],
)
def test_a_source_with_a_broken_image_processor_is_refused_by_its_file(text, message, tmp_path):
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
    ViTModel(ViTConfig(**tiny, patch_size=16)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        backbone_from_source(tmp_path)
    assert "preprocessor_config.json" in str(caught.value)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": 0.25, "size": 32}')
    assert backbone_from_source(tmp_path).config["data_config"]["mean"] == [0.5] * 3
