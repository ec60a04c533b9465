"""Pieces of a page: the image with its grid, tinted sentences, maps and feature grids.

Plain HTML with class names and `data-` attributes; a page brings the style and says what a click does. Everything that can be
clicked is a button, so that the keyboard reaches it. Texts of models and users are escaped.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

from devil_hf.model.outputs_devil import AttributionOutput
from devil_hf.model.processing_devil import DIVERGING, DevilProcessor, shared_value_range
from devil_hf.report.figures import map_tile, signed
from devil_hf.report.notebook import tint

ALL_TOGETHER = "all layers together"


def data_uri(image: Image.Image, lossless: bool = False) -> str:
    """The address of an image that needs no file."""
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=88, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def stage_html(
    image: Image.Image,
    crop: tuple[float, float, float, float],
    grid: tuple[int, int],
    place: tuple[int, int] | None,
    layer: str,
) -> str:
    """The image under the grid of one layer, with one place marked.

    Args:
        image: RGB picture.
        crop: (left, top, right, bottom) of the part that the backbone sees, as shares of the image.
        grid: (rows, columns) of the layer.
        place: the marked (row, column).
        layer: its name.
    """
    left, top, right, bottom = crop
    frame = _box(left, top, right - left, bottom - top)
    cell = ""
    if place is not None:
        height, width = (bottom - top) / grid[0], (right - left) / grid[1]
        cell = (
            f'<i class="dv-cell" style="{_box(left + place[1] * width, top + place[0] * height, width, height)}"></i>'
        )
    row, column = place or (-1, -1)
    label = f"Image under the {grid[0]} by {grid[1]} grid of {layer}. Arrow keys move the place that is read."
    grid_lines = f"background-size:{100 / grid[1]:.4f}% {100 / grid[0]:.4f}%"
    return (
        f'<div class="dv-stage" tabindex="0" role="application" aria-label="{escape(label)}" data-row="{row}" '
        f'data-column="{column}" data-rows="{grid[0]}" data-columns="{grid[1]}" data-crop="{left},{top},{right},{bottom}">'
        f'<img src="{data_uri(image)}" alt="the chosen image" draggable="false">'
        f'<i class="dv-crop" style="{frame};{grid_lines}"></i><i class="dv-hover"></i>{cell}</div>'
    )


def _box(left: float, top: float, width: float, height: float) -> str:
    return f"left:{100 * left:.3f}%;top:{100 * top:.3f}%;width:{100 * width:.3f}%;height:{100 * height:.3f}%"


def words_html(words: Sequence[tuple[str, float]]) -> str:
    """Words as buttons, tinted by evidence; `data-word` holds the word."""
    if not words:
        return '<span class="dv-nothing">(no words)</span>'
    return " ".join(
        f'<button class="dv-word" data-word="{escape(word)}" style="--tint:{tint(nats)}" '
        f'title="{nats:+.2f} nats from the features; click for its map" '
        f'aria-label="{escape(word)}, {nats:+.1f} nats; show its map">{escape(word)}</button>'
        for word, nats in words
    )


def place_html(rows: Sequence[dict], layer: str, where: str) -> str:
    """What one place says: large at `layer`, and small at the others, whose names are buttons (`data-layer`)."""
    chosen = next(row for row in rows if row["layer"] == layer)
    row, column = chosen["location"]
    others = "".join(_layer_line(other, current=other["layer"] == layer) for other in rows)
    return (
        f'<p class="dv-where"><b>{escape(layer)}</b> at row {row}, column {column}{escape(where)}</p>'
        f'<p class="dv-said">{words_html(chosen["words"])}</p><p class="dv-note">{_evidence(chosen)}</p>'
        f'<h4>The same point through the layers</h4><ul class="dv-lines">{others}</ul>'
    )


def image_html(rows: Sequence[dict]) -> str:
    """What the whole image says: all layers together large, then each alone."""
    whole = next(row for row in rows if row["layer"] == "all")
    lines = "".join(_layer_line(row) for row in rows if row["layer"] != "all")
    return (
        f'<p class="dv-where"><b>{ALL_TOGETHER}</b></p><p class="dv-said">{words_html(whole["words"])}</p>'
        f'<p class="dv-note">{_evidence(whole)}</p><h4>Each layer alone</h4><ul class="dv-lines">{lines}</ul>'
    )


def _layer_line(row: dict, current: bool = False) -> str:
    name = escape(row["layer"])
    return (
        f'<li><button class="dv-layer" data-layer="{name}" aria-pressed="{str(current).lower()}" '
        f'title="read at {name}">{name}</button><span>{words_html(row["words"])}</span></li>'
    )


def _evidence(row: dict) -> str:
    return f"evidence {row['evidence']:+.2f} nats per token"


def maps_html(
    processor: DevilProcessor, image: Image.Image, outputs: AttributionOutput, phrases: Sequence[str], tile: int = 320
) -> str:
    """Maps of phrases (rows) on every layer side by side, all on one colour scale.

    Args:
        processor: the processor that prepared the image.
        image: RGB picture.
        outputs: what `model.attribute` returned for this one image.
        phrases: the K phrases.
        tile: longest side of a map in pixels.
    """
    picture = image.copy()
    scale = tile / max(picture.size)
    picture = picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))
    value_range = shared_value_range(outputs.maps)
    placed = processor.post_process_attribution(outputs, target_sizes=[(picture.height, picture.width)])
    rows = []
    for number, phrase in enumerate(phrases):
        figures = []
        for layer, values in placed.items():
            grid = outputs.maps[layer][0, number]
            row, column = divmod(int(grid.argmax()), grid.shape[1])
            alt = f"map of {phrase} at {layer}: highest {float(grid.max()):+.2f} nats at row {row}, column {column}"
            source = data_uri(map_tile(picture, values[0][number].numpy(), value_range, symmetric=True))
            figures.append(
                f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{escape(layer)}</figcaption></figure>'
            )
        rows.append(f'<section><h4>{escape(phrase)}</h4><div class="dv-tiles">{"".join(figures)}</div></section>')
    return f"{scale_html(value_range)}{''.join(rows)}"


def scale_html(value_range: tuple[float, float]) -> str:
    """The diverging colour scale with its ends in numbers."""
    stops = ", ".join(f"rgb{anchor}" for anchor in DIVERGING)
    low, high = value_range
    return (
        f'<div class="dv-scale"><span>against {signed(low)}</span>'
        f'<i style="background:linear-gradient(90deg, {stops})"></i><span>{signed(high)} for it</span>'
        "<small>nats per token over the null prefix; ring: the highest place</small></div>"
    )


def features_html(
    pictures: Mapping[str, Image.Image], rows: Sequence[dict], grids: Mapping[str, Any], layer: str
) -> str:
    """The feature grid of each layer in colours, with what the layer says; a tile is a button (`data-layer`, clicked at a place).

    Args:
        pictures: per layer, one pixel per location (see `feature_picture`).
        rows: descriptions of the whole image by each layer.
        grids: per layer, (rows, columns).
        layer: the one that is chosen.
    """
    said = {row["layer"]: row["description"] for row in rows}
    tiles = []
    for name, picture in pictures.items():
        height, width = grids[name]
        source, current = data_uri(picture, lossless=True), str(name == layer).lower()
        tiles.append(
            f'<figure><button class="dv-features" data-layer="{escape(name)}" aria-pressed="{current}" '
            f'aria-label="read {escape(name)}, {height} by {width} places" style="aspect-ratio:{width}/{height}">'
            f'<img src="{source}" alt="" draggable="false"></button><figcaption><b>{escape(name)}</b> '
            f"<small>{height} × {width}</small><span>{escape(said.get(name, ''))}</span></figcaption></figure>"
        )
    return f'<div class="dv-tiles">{"".join(tiles)}</div>'


__all__ = [
    "data_uri",
    "features_html",
    "image_html",
    "maps_html",
    "place_html",
    "scale_html",
    "stage_html",
    "words_html",
]
