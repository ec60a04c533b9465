"""Pictures of descriptions and attribution maps, drawn with Pillow alone and returned as PIL images.

Three figures: the maps of phrases at every layer (`attribution_figure`), the words of every place at one layer
(`locations_figure`) and what each layer says about whole images (`layers_figure`). All sizes are in pixels.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from devil_hf.model.image_processing_devil import load_images
from devil_hf.model.processing_devil import DevilProcessor, attribution_maps, colorize, overlay_map, shared_value_range
from devil_hf.report.places import location_to_box

PAPER, INK, MUTED, RULE = (255, 255, 255), (24, 27, 33), (104, 111, 122), (222, 225, 230)
MARGIN, GAP = 32, 14
UNITS = {
    "evidence": "evidence: nats per token over the null prefix",
    "per_token": "log-probability: nats per token",
    "sum": "log-probability: nats, summed over tokens",
}


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _wrap(text: str, size: int, width: float) -> list[str]:
    """Break `text` into lines of at most `width`; a word longer than a line is broken too."""
    font, lines, line = _font(size), [], ""
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            cut = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
            lines += [line] * bool(line) + [word[:cut]]
            line, word = "", word[cut:]
        joined = f"{line} {word}" if line else word
        if line and font.getlength(joined) > width:
            lines.append(line)
            line = word
        else:
            line = joined
    return lines + [line] * bool(line)


def _line_height(size: int) -> int:
    return round(size * 1.28)


def _fit(text: str, width: float, height: float, sizes: Sequence[int]) -> tuple[int, list[str]]:
    """The largest of `sizes` (descending) at which `text` fits, and its lines; cut with an ellipsis at the smallest."""
    for size in sizes:
        lines = _wrap(text, size, width)
        if len(lines) * _line_height(size) <= height:
            return size, lines
    lines = lines[: max(int(height // _line_height(size)), 1)]
    while lines[-1] and _font(size).getlength(lines[-1] + "…") > width:
        lines[-1] = lines[-1][:-1]
    return size, [*lines[:-1], lines[-1].rstrip() + "…"]


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    lines: str | Sequence[str],
    size: int,
    color=INK,
    anchor: str = "la",
) -> None:
    for number, line in enumerate([lines] if isinstance(lines, str) else lines):
        draw.text((at[0], at[1] + number * _line_height(size)), line, fill=color, font=_font(size), anchor=anchor)


def _scaled(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _one(image: Any) -> Image.Image:
    pictures = load_images(image)
    if len(pictures) != 1:
        raise ValueError(f"this figure shows one image, got {len(pictures)}")
    return pictures[0]


def color_bar(value_range: tuple[float, float], label: str, *, symmetric: bool = True, width: int = 320) -> Image.Image:
    """The colour scale with its ends and middle in numbers, and what it measures.

    Args:
        value_range: (lowest, highest) value of the scale.
        label: what is measured, with its unit.
        symmetric: whether zero is the neutral middle.
        width: of the bar.
    """
    low, high = value_range
    bar = Image.new("RGB", (width, 56), PAPER)
    strip = colorize(np.linspace(low, high, width)[None].repeat(12, axis=0), value_range, symmetric)
    bar.paste(Image.fromarray(strip), (0, 20))
    draw = ImageDraw.Draw(bar)
    _write(draw, (0, 0), label, 13, MUTED)
    for x, value, anchor in ((0, low, "la"), (width / 2, (low + high) / 2, "ma"), (width, high, "ra")):
        _write(draw, (x, 37), signed(value), 13, INK, anchor)
    return bar


def signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0" if float(text) == 0 else text


def _peak(values: np.ndarray) -> tuple[int, int]:
    """(x, y) of the highest value that is not NaN."""
    y, x = np.unravel_index(np.nanargmax(values), values.shape)
    return int(x), int(y)


def map_tile(
    picture: Image.Image, values: np.ndarray, value_range: tuple[float, float], symmetric: bool
) -> Image.Image:
    """One map over its image, a ring at the peak and the peak's value in the corner."""
    tile = overlay_map(picture, values, value_range, symmetric=symmetric)
    if np.isnan(values).all():
        return tile
    draw = ImageDraw.Draw(tile)
    x, y = _peak(values)
    text = signed(values[y, x])
    # A ring on a map that never speaks for its phrase would point at nothing.
    if values[y, x] > 0 or not symmetric:
        x, y = np.clip(x, 9, tile.width - 10), np.clip(y, 9, tile.height - 10)
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline=INK, width=4)
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline=PAPER, width=2)
    left, top = tile.width - _font(12).getlength(text) - 14, tile.height - 22
    draw.rounded_rectangle((left, top, tile.width - 4, tile.height - 4), radius=5, fill=INK)
    _write(draw, (left + 5, top + 2), text, 12, PAPER)
    return tile


def attribution_figure(
    processor: DevilProcessor,
    image: Any,
    outputs: Any,
    phrases: Sequence[str],
    *,
    index: int = 0,
    tile: int = 220,
) -> Image.Image:
    """The image, and its maps for every phrase (rows) and layer (columns) on one colour scale with a colour bar.

    Args:
        processor: the processor that prepared the image.
        image: the image, in any form that `load_images` accepts.
        outputs: what `model.attribute` returned, or its maps: per layer `(batch_size, K, H_l, W_l)`.
        phrases: the K phrases.
        index: which image of the batch the maps are taken of.
        tile: longest side of a map.
    """
    measure = getattr(outputs, "measure", None) or "evidence"
    symmetric = measure == "evidence"
    maps = {layer: values[index : index + 1] for layer, values in attribution_maps(outputs).items()}
    if any(values.shape[1] != len(phrases) for values in maps.values()):
        raise ValueError(f"{len(phrases)} phrases were given, but the maps are of {next(iter(maps.values())).shape[1]}")
    picture = _scaled(_one(image), tile)
    placed = processor.post_process_attribution(maps, target_sizes=[(picture.height, picture.width)])
    value_range = shared_value_range(maps, symmetric)

    heading, step_x, step_y = 30, picture.width + GAP, picture.height + 34
    grid_left, grid_top = MARGIN + picture.width + 2 * GAP, MARGIN + heading
    width = max(grid_left + len(maps) * step_x - GAP, grid_left + 320) + MARGIN
    bottom = grid_top + len(phrases) * step_y
    figure = Image.new("RGB", (width, bottom + 56 + MARGIN), PAPER)
    draw = ImageDraw.Draw(figure)
    _write(draw, (MARGIN, MARGIN), "image", 16, MUTED)
    figure.paste(picture, (MARGIN, grid_top + 24))
    for column, layer in enumerate(placed):
        size, lines = _fit(layer, picture.width, 22, (16, 13, 11))
        _write(draw, (grid_left + column * step_x, MARGIN), lines, size, MUTED)
    draw.line((MARGIN, MARGIN + 24, width - MARGIN, MARGIN + 24), fill=RULE)
    for row, phrase in enumerate(phrases):
        top = grid_top + row * step_y
        size, lines = _fit(phrase, width - grid_left - MARGIN, 23, (17, 14))
        _write(draw, (grid_left, top + 1), lines, size)
        for column, values in enumerate(placed.values()):
            one = map_tile(picture, values[0][row].numpy(), value_range, symmetric)
            figure.paste(one, (grid_left + column * step_x, top + 24))
    figure.paste(color_bar(value_range, UNITS[measure], symmetric=symmetric), (grid_left, bottom + 8))
    note = "Ring and number: the highest value."
    if any(values[0].isnan().any() for values in placed.values()):
        note += " Dark: outside the crop, not seen by the backbone."
    _write(draw, (MARGIN, grid_top + picture.height + 34), _wrap(note, 13, picture.width), 13, MUTED)
    return figure


def locations_figure(
    processor: DevilProcessor,
    image: Any,
    descriptions: Mapping[tuple[int, int], str],
    grid_size: tuple[int, int],
    layer: str,
    *,
    cell: int = 132,
) -> Image.Image:
    """The image with a short description written into each place of one layer's grid.

    Args:
        processor: the processor that prepared the image; it knows which part of the image a location stands for.
        image: the image, in any form that `load_images` accepts.
        descriptions: (row, column) -> what that location says.
        grid_size: (H_l, W_l) of the layer.
        layer: its name, for the heading.
        cell: smallest side of a location in the figure, so that its words can be read.
    """
    picture = _one(image)
    boxes = {
        place: location_to_box(processor.image_processor, place, grid_size, (picture.height, picture.width))
        for place in descriptions
    }
    first = location_to_box(processor.image_processor, (0, 0), grid_size, (picture.height, picture.width))
    last = location_to_box(
        processor.image_processor, (grid_size[0] - 1, grid_size[1] - 1), grid_size, (picture.height, picture.width)
    )
    seen = (*first[:2], *last[2:])  # the crop, as far as it lies on the image
    scale = cell * max(grid_size) / max(seen[2] - seen[0], seen[3] - seen[1])
    size = (round((seen[2] - seen[0]) * scale), round((seen[3] - seen[1]) * scale))

    grid = picture.resize(size, Image.Resampling.BICUBIC, box=seen).convert("RGBA")
    for place, text in descriptions.items():
        x0, y0, x1, y1 = ((edge - start) * scale for edge, start in zip(boxes[place], seen[:2] * 2, strict=True))
        _write_cell(grid, (round(x0) + 1, round(y0) + 1, round(x1) - 2, round(y1) - 2), text)

    thumbnail = _scaled(picture, 260)
    shrink = thumbnail.width / picture.width
    outline = tuple(round(edge * shrink) - (number > 1) for number, edge in enumerate(seen))
    if outline != (0, 0, thumbnail.width - 1, thumbnail.height - 1):
        ImageDraw.Draw(thumbnail).rectangle(outline, outline=INK, width=4)
        ImageDraw.Draw(thumbnail).rectangle(
            [e + d for e, d in zip(outline, (1, 1, -1, -1), strict=True)], outline=PAPER, width=2
        )
    left, top = MARGIN + thumbnail.width + 2 * GAP, MARGIN + 34
    figure = Image.new("RGB", (left + grid.width + MARGIN, top + max(grid.height, thumbnail.height) + MARGIN), PAPER)
    draw = ImageDraw.Draw(figure)
    _write(draw, (MARGIN, MARGIN), "image", 17, MUTED)
    _write(draw, (left, MARGIN), f"{layer}: what each of its {grid_size[0]} x {grid_size[1]} places says", 17)
    figure.paste(thumbnail, (MARGIN, top))
    figure.paste(grid.convert("RGB"), (left, top))
    return figure


def _write_cell(picture: Image.Image, box: tuple[int, int, int, int], text: str) -> None:
    """Darken `box` of an RGBA picture and write `text` into its middle."""
    x0, y0, x1, y1 = box
    veil = Image.new("RGBA", (max(x1 - x0, 1), max(y1 - y0, 1)), (12, 14, 18, 165))
    font_size, lines = _fit(text, veil.width - 10, veil.height - 8, (19, 17, 15, 14, 13, 12))
    middle = (veil.height - len(lines) * _line_height(font_size)) / 2
    picture.alpha_composite(veil, (x0, y0))
    _write(ImageDraw.Draw(picture), (x0 + veil.width / 2, y0 + middle), lines, font_size, PAPER, "ma")


def layers_figure(
    images: Any,
    descriptions: Sequence[Sequence[tuple[str, str]]],
    *,
    tile: int = 260,
    text_width: int = 620,
) -> Image.Image:
    """Images beside what each layer says about them.

    Args:
        images: one or more images, in any form that `load_images` accepts.
        descriptions: per image, (layer name, description) pairs in the order to show them.
        tile: longest side of an image.
        text_width: width of the column of words.
    """
    pictures = [_scaled(picture, tile) for picture in load_images(images)]
    if len(pictures) != len(descriptions):
        raise ValueError(f"{len(pictures)} images, but descriptions of {len(descriptions)}")
    label_width = max((_font(14).getlength(layer) for rows in descriptions for layer, _ in rows), default=0) + 18
    blocks = [
        [(layer, _wrap(text or "(nothing)", 18, text_width - label_width)) for layer, text in rows]
        for rows in descriptions
    ]
    line, row_gap = _line_height(18), 12
    heights = [
        max(picture.height, sum(len(lines) * line + row_gap for _, lines in block) - row_gap)
        for picture, block in zip(pictures, blocks, strict=True)
    ]
    left = MARGIN + tile + 2 * GAP
    figure = Image.new(
        "RGB", (left + text_width + MARGIN, sum(heights) + (len(heights) - 1) * 2 * GAP + 2 * MARGIN), PAPER
    )
    draw = ImageDraw.Draw(figure)
    top = MARGIN
    for number, (picture, block, height) in enumerate(zip(pictures, blocks, heights, strict=True)):
        if number:
            draw.line((MARGIN, top - GAP, figure.width - MARGIN, top - GAP), fill=RULE)
        figure.paste(picture, (MARGIN + (tile - picture.width) // 2, top))
        y = top
        for layer, lines in block:
            _write(draw, (left, y + 3), layer, 14, MUTED)
            _write(draw, (left + label_width, y), lines, 18)
            y += len(lines) * line + row_gap
        top += height + 2 * GAP
    return figure


def knowledge_figure(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
    chance: Mapping[str, Mapping[str, float]],
    title: str,
    *,
    cell: tuple[int, int] = (76, 38),
) -> Image.Image:
    """Heat tables side by side: one question each, layers by classes of words, coloured from chance (white) to always right.

    Args:
        panels: heading -> layer -> class -> share in [0, 1]; the layers of all panels are the rows, shallowest first.
        chance: heading -> class -> share without knowledge, shown as the last row; the colour of a cell is its share above this.
        title: of the whole figure.
        cell: width and height of a cell.
    """
    width, height = cell
    layers = list(dict.fromkeys(layer for table in panels.values() for layer in table))
    classes = {
        heading: list(dict.fromkeys(c for row in table.values() for c in row)) for heading, table in panels.items()
    }
    label_width = round(max(_font(15).getlength(layer) for layer in (*layers, "chance"))) + GAP
    lefts, left = {}, MARGIN + label_width
    for heading in panels:
        lefts[heading] = left
        left += len(classes[heading]) * width + 2 * GAP
    top = MARGIN + 96
    bottom = top + (len(layers) + 1) * height + 8
    figure = Image.new("RGB", (left - 2 * GAP + MARGIN, bottom + MARGIN + 44), PAPER)
    draw = ImageDraw.Draw(figure)
    _write(draw, (MARGIN, MARGIN - 8), title, 20)
    for row, layer in enumerate(layers):
        _write(draw, (MARGIN, top + row * height + height / 2), layer, 15, MUTED, "lm")
    _write(draw, (MARGIN, bottom - height / 2), "chance", 15, MUTED, "lm")
    for heading, table in panels.items():
        span = len(classes[heading]) * width
        size, lines = _fit(heading, span, 2 * _line_height(15), (15, 13, 12))
        _write(draw, (lefts[heading], top - 62), lines, size)
        for column, name in enumerate(classes[heading]):
            x = lefts[heading] + column * width
            _write(draw, (x + width / 2, top - 10), name, 14, MUTED, "mm")
            base = chance[heading].get(name)
            if base is not None:
                _write(draw, (x + width / 2, bottom - height / 2), f"{100 * base:.0f}", 15, MUTED, "mm")
            for row, layer in enumerate(layers):
                value = table.get(layer, {}).get(name)
                if value is not None:
                    _heat_cell(draw, (x, top + row * height, width - 3, height - 3), value, base or 0.0)
        draw.line((lefts[heading], bottom - height + 2, lefts[heading] + span - 3, bottom - height + 2), fill=RULE)
    note = "Per cent right. Colour: from chance (white) to always right (blue)."
    _write(draw, (MARGIN, bottom + GAP), note, 14, MUTED)
    return figure


def _heat_cell(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], value: float, base: float) -> None:
    """One cell with its percentage; light to dark of one hue, so that it reads in grey as well."""
    x, y, width, height = box
    share = min(max((value - base) / max(1 - base, 1e-6), 0.0), 1.0)
    low, high = (246, 248, 251), (24, 78, 148)
    colour = tuple(round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
    draw.rounded_rectangle((x, y, x + width, y + height), radius=4, fill=colour)
    _write(draw, (x + width / 2, y + height / 2), f"{100 * value:.0f}", 16, PAPER if share > 0.5 else INK, "mm")


__all__ = [
    "attribution_figure",
    "color_bar",
    "knowledge_figure",
    "layers_figure",
    "locations_figure",
    "map_tile",
    "signed",
]
