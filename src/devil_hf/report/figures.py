"""Pictures of descriptions and attribution maps, drawn with Pillow alone and returned as PIL images.

Three figures: the maps of phrases at every layer (`attribution_figure`), the words of every place at one layer
(`locations_figure`) and what each layer says about whole images (`layers_figure`). All sizes are in pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from devil_hf.model.image_processing_devil import load_images
from devil_hf.model.processing_devil import DevilProcessor, attribution_maps, shared_value_range
from devil_hf.report.colours import INK, MUTED, PAPER, RULE, VEIL
from devil_hf.report.drawing import GAP, MARGIN, color_bar, fit, font, line_height, map_tile, only_image, scaled, wrap, write
from devil_hf.report.places import location_to_box

Box = tuple[float, float, float, float]
UNITS = {
    "evidence": "evidence: nats per token over the null prefix",
    "per_token": "log-probability: nats per token",
    "sum": "log-probability: nats, summed over tokens",
}
HEADING, CAPTION, BAR = 30, 24, 56  # heights: of the line of layers, of a phrase over its maps, of the colour bar


def attribution_figure(
    processor: DevilProcessor, image: Any, outputs: Any, phrases: Sequence[str], *, index: int = 0, tile: int = 220
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
    picture = scaled(only_image(image), tile)
    placed = processor.post_process_attribution(maps, target_sizes=[(picture.height, picture.width)])
    value_range = shared_value_range(maps, symmetric)
    tiles = [
        [map_tile(picture, values[0][row].numpy(), value_range, symmetric) for values in placed.values()]
        for row in range(len(phrases))
    ]
    unseen = any(values[0].isnan().any() for values in placed.values())
    bar = color_bar(value_range, UNITS[measure], symmetric=symmetric)
    return _map_grid(picture, list(placed), phrases, tiles, bar, unseen)


def _map_grid(
    picture: Image.Image,
    layers: Sequence[str],
    phrases: Sequence[str],
    tiles: Sequence[Sequence[Image.Image]],
    bar: Image.Image,
    unseen: bool,
) -> Image.Image:
    """An image, the tiles of its maps in rows of phrases and columns of layers, and the scale below."""
    left, top = MARGIN + picture.width + 2 * GAP, MARGIN + HEADING
    step_x, step_y = picture.width + GAP, picture.height + 34
    width = max(left + len(layers) * step_x - GAP, left + bar.width) + MARGIN
    bottom = top + len(phrases) * step_y
    figure = Image.new("RGB", (width, bottom + BAR + MARGIN), PAPER)
    draw = ImageDraw.Draw(figure)
    write(draw, (MARGIN, MARGIN), "image", 16, MUTED)
    figure.paste(picture, (MARGIN, top + CAPTION))
    for column, layer in enumerate(layers):
        size, lines = fit(layer, picture.width, 22, (16, 13, 11))
        write(draw, (left + column * step_x, MARGIN), lines, size, MUTED)
    draw.line((MARGIN, MARGIN + 24, width - MARGIN, MARGIN + 24), fill=RULE)
    for row, phrase in enumerate(phrases):
        size, lines = fit(phrase, width - left - MARGIN, 23, (17, 14))
        write(draw, (left, top + row * step_y + 1), lines, size)
        for column, tile in enumerate(tiles[row]):
            figure.paste(tile, (left + column * step_x, top + row * step_y + CAPTION))
    figure.paste(bar, (left, bottom + 8))
    note = "Ring and number: the highest value."
    note += " Dark: outside the crop, not seen by the backbone." if unseen else ""
    write(draw, (MARGIN, top + picture.height + 34), wrap(note, 13, picture.width), 13, MUTED)
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
    picture = only_image(image)

    def box(place: tuple[int, int]) -> Box:
        return location_to_box(processor.image_processor, place, grid_size, (picture.height, picture.width))

    first, last = box((0, 0)), box((grid_size[0] - 1, grid_size[1] - 1))
    seen = (*first[:2], *last[2:])  # the crop, as far as it lies on the image
    scale = cell * max(grid_size) / max(seen[2] - seen[0], seen[3] - seen[1])
    size = (round((seen[2] - seen[0]) * scale), round((seen[3] - seen[1]) * scale))
    grid = picture.resize(size, Image.Resampling.BICUBIC, box=seen).convert("RGBA")
    for place, text in descriptions.items():
        x0, y0, x1, y1 = ((edge - start) * scale for edge, start in zip(box(place), seen[:2] * 2, strict=True))
        _write_cell(grid, (round(x0) + 1, round(y0) + 1, round(x1) - 2, round(y1) - 2), text)

    thumbnail = _outlined_thumbnail(picture, seen)
    left, top = MARGIN + thumbnail.width + 2 * GAP, MARGIN + 34
    figure = Image.new("RGB", (left + grid.width + MARGIN, top + max(grid.height, thumbnail.height) + MARGIN), PAPER)
    draw = ImageDraw.Draw(figure)
    write(draw, (MARGIN, MARGIN), "image", 17, MUTED)
    write(draw, (left, MARGIN), f"{layer}: what each of its {grid_size[0]} x {grid_size[1]} places says", 17)
    figure.paste(thumbnail, (MARGIN, top))
    figure.paste(grid.convert("RGB"), (left, top))
    return figure


def _outlined_thumbnail(picture: Image.Image, seen: Box, longest: int = 260) -> Image.Image:
    """The picture made small, the part that the backbone sees outlined where it is not the whole."""
    thumbnail = scaled(picture, longest)
    shrink = thumbnail.width / picture.width
    outline = [round(edge * shrink) - (number > 1) for number, edge in enumerate(seen)]
    if outline != [0, 0, thumbnail.width - 1, thumbnail.height - 1]:
        draw = ImageDraw.Draw(thumbnail)
        draw.rectangle(outline, outline=INK, width=4)
        draw.rectangle([e + d for e, d in zip(outline, (1, 1, -1, -1), strict=True)], outline=PAPER, width=2)
    return thumbnail


def _write_cell(picture: Image.Image, box: tuple[int, int, int, int], text: str) -> None:
    """Darken `box` of an RGBA picture and write `text` into its middle."""
    x0, y0, x1, y1 = box
    veil = Image.new("RGBA", (max(x1 - x0, 1), max(y1 - y0, 1)), VEIL)
    font_size, lines = fit(text, veil.width - 10, veil.height - 8, (19, 17, 15, 14, 13, 12))
    middle = (veil.height - len(lines) * line_height(font_size)) / 2
    picture.alpha_composite(veil, (x0, y0))
    write(ImageDraw.Draw(picture), (x0 + veil.width / 2, y0 + middle), lines, font_size, PAPER, "ma")


def layers_figure(
    images: Any, descriptions: Sequence[Sequence[tuple[str, str]]], *, tile: int = 260, text_width: int = 620
) -> Image.Image:
    """Images beside what each layer says about them.

    Args:
        images: one or more images, in any form that `load_images` accepts.
        descriptions: per image, (layer name, description) pairs in the order to show them.
        tile: longest side of an image.
        text_width: width of the column of words.
    """
    pictures = [scaled(picture, tile) for picture in load_images(images)]
    if len(pictures) != len(descriptions):
        raise ValueError(f"{len(pictures)} images, but descriptions of {len(descriptions)}")
    label_width = max((font(14, layer).getlength(layer) for rows in descriptions for layer, _ in rows), default=0) + 18
    blocks = [[(layer, wrap(text or "(nothing)", 18, text_width - label_width)) for layer, text in rows] for rows in descriptions]
    line, row_gap = line_height(18), 12
    heights = [
        max(picture.height, sum(len(lines) * line + row_gap for _, lines in block) - row_gap)
        for picture, block in zip(pictures, blocks, strict=True)
    ]
    left = MARGIN + tile + 2 * GAP
    height = sum(heights) + (len(heights) - 1) * 2 * GAP + 2 * MARGIN
    figure = Image.new("RGB", (left + text_width + MARGIN, height), PAPER)
    draw = ImageDraw.Draw(figure)
    top = MARGIN
    for number, (picture, block, height) in enumerate(zip(pictures, blocks, heights, strict=True)):
        if number:
            draw.line((MARGIN, top - GAP, figure.width - MARGIN, top - GAP), fill=RULE)
        figure.paste(picture, (MARGIN + (tile - picture.width) // 2, top))
        y = top
        for layer, lines in block:
            write(draw, (left, y + 3), layer, 14, MUTED)
            write(draw, (left + label_width, y), lines, 18)
            y += len(lines) * line + row_gap
        top += height + 2 * GAP
    return figure


__all__ = ["attribution_figure", "layers_figure", "locations_figure"]
