"""A picture of maps beside the truth: what the backbone saw, the object's outline, and the maps of each layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from transformers.utils import logging

from devil_hf.data.decoding import BadImage, read_picture
from devil_hf.data.objects import LocalisedImage
from devil_hf.evaluation.maps.collecting import DEFAULT_COMBINATION, GRADCAM, read_arrays
from devil_hf.evaluation.maps.measures import enlarge
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.colours import INK, MUTED, PAPER, TRUTH
from devil_hf.report.drawing import GAP, MARGIN, color_bar, fit, map_tile, write
from devil_hf.report.figures import UNITS
from devil_hf.report.overlays import outline

logger = logging.get_logger(f"transformers.{__name__}")


def localisation_figure(
    processor: DevilProcessor,
    examples: Sequence[LocalisedImage],
    rows: Mapping[str, Any],
    folder: Path,
    *,
    phrases: int = 5,
    tile: int = 132,
) -> Image.Image:
    """Maps of phrases (rows) by the default combination and by each layer (columns), the object outlined.

    Phrases are taken evenly from the images, not by how well they do: the first one of every n-th image.

    Args:
        rows, folder: what `devil evaluate maps` recorded, and where.
        phrases: rows of the figure.
        tile: side of a map in pixels.
    """
    mapped = [example for example in examples if rows[example.key]["phrases"]]
    chosen = mapped[:: max(len(mapped) // phrases, 1)][:phrases]
    found = [_line(processor, example, rows[example.key], folder, turn, tile) for turn, example in enumerate(chosen)]
    lines = [line for line in found if line is not None]
    if not lines:
        return Image.new("RGB", (2 * MARGIN, 2 * MARGIN), PAPER)
    # Grad-CAM has no unit in common with evidence, and is of some phrases only.
    names = [name for name in lines[0][2] if name != GRADCAM]
    names = [DEFAULT_COMBINATION, *(name for name in names if name != DEFAULT_COMBINATION)]
    # What speaks against a phrase can be many times as strong as what speaks for it, and would pale the rest.
    limit = max(max(float(maps[name].max()) for _, _, maps, _ in lines for name in names), 0.1)
    step, heading = tile + GAP, 26
    width = 2 * MARGIN + (len(names) + 1) * step - GAP
    figure = Image.new("RGB", (width, 2 * MARGIN + heading + len(lines) * (tile + 30) + 50), PAPER)
    draw = ImageDraw.Draw(figure)
    for column, name in enumerate(["truth", *names]):
        size, words = fit(name, tile, 20, (15, 13, 11))
        write(draw, (MARGIN + column * step, MARGIN), words, size, MUTED)
    for number, (phrase, crop, maps, mask) in enumerate(lines):
        top = MARGIN + heading + number * (tile + 30)
        size, words = fit(phrase, width - 2 * MARGIN, 22, (15, 13))
        write(draw, (MARGIN, top), words, size, INK)
        edge = outline(mask)
        figure.paste(_outlined(crop, edge), (MARGIN, top + 22))
        for column, name in enumerate(names, 1):
            one = map_tile(crop, enlarge(maps[name], mask.shape), (-limit, limit), True)
            figure.paste(_outlined(one, edge), (MARGIN + column * step, top + 22))
    bar = color_bar((-limit, limit), UNITS["evidence"], width=min(320, width - 2 * MARGIN))
    figure.paste(bar, (MARGIN, figure.height - MARGIN - 50))
    return figure


def _line(processor, example, row, folder, turn: int, tile: int):
    """Phrase, crop, its maps by name and its mask, at the size of a tile; None, and a warning, of an image that is broken."""
    try:
        image = read_picture(example.read)
    except BadImage as error:
        logger.warning(f"{example.key} is left out of the figure: {error}")
        return None
    at = turn % len(row["phrases"])
    masks, maps = read_arrays(folder / "maps" / row["file"])
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    mean, std = (
        np.array(values)[:, None, None] for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    crop = Image.fromarray(np.round(np.clip(pixels * std + mean, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))
    scale = tile / max(crop.size)
    size = (round(crop.width * scale), round(crop.height * scale))
    mask = np.asarray(Image.fromarray(masks[at]).resize(size, Image.Resampling.NEAREST))
    own = {name: one[at] for name, one in maps.items() if name != GRADCAM}
    return row["phrases"][at], crop.resize(size, Image.Resampling.BICUBIC), own, mask


def _outlined(picture: Image.Image, edge: np.ndarray) -> Image.Image:
    pixels = np.array(picture)
    pixels[edge] = TRUTH
    return Image.fromarray(pixels)


__all__ = ["localisation_figure"]
