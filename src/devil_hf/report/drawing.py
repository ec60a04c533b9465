"""What figures are drawn with, by Pillow alone: text that fits, tiles of maps, the colour bar. Sizes are in pixels."""

import importlib.util
import unicodedata
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from devil_hf.model.image_processing_devil import load_images
from devil_hf.report.colours import INK, MUTED, PAPER, Colour
from devil_hf.report.overlays import colorize, overlay_map

MARGIN, GAP = 32, 14


# Looked for, by name, where the system keeps its fonts; DejaVu also in matplotlib, where that is installed.
OTHER_FONTS = (
    *(
        "DejaVuSans.ttf",
        "NotoSans-Regular.ttf",
        "NotoSansCJK-Regular.ttc",
        "NotoSansSC-Regular.otf",
        "NotoSansArabic-Regular.ttf",
    ),
    *("NotoSansDevanagari-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansThai-Regular.ttf", "NotoSansBengali-Regular.ttf"),
    *("NotoSansTamil-Regular.ttf", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "unifont.otf", "FreeSans.ttf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "msyh.ttc", "Nirmala.ttf", "arial.ttf"),
)


@lru_cache
def font(size: int, text: str = "") -> Any:
    """Pillow's own font, or the first of `OTHER_FONTS` that has every character of `text`; a warning where none has."""
    missing = {face: _missing(face, text) for face in range(len(OTHER_FONTS) + 1) if _face(face, size) is not None}
    best = min(missing, key=lambda face: len(missing[face]))
    for script in sorted({unicodedata.name(character, "unknown").split()[0].title() for character in missing[best]}):
        warnings.warn(
            f"no font here has the {script} characters of a figure: they are drawn as boxes. Install one that has them, such as "
            "Noto Sans (`apt install fonts-noto`, or fonts.google.com/noto).",
            stacklevel=2,
        )
    return _face(best, size)


@lru_cache
def _face(number: int, size: int) -> Any:
    """Pillow's own font (0) or one of `OTHER_FONTS` (from 1); None where the system does not have it."""
    if number == 0:
        return ImageFont.load_default(size)
    name = OTHER_FONTS[number - 1]
    matplotlib = importlib.util.find_spec("matplotlib")
    inside = [Path(str(matplotlib.origin)).parent / "mpl-data" / "fonts" / "ttf" / name] if matplotlib else []
    for place in (name, *inside):
        try:
            return ImageFont.truetype(str(place), size)
        except OSError:
            continue
    return None


@lru_cache(maxsize=4096)
def _missing(number: int, text: str) -> set[str]:
    """The characters of `text` that a font has no glyph for: they look like one that no font has."""
    face = _face(number, 16)
    box = bytes(face.getmask("\U0010fffe"))
    shown = {character for character in text if unicodedata.category(character) not in ("Mn", "Cf", "Zs", "Cc")}
    return {character for character in shown if not character.isascii() and bytes(face.getmask(character)) == box}


def wrap(text: str, size: int, width: float) -> list[str]:
    """Break `text` into lines of at most `width`; a word longer than a line is broken too."""
    face, lines, line = font(size, text), [], ""
    for word in text.split():
        while face.getlength(word) > width and len(word) > 1:
            cut = next((n for n in range(len(word) - 1, 1, -1) if face.getlength(word[:n]) <= width), 1)
            lines += [line] * bool(line) + [word[:cut]]
            line, word = "", word[cut:]
        joined = f"{line} {word}" if line else word
        if line and face.getlength(joined) > width:
            lines.append(line)
            line = word
        else:
            line = joined
    return lines + [line] * bool(line)


def line_height(size: int) -> int:
    """Pixels from one line of text to the next."""
    return round(size * 1.28)


def fit(text: str, width: float, height: float, sizes: Sequence[int]) -> tuple[int, list[str]]:
    """The largest of `sizes` (descending) at which `text` fits, and its lines; cut with an ellipsis at the smallest."""
    for size in sizes:
        lines = wrap(text, size, width)
        if len(lines) * line_height(size) <= height:
            return size, lines
    lines = lines[: max(int(height // line_height(size)), 1)]
    while lines[-1] and font(size, lines[-1]).getlength(lines[-1] + "…") > width:
        lines[-1] = lines[-1][:-1]
    return size, [*lines[:-1], lines[-1].rstrip() + "…"]


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    lines: str | Sequence[str],
    size: int,
    color: Colour = INK,
    anchor: str = "la",
) -> None:
    """Write lines below each other; `anchor` says where `at` is in the first, as Pillow has it."""
    for number, line in enumerate([lines] if isinstance(lines, str) else lines):
        draw.text((at[0], at[1] + number * line_height(size)), line, fill=color, font=font(size, line), anchor=anchor)


def scaled(image: Image.Image, longest: int) -> Image.Image:
    """The picture with its longer side at `longest`."""
    scale = longest / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def only_image(image: Any) -> Image.Image:
    """The image, in any form that `load_images` accepts; a ValueError for several."""
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
    write(draw, (0, 0), label, 13, MUTED)
    for x, value, anchor in ((0, low, "la"), (width / 2, (low + high) / 2, "ma"), (width, high, "ra")):
        write(draw, (x, 37), signed(value), 13, INK, anchor)
    return bar


def signed(value: float) -> str:
    """A number with its sign; zero has none."""
    text = f"{value:+.2f}"
    return "0" if float(text) == 0 else text


def _peak(values: np.ndarray) -> tuple[int, int]:
    """(x, y) of the highest value that is not NaN."""
    y, x = np.unravel_index(np.nanargmax(values), values.shape)
    return int(x), int(y)


def map_tile(picture: Image.Image, values: np.ndarray, value_range: tuple[float, float], symmetric: bool) -> Image.Image:
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
    left, top = tile.width - font(12).getlength(text) - 14, tile.height - 22
    draw.rounded_rectangle((left, top, tile.width - 4, tile.height - 4), radius=5, fill=INK)
    write(draw, (left + 5, top + 2), text, 12, PAPER)
    return tile


__all__ = [
    "GAP",
    "MARGIN",
    "color_bar",
    "fit",
    "font",
    "line_height",
    "map_tile",
    "only_image",
    "scaled",
    "signed",
    "wrap",
    "write",
]
