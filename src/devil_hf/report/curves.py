"""Curves over layers, drawn with Pillow alone: a panel with an axis of layers, bands of intervals, and names of the curves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from devil_hf.report.colours import MUTED, PAPER, RULE, Colour
from devil_hf.report.drawing import GAP, MARGIN, fit, font, line_height, wrap, write

# Told apart by people who see colours differently (Okabe and Ito), and from each other in grey, as far as eight can be.
SERIES: tuple[Colour, ...] = (
    *((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)),
    *((86, 180, 233), (120, 94, 30), (230, 159, 0), (90, 90, 90)),
)
INSET = 8  # of the ends of the scale, so that dots there are whole
SCALE = 2  # curves are drawn larger and made smaller, for smooth lines
PLOT, LABELS, AXIS = (440, 300), 170, 54  # sizes: of the plot, of the names at its right, of the scale at its left


@dataclass(frozen=True)
class Curve:
    """A line over the layers.

    Args:
        name: written beside it; none for a line that another one explains.
        values: one per layer.
        colour: of the line.
        intervals: (low, high) per layer, drawn as a band; None where there is none.
        filled: per layer, whether its dot is filled.
        dashed: whether the line is.
    """

    name: str
    values: Sequence[float]
    colour: Colour
    intervals: Sequence[tuple[float, float] | None] = ()
    filled: Sequence[bool] = ()
    dashed: bool = False


def curves_panel(
    title: str,
    layers: Sequence[str],
    curves: Sequence[Curve],
    base: float,
    ends: tuple[float, float] | None = None,
    note: str = "",
) -> Image.Image:
    """Curves over layers.

    Args:
        title: above the panel.
        layers: from left to right; "all" stands apart, and no line leads to it.
        curves: over these layers.
        base: of a rule across the panel: chance, or nothing.
        ends: of the scale; by default what holds all values and the base.
        note: below the panel.
    """
    width, height = PLOT
    known = [value for curve in curves for value in (*curve.values, *(end for one in curve.intervals if one for end in one))]
    low, high = ends or _rounded(min([*known, base]), max([*known, base]))
    lines = wrap(note, 13, AXIS + width + LABELS) if note else []
    head = 34
    panel = Image.new("RGB", (AXIS + width + LABELS, head + height + 44 + len(lines) * line_height(13)), PAPER)
    draw = ImageDraw.Draw(panel)
    size, heading = fit(title, panel.width, 24, (16, 14, 12))
    write(draw, (0, 0), heading, size)
    places = _places(layers, width)

    def y(value: float) -> float:
        return height - INSET - (value - low) / (high - low) * (height - 2 * INSET)

    plot = _plot(curves, places, layers, [y(base), *map(y, _ticks(low, high))], y)
    panel.paste(plot, (AXIS, head))
    for value in _ticks(low, high):
        write(draw, (AXIS - 8, head + y(value)), f"{value:g}", 13, MUTED, "rm")
    _write_layers(draw, layers, [AXIS + x for x in places], head + height + 8)
    _write_names(draw, curves, (AXIS + width + 8, head), height, y)
    write(draw, (0, head + height + 44), lines, 13, MUTED)
    return panel


def _places(layers: Sequence[str], width: int) -> list[float]:
    """Where each layer stands from left to right; "all", behind them, half a step further."""
    steps = [at + (0.5 if layer == "all" and at else 0.0) for at, layer in enumerate(layers)]
    return [24 + (width - 48) * step / (steps[-1] or 1) for step in steps]


def _plot(
    curves: Sequence[Curve], places: Sequence[float], layers: Sequence[str], rules: Sequence[float], y: Callable[[float], float]
) -> Image.Image:
    """The bands, lines and dots, above the rules."""
    width, height = PLOT
    plot = Image.new("RGBA", (width * SCALE, height * SCALE), PAPER)
    draw = ImageDraw.Draw(plot)
    for number, level in enumerate(rules):
        draw.line(
            (0, level * SCALE, width * SCALE, level * SCALE), fill=RULE if number else MUTED, width=SCALE if number else SCALE + 1
        )
    count = len(layers) - (layers[-1] == "all" and len(layers) > 1)  # of those that a line joins
    for curve in curves:
        pairs = [(x * SCALE, one) for x, one in zip(places, curve.intervals, strict=False)]
        edges = [(x, one) for x, one in pairs[:count] if one is not None]
        band = Image.new("RGBA", plot.size, (0, 0, 0, 0))
        if len(edges) > 1:
            points = [(x, y(one[1]) * SCALE) for x, one in edges] + [(x, y(one[0]) * SCALE) for x, one in reversed(edges)]
            ImageDraw.Draw(band).polygon(points, fill=(*curve.colour, 46))
        for x, one in pairs[count:]:
            if one is not None:
                ImageDraw.Draw(band).line(
                    (x, y(one[0]) * SCALE, x, y(one[1]) * SCALE), fill=(*curve.colour, 120), width=5 * SCALE
                )
        plot = Image.alpha_composite(plot, band)
    draw = ImageDraw.Draw(plot)
    for curve in curves:
        points = [(x * SCALE, y(value) * SCALE) for x, value in zip(places, curve.values, strict=True)]
        _line(draw, points[:count], curve)
        for at, (x, level) in enumerate(points):
            filled, radius = not curve.filled or curve.filled[at], 4 * SCALE
            box = (x - radius, level - radius, x + radius, level + radius)
            draw.ellipse(box, fill=curve.colour if filled else PAPER, outline=curve.colour, width=2 * SCALE)
    return plot.convert("RGB").resize(PLOT, Image.Resampling.LANCZOS)


def _line(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], curve: Curve) -> None:
    for start, end in pairwise(points):
        parts = 12 if curve.dashed else 1
        for part in range(0, parts, 2):
            cut = [tuple(a + (b - a) * share / parts for a, b in zip(start, end, strict=True)) for share in (part, part + 1)]
            draw.line([*cut[0], *cut[1]], fill=curve.colour, width=2 * SCALE)


def _write_layers(draw: ImageDraw.ImageDraw, layers: Sequence[str], places: Sequence[float], top: float) -> None:
    """The names of the layers below their places, counted from the last one as many as there is room for."""
    wide = max(font(13, layer).getlength(layer) for layer in layers) + 8
    free = float("inf")
    for layer, x in reversed(list(zip(layers, places, strict=True))):
        if x + wide / 2 <= free:
            write(draw, (x, top), layer, 13, MUTED, "ma")
            free = x - wide / 2


def _write_names(
    draw: ImageDraw.ImageDraw, curves: Sequence[Curve], corner: tuple[int, int], height: int, y: Callable[[float], float]
) -> None:
    """The name of each curve at the height of its last value, moved apart where they would touch."""
    step = line_height(13)
    named = sorted((curve for curve in curves if curve.name), key=lambda curve: y(curve.values[-1]))
    levels: list[float] = []
    for curve in named:
        levels.append(max(y(curve.values[-1]), levels[-1] + step if levels else 0.0))
    for at in range(len(levels)):  # those that were pushed below the panel push the others up
        levels[at] = min(levels[at], height - (len(levels) - 1 - at) * step)
    for curve, level in zip(named, levels, strict=True):
        size, lines = fit(curve.name, LABELS - 10, step, (13, 12, 11))
        write(draw, (corner[0], corner[1] + level), lines[:1], size, curve.colour, "lm")


def _step(low: float, high: float) -> float:
    """A round number that divides a scale into four to ten parts."""
    power = 10.0 ** math.floor(math.log10(high - low))
    return next(power * factor for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if (high - low) / (power * factor) <= 10)


def _rounded(low: float, high: float) -> tuple[float, float]:
    """The ends of a scale that holds both values."""
    high = max(high, low + 1e-3)
    step = _step(low, high)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    return [round(at * step, 9) for at in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels on one sheet of paper, with a margin."""
    width = sum(panel.width for panel in panels) + (len(panels) - 1) * 2 * GAP
    figure = Image.new("RGB", (width + 2 * MARGIN, max(panel.height for panel in panels) + 2 * MARGIN), PAPER)
    left = MARGIN
    for panel in panels:
        figure.paste(panel, (left, MARGIN))
        left += panel.width + 2 * GAP
    return figure


__all__ = ["SERIES", "Curve", "curves_panel", "side_by_side"]
