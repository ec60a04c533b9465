"""Pieces of a page: the image with its grid, tinted sentences, maps and feature grids.

Plain HTML with class names and `data-` attributes; a page brings the style and says what a click does. Everything that can be
clicked is a button, so that the keyboard reaches it. What stands in `templates/` is filled here.
"""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from devil_hf.model.outputs_devil import AttributionOutput
from devil_hf.model.processing_devil import DevilProcessor, shared_value_range
from devil_hf.report.colours import DIVERGING, tint
from devil_hf.report.drawing import map_tile, scaled, signed
from devil_hf.report.templates import render

TEMPLATES = "report/templates"


def data_uri(image: Image.Image, lossless: bool = False, quality: int = 88) -> str:
    """The address of an image that needs no file."""
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def stage_html(
    image: Image.Image, crop: tuple[float, float, float, float], grid: tuple[int, int], place: tuple[int, int] | None, layer: str
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
    rows, columns = grid
    row, column = place or (-1, -1)
    height, width = (bottom - top) / rows, (right - left) / columns
    return render(
        f"{TEMPLATES}/stage.html",
        source=data_uri(image),
        crop=f"{left},{top},{right},{bottom}",
        frame=_box(left, top, right - left, bottom - top),
        cell=_box(left + column * width, top + row * height, width, height) if place else None,
        layer=layer,
        rows=rows,
        columns=columns,
        row=row,
        column=column,
    )


def _box(left: float, top: float, width: float, height: float) -> str:
    return f"left:{100 * left:.3f}%;top:{100 * top:.3f}%;width:{100 * width:.3f}%;height:{100 * height:.3f}%"


def place_html(rows: Sequence[Mapping[str, Any]], layer: str, where: str) -> str:
    """What one place says: large at `layer`, and small at the others, whose names are buttons (`data-layer`)."""
    shown = _shown(rows)
    chosen = next(row for row in shown if row["layer"] == layer)
    return render(f"{TEMPLATES}/place.html", chosen=chosen, rows=shown, where=where)


def image_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the whole image says: all layers together large, then each alone."""
    shown = _shown(rows)
    whole = next(row for row in shown if row["layer"] == "all")
    return render(f"{TEMPLATES}/image.html", whole=whole, rows=[row for row in shown if row["layer"] != "all"])


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "words": tinted(row["words"])} for row in rows]


def tinted(words: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """(word, nats) pairs as templates show them: `text`, `nats` and the CSS colour `tint`."""
    return [{"text": word, "nats": nats, "tint": tint(nats)} for word, nats in words]


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
    picture = scaled(image, tile)
    value_range = shared_value_range(outputs.maps)
    placed = processor.post_process_attribution(outputs, target_sizes=[(picture.height, picture.width)])
    sections = [
        {
            "phrase": phrase,
            "tiles": [
                _map_tile(picture, layer, outputs.maps[layer][0, number], values[0][number].numpy(), value_range)
                for layer, values in placed.items()
            ],
        }
        for number, phrase in enumerate(phrases)
    ]
    low, high = map(signed, value_range)
    stops = ", ".join(f"rgb{anchor}" for anchor in DIVERGING)
    return render(f"{TEMPLATES}/maps.html", low=low, high=high, stops=stops, sections=sections)


def _map_tile(picture: Image.Image, layer: str, grid: Any, values: Any, value_range: tuple[float, float]) -> dict:
    row, column = divmod(int(grid.argmax()), grid.shape[1])
    source = data_uri(map_tile(picture, values, value_range, symmetric=True))
    return {"layer": layer, "source": source, "highest": float(grid.max()), "row": row, "column": column}


def features_html(
    pictures: Mapping[str, Image.Image], rows: Sequence[Mapping[str, Any]], grids: Mapping[str, tuple[int, int]], layer: str
) -> str:
    """The feature grid of each layer in colours, with what the layer says; a tile is a button (`data-layer`, clicked at a place).

    Args:
        pictures: per layer, one pixel per location (see `feature_picture`).
        rows: descriptions of the whole image by each layer.
        grids: per layer, (rows, columns).
        layer: the one that is chosen.
    """
    said = {row["layer"]: row["description"] for row in rows}
    tiles = [
        {
            "layer": name,
            "rows": grids[name][0],
            "columns": grids[name][1],
            "source": data_uri(picture, lossless=True),
            "said": said.get(name, ""),
        }
        for name, picture in pictures.items()
    ]
    return render(f"{TEMPLATES}/features.html", tiles=tiles, chosen=layer)


__all__ = ["data_uri", "features_html", "image_html", "maps_html", "place_html", "stage_html", "tinted"]
