"""The processor keeps its promises: timm's pixels, every kind of image, plain phrases, maps that lie on the image."""

import base64
import io
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from devil_hf.build import image_processor_of
from devil_hf.model.image_processing_devil import DevilImageProcessor, load_images
from devil_hf.model.outputs_devil import AttributionOutput, DescribeOutput
from devil_hf.model.pipeline_devil import CUSTOM_PIPELINES, VisionFeatureDescriptionPipeline
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.places import crop_box, crop_to_image, location_to_box, pixel_to_location

DATA_CONFIG = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
SIZES = [(640, 480), (333, 517), (224, 224), (50, 61), (7, 300), (1, 1)]  # (width, height)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["a red dog on the grass", "the blue cat of the man"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", model_max_length=48)


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> DevilProcessor:
    return DevilProcessor(image_processor_of(DATA_CONFIG), tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pixels_equal_timms_evaluation_transform_exactly(crop_mode, interpolation):
    for crop_pct, input_size in [(0.875, (3, 224, 224)), (1.0, (3, 96, 96)), (0.9, (3, 97, 131)), (0.95, (3, 64, 48))]:
        config = DATA_CONFIG | {
            "crop_mode": crop_mode,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "input_size": input_size,
        }
        transform, image_processor = create_transform(**config), image_processor_of(config)
        for size in SIZES:
            image = picture(*size)
            expected = transform(image)
            pixel_values = image_processor(image, return_tensors="pt")["pixel_values"][0]
            assert pixel_values.dtype == torch.float32
            assert torch.equal(pixel_values, expected), (crop_pct, input_size, size)


def test_pixels_equal_timms_for_the_data_configs_of_all_its_pretrained_models():
    configs = {}
    for name in timm.list_pretrained():
        config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        if config["input_size"][0] == 3 and max(config["input_size"]) <= 384:
            configs[tuple((key, tuple(v) if isinstance(v, (list, tuple)) else v) for key, v in config.items())] = config
    assert len(configs) > 30
    image = picture(211, 157)
    for config in configs.values():
        pixel_values = image_processor_of(config)(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixel_values, create_transform(**config)(image)), config


def test_the_papers_resize_takes_the_short_side_to_the_crop_size():
    image_processor = image_processor_of(DATA_CONFIG | {"crop_mode": "squash"}, resize="paper")
    expected = create_transform(**DATA_CONFIG | {"crop_pct": 1.0})(picture(640, 480))
    assert torch.equal(image_processor(picture(640, 480), return_tensors="pt")["pixel_values"][0], expected)
    assert image_processor.geometry((480, 640)).resized_size == (224, 298)
    assert image_processor.geometry((480.0, 640.0)) == image_processor.geometry((480, 640))
    with pytest.raises(ValueError, match=r"an edge of image_size=480\.5"):
        image_processor.geometry((480.5, 640))


def test_a_very_long_strip_costs_little_memory_and_gives_the_same_pixels(monkeypatch):
    image_processor = image_processor_of(DATA_CONFIG)
    strip = picture(3, 200)
    whole = image_processor(strip, return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(sys.modules[DevilImageProcessor.__module__], "MAX_RESIZED_PIXELS", 1000)
    part = image_processor(strip, return_tensors="pt")["pixel_values"]
    assert (part - whole).abs().max() < 0.02  # one step of 1/255, over the standard deviation
    assert image_processor(picture(1, 60_000))["pixel_values"][0].shape == (3, 224, 224)


RED = (200, 30, 40)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "LA", "PA", "La", "RGBa", "RGBA"]
)
def test_every_mode_of_picture_becomes_rgb(mode):
    gray = Image.new("L", (9, 5), 128)
    if mode == "LAB":
        image = Image.new("LAB", (9, 5), (128, 128, 128))
    elif mode == "F":
        image = Image.fromarray(np.full((5, 9), 0.5, dtype=np.float32))
    else:
        steps = {
            "P": [],
            "PA": ["P"],
            "La": ["LA"],
            "RGBa": ["RGBA"],
            "HSV": ["RGB"],
            "YCbCr": ["RGB"],
            "CMYK": ["RGB"],
        }
        image = gray
        for step in [*steps.get(mode, []), mode]:
            image = image.convert(step)
    assert image.mode == mode
    (rgb,) = load_images(image)
    assert rgb.mode == "RGB" and rgb.size == (9, 5)
    if mode != "1":
        assert np.abs(np.asarray(rgb).astype(int) - 128).max() <= 12


def test_transparent_parts_become_white_and_half_transparent_ones_mix():
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    pixels = np.asarray(load_images(image)[0])[0]
    assert pixels.tolist()[:2] == [list(RED), [255, 255, 255]]
    assert np.abs(pixels[2].astype(int) - 127).max() <= 1
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([*RED, 0, 0, 0])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert np.asarray(load_images(Image.open(buffer))[0])[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for image in (tmp_path / "deep.png", Image.fromarray(values), values, torch.from_numpy(values.astype(np.int32))):
        assert np.asarray(load_images(image)[0])[0, :, 0].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation, tmp_path):
    stored = picture(12, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    (image,) = load_images(str(tmp_path / "turned.png"))
    assert image.size == ((12, 8) if orientation < 5 else (8, 12))
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    if orientation in turns:
        assert np.array_equal(np.asarray(image), np.asarray(stored.transpose(turns[orientation])))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(load_images(tmp_path / "moving.gif")[0])[0, 0].astype(int) - RED).max() <= 2


def test_arrays_tensors_paths_and_base64_give_the_same_pixels(tmp_path):
    image = picture(20, 12)
    array = np.asarray(image)
    image.save(tmp_path / "image.png")
    encoded = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    forms = [
        array,
        np.moveaxis(array, -1, 0),
        torch.tensor(array),
        torch.tensor(array).permute(2, 0, 1),
        array / 255.0,
        (array / 255.0).astype(np.float32),
        torch.tensor(array).permute(2, 0, 1) / 255,
        array.astype(np.int64),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        encoded,
        f"data:image/png;base64,{encoded}",
    ]
    for form in forms:
        assert np.array_equal(np.asarray(load_images(form)[0]), array)
    assert len(load_images([image, [array, tmp_path / "image.png"], np.stack([array, array])])) == 5
    assert np.array_equal(np.asarray(load_images(array[..., 0])[0])[..., 1], array[..., 0])
    assert np.array_equal(np.asarray(load_images(array[None, ..., 0])[0])[..., 1], array[..., 0])
    tiny = np.full((3, 5, 3), 7, dtype=np.uint8)  # both axes could be the channels
    tiny[1] = 9
    assert np.asarray(load_images(tiny)[0])[1, 0].tolist() == [9, 9, 9]
    assert np.asarray(load_images(torch.tensor(tiny))[0])[0, 0].tolist() == [7, 9, 7]


class Serve(BaseHTTPRequestHandler):
    def __init__(self, body: bytes, *args):
        self.body = body
        super().__init__(*args)

    def do_GET(self):
        found = self.path == "/image.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.body if found else b"")

    def log_message(self, *args):
        pass


def test_urls_are_fetched(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    buffer = io.BytesIO()
    picture(10, 6).save(buffer, "PNG")
    server = HTTPServer(("127.0.0.1", 0), partial(Serve, buffer.getvalue()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert np.array_equal(np.asarray(load_images(f"{url}/image.png")[0]), np.asarray(picture(10, 6)))
        with pytest.raises(ValueError, match=r"cannot read .*missing\.png.*404"):
            load_images(f"{url}/missing.png")
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "an image must be a PIL image.*None"),
        (3.5, TypeError, "an image must be a PIL image.*3.5"),
        (Image.new("RGB", (0, 4)), ValueError, r"at least one pixel.*\(0, 4\)"),
        (np.zeros((0, 5, 3), dtype=np.uint8), ValueError, r"not empty.*\(0, 5, 3\)"),
        (np.zeros((5, 6, 7), dtype=np.uint8), ValueError, r"1 to 4 channels.*\(5, 6, 7\)"),
        (np.zeros((5,), dtype=np.uint8), ValueError, r"\(5,\)"),
        (np.full((4, 4, 3), 117.0), ValueError, r"\[0, 1\].*117.*divide by 255"),
        (np.full((4, 4, 3), np.nan), ValueError, r"\[0, 1\].*nan"),
        (np.full((4, 4, 3), -3), ValueError, "0..255.*-3"),
        (np.full((4, 4, 3), "a"), TypeError, "must hold numbers"),
        ("no/such/image.jpg", FileNotFoundError, "no such file.*no/such/image.jpg"),
        ("data:image/png;base64," + "A" * 400, ValueError, "^cannot read 'data:image/png' as an image: [^A]*$"),
        ("data:image/png;base64,?", ValueError, "^cannot read 'data:image/png' as an image: [^?]*$"),
        ("dogs", FileNotFoundError, "no such file.*'dogs'"),  # base64 text, of nothing
        ("Gr\u00fcn.jpg", FileNotFoundError, "no such file.*Gr\u00fcn"),
        ("", FileNotFoundError, "no such file.*''"),
    ],
)
def test_what_is_not_an_image_is_refused_with_its_value_and_a_remedy(image, error, message):
    with pytest.raises(error, match=message):
        image_processor_of(DATA_CONFIG)(image)


def test_broken_files_are_refused_by_name(tmp_path):
    picture(64, 64).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "text.png").write_text("<svg/>")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}.* as an image"):
            load_images(tmp_path / name)
    with pytest.raises(ValueError, match="cannot read"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="no images given"):
        image_processor_of(DATA_CONFIG)([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "corner"}, "'corner' is not one of"),
        ({"interpolation": "random"}, "'random' is not one of"),
        ({"input_size": (1, 64, 64)}, "1 channels"),
        ({"crop_pct": -1.0}, "crop_pct=-1.0 must be a finite number"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        image_processor_of(DATA_CONFIG | change)
    with pytest.raises(ValueError, match="resize must be 'backbone' or 'paper'"):
        image_processor_of(DATA_CONFIG, resize="papre")


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_phrases_have_no_bos_or_eos_and_are_padded_on_the_right(processor, tokenizer):
    batch = processor(text=["a red dog on the grass", "cat"])
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a red dog on the grass", "cat")]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths == [len(row) for row in rows]
    assert [ids[:n].tolist() for ids, n in zip(batch["input_ids"], lengths, strict=True)] == rows
    assert batch["input_ids"][1, lengths[1] :].eq(tokenizer.pad_token_id).all()
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a red dog on the grass", "cat"]
    assert processor(text="cat")["input_ids"].shape[0] == 1
    assert "scored_mask" not in batch


def test_a_carrier_stands_in_front_and_is_not_scored(processor):
    batch = processor(text=["dog", "blue cat"], carrier="the")
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["the dog", "the blue cat"]
    assert batch["scored_mask"].dtype == torch.bool
    for ids, scored, mask, words in zip(
        *(batch[k] for k in ("input_ids", "scored_mask", "attention_mask")), (" dog", " blue cat"), strict=True
    ):
        assert processor.decode(ids[scored]) == words
        assert not scored[mask == 0].any()


def test_images_and_text_go_together_and_lists_are_possible(processor):
    batch = processor(images=[picture(30, 20)] * 2, text=["a dog"] * 3)
    assert batch["pixel_values"].shape == (2, 3, 224, 224) and batch["input_ids"].shape[0] == 3
    assert isinstance(processor(text="a dog", return_tensors=None)["input_ids"], list)
    assert processor(text=["a red dog on the grass"], max_length=3)["input_ids"].shape == (1, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"text": ["dog", ""]}, ValueError, "phrase '' is empty"),
        ({"text": " \n"}, ValueError, "is empty"),
        ({"text": []}, ValueError, "at least one"),
        ({"text": ["dog", 3]}, TypeError, "must be a string, got 3"),
        ({"text": "dog " * 60}, ValueError, "tokens, but the language model reads at most 48"),
        ({}, ValueError, "nothing to process"),
        ({"carrier": "the"}, ValueError, "carrier 'the' needs phrases|nothing to process"),
    ],
)
def test_bad_phrases_are_refused_by_name(processor, call, error, message):
    with pytest.raises(error, match=message):
        processor(**call)


def test_a_tokenizer_without_padding_takes_its_eos(tokenizer):
    assert tokenizer.pad_token is None or tokenizer.pad_token == "</s>"
    DevilProcessor(DevilImageProcessor(), tokenizer)
    assert tokenizer.pad_token == "</s>"
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="neither a padding nor an EOS token"):
        DevilProcessor(DevilImageProcessor(), bare)


# ---------------------------------------------------------------------------------------------------------------------
# Maps


def geometry_configs():
    for crop_mode in ("center", "squash", "border"):
        for crop_pct, input_size in [(0.875, (3, 224, 224)), (1.0, (3, 96, 64))]:
            yield DATA_CONFIG | {"crop_mode": crop_mode, "crop_pct": crop_pct, "input_size": input_size}


@pytest.mark.parametrize("config", list(geometry_configs()), ids=lambda c: f"{c['crop_mode']}-{c['crop_pct']}")
@pytest.mark.parametrize("size", [(480, 640), (517, 333), (61, 50)])
def test_a_peak_in_the_map_lands_where_the_pixels_came_from(tokenizer, config, size):
    """A white spot in the image, found in the pixel values, put into a map there, comes back at the spot."""
    processor = DevilProcessor(image_processor_of(config), tokenizer)
    height, width = size
    y, x = int(height * 0.42), int(width * 0.55)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    radius = max(min(size) // 25, 1)
    image[y - radius : y + radius + 1, x - radius : x + radius + 1] = 255
    bright = processor(images=image)["pixel_values"].mean(dim=1)
    maps = F.adaptive_avg_pool2d(bright, [edge // 4 for edge in config["input_size"][1:]])
    placed = processor.post_process_attribution({"stage": maps[None]}, target_sizes=[size])["stage"][0]
    assert placed.shape == (1, height, width)
    top, left = divmod(int(placed[0].nan_to_num(-9).argmax()), width)
    scale = max(
        crop_to_image(processor.image_processor.geometry(size), 1, 1)[axis]
        - crop_to_image(processor.image_processor.geometry(size), 0, 0)[axis]
        for axis in (0, 1)
    )
    assert max(abs(top - y), abs(left - x)) <= radius + 4 * scale


def test_without_crop_maps_are_torchs_bilinear_up_sampling(tokenizer):
    config = DATA_CONFIG | {"crop_pct": 1.0, "input_size": (3, 64, 64)}
    processor = DevilProcessor(image_processor_of(config), tokenizer)
    maps = torch.randn(2, 3, 7, 7)
    for size in [(64, 64), (128, 128)]:
        placed = processor.post_process_attribution(
            AttributionOutput(maps={"l": maps}, measure="sum"), target_sizes=[size, size]
        )["l"]
        expected = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(torch.stack(placed), expected, atol=1e-5, rtol=1e-5)


def test_maps_are_nan_exactly_outside_the_crop(processor):
    image = picture(400, 200)
    maps = {"layer3": torch.ones(1, 2, 14, 14), "layer4": torch.zeros(1, 2, 7, 7, dtype=torch.bfloat16)}
    placed = processor.post_process_attribution(maps, images=image)
    left, top, right, bottom = crop_box(processor.image_processor.geometry((200, 400)))
    assert (left, top, right, bottom) == pytest.approx((112.5, 12.5, 287.5, 187.5))
    for layer, value in (("layer3", 1.0), ("layer4", 0.0)):
        seen = ~placed[layer][0].isnan()
        assert (placed[layer][0][seen] - value).abs().max() < 1e-6
        assert seen[0].nonzero().amin(dim=0).tolist() == [12, 112]  # the crop starts at half pixels
        assert seen[0].nonzero().amax(dim=0).tolist() == [186, 286]


def test_images_of_different_sizes_and_turned_ones_get_maps_of_their_own_size(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(120, 80).save(tmp_path / "turned.png", exif=exif)
    placed = processor.post_process_attribution({"l": torch.rand(2, 1, 7, 7)}, images=[tmp_path / "turned.png", picture(50, 60)])
    assert [tuple(one.shape) for one in placed["l"]] == [(1, 120, 80), (1, 60, 50)]


def test_locations_and_pixels_are_inverse(processor):
    size, grid = (200, 400), (7, 5)
    for row in range(7):
        for column in range(5):
            left, top, right, bottom = location_to_box(processor.image_processor, (row, column), grid, size)
            assert pixel_to_location(processor.image_processor, (left + right) / 2, (top + bottom) / 2, grid, size) == (
                row,
                column,
            )
    assert pixel_to_location(processor.image_processor, 0, 0, grid, size) is None
    with pytest.raises(ValueError, match=r"location \(7, 0\) is outside the 7 x 5 grid"):
        location_to_box(processor.image_processor, (7, 0), grid, size)
    with pytest.raises(ValueError, match="x=400, y=0 is outside the image of width 400 and height 200"):
        pixel_to_location(processor.image_processor, 400, 0, grid, size)


def test_overlays_share_one_colour_scale(processor):
    images = [picture(60, 40), picture(40, 60)]
    maps = {"a": torch.rand(2, 2, 7, 7), "b": -3 * torch.rand(2, 2, 14, 14)}
    overlays = processor.overlay(AttributionOutput(maps=maps, measure="evidence"), images)
    low, high = overlays.value_range
    assert low == -high and 1 < high <= 3
    assert [picture.size for picture in overlays.pictures["b"][1]] == [(40, 60)] * 2
    low, high = processor.overlay(AttributionOutput(maps=maps, measure="sum"), images).value_range
    assert low < -1 and 0 < high <= 1
    loud = processor.overlay({"a": torch.tensor([[[[1.0]], [[0.1]]]])}, picture(30, 30)).pictures["a"][0]
    red = [np.asarray(one, dtype=int)[..., 0].mean() - np.asarray(one, dtype=int)[..., 2].mean() for one in loud]
    assert red[0] > red[1] + 20


@pytest.mark.parametrize(
    ("outputs", "sizes", "message"),
    [
        ({"l": torch.rand(2, 1, 7, 7)}, {"target_sizes": [(5, 5)]}, "maps of 2 images, but 1 images"),
        ({"l": torch.rand(1, 7, 7)}, {"target_sizes": [(5, 5)]}, "must be a tensor"),
        ({"l": torch.rand(1, 1, 7, 7)}, {}, "either `images` or `target_sizes`"),
    ],
)
def test_maps_that_do_not_fit_are_refused(processor, outputs, sizes, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_attribution(outputs, **sizes)
    with pytest.raises(TypeError, match=r"output of `model\.attribute`"):
        processor.post_process_attribution([1], target_sizes=[(5, 5)])


# ---------------------------------------------------------------------------------------------------------------------
# Saving, and the pipeline


FRESH = """
import sys
sys.modules["devil_hf"] = None
import numpy as np, torch
from transformers import AutoImageProcessor, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
processor.save_pretrained(sys.argv[1] + "/again")
AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[1] + "/alone")
image = np.load(sys.argv[1] + "/image.npy")
loaded = [processor, AutoProcessor.from_pretrained(sys.argv[1] + "/again", trust_remote_code=True)]
loaded += [AutoImageProcessor.from_pretrained(sys.argv[1] + "/alone", trust_remote_code=True)]
torch.save([one(images=image, return_tensors="pt")["pixel_values"] for one in loaded], sys.argv[1] + "/pixels.pt")
assert processor(text="a dog", carrier="the")["scored_mask"].tolist()[0][0] is False
"""


def test_the_processor_loads_where_the_package_is_not_installed(tmp_path, tokenizer):
    config = DATA_CONFIG | {
        "crop_mode": "border",
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "input_size": (3, 64, 96),
    }
    processor = DevilProcessor(image_processor_of(config), tokenizer)
    processor.save_pretrained(tmp_path)
    image = np.asarray(picture(70, 40))
    np.save(tmp_path / "image.npy", image)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for pixel_values in torch.load(tmp_path / "pixels.pt", weights_only=True):
        assert torch.equal(pixel_values, processor(images=image)["pixel_values"])


class StandInConfig(PreTrainedConfig):
    model_type = "stand_in"


class StandIn(PreTrainedModel):
    """Speaks the image's mean brightness, the layer and the place, so that a mix-up of rows would show."""

    config_class = StandInConfig
    layer_names = ["low", "high"]

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def extract_features(self, pixel_values, layers=None):
        return [pixel_values.mean(dim=(1, 2, 3))[:, None, None, None]] * 2

    def describe(self, pixel_values=None, layers=None, locations=None, evidence=False, feature_maps=None, **generation):
        brightness = feature_maps[0].flatten().tolist()
        asked = [-1, 0, 1] if layers is None else [self.layer_names.index(layer) for layer in layers]
        images, places = range(len(brightness)), locations or [(-1, -1)]
        rows = [(image, layer, place) for layer in asked for image in images for place in places]
        tokens = [(40 + int(brightness[image] > 0), 50 + layer, 60 + max(place[0], 0)) for image, layer, place in rows]
        sequences = torch.tensor(tokens)
        return DescribeOutput(
            sequences=sequences,
            image_index=torch.tensor([image for image, _, _ in rows]),
            layer_index=torch.tensor([layer for _, layer, _ in rows]),
            locations=torch.tensor([place for _, _, place in rows]),
            token_evidence=sequences.float() if evidence else None,
            layer_names=self.layer_names,
        )

    def attribute(self, pixel_values=None, phrases=None, layers=None, measure="evidence", feature_maps=None):
        brightness = feature_maps[0].flatten()
        maps = brightness[:, None, None, None].expand(-1, len(phrases["input_ids"]), 7, 7)
        return AttributionOutput(maps=dict.fromkeys(layers or self.layer_names, maps), measure=measure)


@pytest.fixture
def describe(processor) -> VisionFeatureDescriptionPipeline:
    return VisionFeatureDescriptionPipeline(model=StandIn(StandInConfig()), processor=processor, device="cpu")


def test_the_pipeline_answers_the_same_for_one_image_a_list_and_batches(describe, processor, tmp_path):
    images = [Image.new("RGB", (30 + 7 * i, 40), (60 * i,) * 3) for i in range(5)]
    images[1].save(tmp_path / "image.png")
    arguments = {"phrases": ["a dog", "grass"], "layers": ["high", "low"], "locations": [(0, 1), (2, 3)]}
    arguments["evidence"] = True
    single = [describe(image, **arguments) for image in images]
    for batch_size in (1, 2, 5):
        batched = describe([images[0], str(tmp_path / "image.png"), *images[2:]], batch_size=batch_size, **arguments)
        for one, other, image in zip(single, batched, images, strict=True):
            assert one["descriptions"] == other["descriptions"]
            assert other["maps"].keys() == {"high", "low"} and other["phrases"] == ["a dog", "grass"]
            assert other["maps"]["low"].shape == (2, image.height, image.width)
            torch.testing.assert_close(one["maps"]["low"], other["maps"]["low"], equal_nan=True)
    first = single[3]["descriptions"][1]
    assert (first["layer"], first["location"]) == ("high", (2, 3))
    assert first["description"] == processor.decode([41, 51, 62]).strip()
    assert sum(nats for _, nats in first["words"]) == 154.0 and first["evidence"] == pytest.approx(154 / 3)
    assert " ".join(word for word, _ in first["words"]) == " ".join(first["description"].split())


def test_the_pipeline_without_arguments_describes_all_layers_and_each(describe):
    result = describe(picture(30, 20))
    assert [row["layer"] for row in result["descriptions"]] == ["all", "low", "high"]
    assert all(row["location"] is None and "evidence" not in row for row in result["descriptions"])
    assert "maps" not in result
    assert len(describe(np.stack([np.asarray(picture(30, 20))] * 3))) == 3


def test_the_pipeline_refuses_bad_input_before_the_model_runs(describe):
    with pytest.raises(ValueError, match="phrase ' ' is empty"):
        describe(picture(30, 20), phrases=["dog", " "])
    with pytest.raises(ValueError, match="no images given"):
        describe([])
    with pytest.raises(ValueError, match="carrier 'the' needs phrases"):
        describe(picture(30, 20), carrier="the")


def test_the_entry_for_the_config_names_the_class_of_this_file():
    (entry,) = CUSTOM_PIPELINES.values()
    assert entry["impl"] == f"pipeline_devil.{VisionFeatureDescriptionPipeline.__name__}"


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_masks_are_resized_and_cropped_as_their_images_are(tokenizer, crop_mode):
    image_processor = DevilImageProcessor(
        crop_size={"height": 64, "width": 64}, crop_pct=0.8, crop_mode=crop_mode, resample=int(Image.Resampling.BILINEAR),
        image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    mask = np.zeros((90, 160), dtype=bool)
    mask[20:55, 60:130] = True
    processor = DevilProcessor(image_processor, tokenizer)
    regions = processor.masks_to_regions([mask, np.stack([mask])])
    assert regions.shape == (2, 1, 64, 64) and torch.equal(regions[0], regions[1])
    as_image = processor(images=Image.fromarray(mask).convert("RGB"))["pixel_values"][0, 0]
    assert 0.05 < as_image.mean() < 0.6
    torch.testing.assert_close(regions[0, 0], as_image, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [([np.zeros(5)], r"\(5,\)"), ([np.zeros((2, 9, 9)), np.zeros((9, 9))], r"\[1, 2\]"), ([], "at least one")],
)
def test_masks_that_make_no_regions_are_refused(processor, masks, message):
    with pytest.raises(ValueError, match=message):
        processor.masks_to_regions(masks)


def test_settings_of_a_call_are_those_of_a_processor(images):
    own = DevilImageProcessor(crop_size={"height": 64, "width": 64}, crop_pct=0.9)
    usual = own(images[0], return_tensors="np")["pixel_values"]
    for name, value in {
        "crop_pct": 1,
        "crop_size": [32, 48],
        "crop_mode": "squash",
        "resample": 2,
        "image_std": [1, 1, 1],
    }.items():
        called = own(images[0], return_tensors="np", **{name: value})["pixel_values"]
        wanted = {"crop_size": 64, "crop_pct": 0.9} | {name: value}
        np.testing.assert_array_equal(called, DevilImageProcessor(**wanted)(images[0], return_tensors="np")["pixel_values"])
        assert called.shape != usual.shape or not np.array_equal(called, usual), name
        np.testing.assert_array_equal(own(images[0], return_tensors="np", **{name: None})["pixel_values"], usual)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"crop_pct": value} for value in (0, -1, float("nan"), float("inf"), 65, "0.5", [0.5])),
        *({"crop_size": value} for value in (0, -5, [32], [32, 48, 3], 10**7, {"shortest_edge": 32}, {})),
        *({"crop_mode": value} for value in ("", "Center", 3)),
        *(
            {name: value}
            for name in ("image_mean", "image_std")
            for value in (0.5, [0.5, 0.5], "x", [float("nan")] * 3, [1e38] * 3)
        ),
        {"image_std": [0, 0, 0]},
        *({"resample": value} for value in ("bilinear", torch.tensor(1), np.array([1, 2]))),
        {"crop_mode": np.array([1, 2])},
    ],
)
def test_settings_that_no_image_can_be_read_by_are_refused_by_name(images, wrong):
    own = DevilImageProcessor(crop_size={"height": 64, "width": 64}, crop_pct=0.9)
    (name,) = wrong
    for call in (lambda: own(images[0], **wrong), lambda: DevilImageProcessor(**{"crop_size": 64} | wrong)):
        with pytest.raises(ValueError, match=name):
            call()
    if name.startswith("crop"):
        with pytest.raises(ValueError, match=name):
            own.geometry((50, 80), **wrong)
