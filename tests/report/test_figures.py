"""Figures show what they are given: the right size, every word, one colour scale, and the crop where it is."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from devil_hf.build import image_processor_of
from devil_hf.model.outputs_devil import AttributionOutput
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report import drawing, figures

GREY = (128, 128, 128)


@pytest.fixture
def processor(tokenizer) -> DevilProcessor:
    config = {"input_size": (3, 64, 64), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear"}
    return DevilProcessor(image_processor_of(config), tokenizer)


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Every text that a figure draws."""
    texts: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def record(draw, xy, text, *args, **kwargs):
        texts.append(text)
        return draw_text(draw, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def redness(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, dtype=int)
    return pixels[..., 0] - pixels[..., 2]


def test_the_attribution_figure_names_phrases_layers_and_the_scale(processor, written):
    maps = {"stage1": torch.zeros(2, 2, 8, 8), "stage2": torch.zeros(2, 2, 4, 4)}
    maps["stage2"][1, 0, 1, 1] = 2.0
    maps["stage1"][1, 1, 6, 6] = -1.0
    outputs = AttributionOutput(maps=maps, measure="evidence")
    figure = figures.attribution_figure(
        processor, Image.new("RGB", (90, 60), GREY), outputs, ["a dog", "grass"], index=1, tile=200
    )
    assert {"image", "stage1", "stage2", "a dog", "grass", "-2.00", "0", "+2.00"} <= set(written)
    assert any("nats" in text for text in written) and "outside the crop" in " ".join(written)
    assert figure.mode == "RGB" and figure.width > 3 * 200 and figure.height > 2 * 133
    warm, cold = (redness(figure) > 60).nonzero(), (redness(figure) < -40).nonzero()
    tiles = slice(0, figure.height - 110)  # above the colour bar
    assert redness(figure)[tiles].max() > 60 and redness(figure)[tiles].min() < -40
    assert warm[0].min() < cold[0].min(), "the phrase with positive evidence is the upper row"


def test_log_probabilities_get_a_scale_from_lowest_to_highest(processor, written):
    outputs = AttributionOutput(maps={"stage1": -4 - torch.rand(1, 1, 4, 4)}, measure="sum")
    figures.attribution_figure(processor, Image.new("RGB", (64, 64), GREY), outputs, ["a dog"])
    assert any("summed" in text for text in written)
    assert not any(text.startswith("+") for text in written)


def test_a_wrong_number_of_phrases_is_refused(processor):
    with pytest.raises(ValueError, match="1 phrases were given, but the maps are of 2"):
        figures.attribution_figure(processor, Image.new("RGB", (9, 9)), {"a": torch.rand(1, 2, 4, 4)}, ["a dog"])
    with pytest.raises(ValueError, match="shows one image, got 2"):
        figures.attribution_figure(processor, [Image.new("RGB", (9, 9))] * 2, {"a": torch.rand(1, 1, 4, 4)}, ["a dog"])


def test_every_place_gets_its_words(processor, written):
    descriptions = {(row, column): f"place {row} {column}" for row in range(4) for column in range(4)}
    image = Image.new("RGB", (200, 100), "white")
    figure = figures.locations_figure(processor, image, descriptions, (4, 4), "stage3")
    assert set(descriptions.values()) <= set(written)
    assert figure.height >= 4 * 120
    some = figures.locations_figure(processor, image, {(0, 0): "here"}, (4, 4), "stage3")
    assert np.asarray(some, dtype=int).mean() > np.asarray(figure, dtype=int).mean() + 40, "only asked places are darkened"


def test_long_descriptions_are_cut_with_an_ellipsis_not_drawn_over_their_neighbours(processor, written):
    text = "a very long description that cannot possibly fit into a cell of this size " * 6
    figures.locations_figure(processor, Image.new("RGB", (64, 64)), {(1, 1): text}, (4, 4), "stage3")
    lines = [line for line in written if line in text or line.endswith("…")]
    assert lines[-1].endswith("…") and 3 < len(lines) < 12
    font = drawing.font(12)
    assert max(font.getlength(line) for line in lines) <= 132


@pytest.mark.parametrize("width", [40, 90, 400])
def test_wrapping_keeps_every_character_and_the_width(width):
    text = "a dog with averyveryverylongwordindeed runs"
    lines = drawing.wrap(text, 15, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(drawing.font(15).getlength(line) <= width for line in lines)


def test_each_layer_stands_beside_its_image(written):
    rows = [[("all", "a red circle"), ("stage1", "")], [("all", "a blue square")]]
    images = [Image.new("RGB", (64, 64), GREY), Image.new("RGB", (30, 90), GREY)]
    figure = figures.layers_figure(images, rows)
    assert {"all", "stage1", "a red circle", "a blue square", "(nothing)"} <= set(written)
    assert figure.height > 2 * 260
    with pytest.raises(ValueError, match="2 images, but descriptions of 1"):
        figures.layers_figure(images, rows[:1])


@pytest.mark.parametrize(
    ("script", "words"),
    [("Cjk", ("狗", "猫")), ("Arabic", ("كلب", "قطط")), ("Devanagari", ("कमल", "नगर")), ("Greek", ("σκύλος", "γατάκι"))],
)
def test_words_of_other_scripts_are_drawn_or_the_missing_script_is_named(script, words):
    drawing.font.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        one, other = (np.asarray(figures.layers_figure([Image.new("RGB", (64, 64))], [[("all", word)]])) for word in words)
    drawn = one.shape != other.shape or (one != other).any()
    assert drawn or any(f"has the {script} characters" in str(warning.message) for warning in said)
