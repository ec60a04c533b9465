"""A picture of what each layer knows: heat tables of questions, layers by classes of words."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from devil_hf.report.colours import INK, MUTED, PAPER, RULE, heat
from devil_hf.report.drawing import GAP, MARGIN, fit, font, line_height, write

Table = Mapping[str, Mapping[str, float]]
HEADINGS = 96  # height of the title, the questions and the classes
NOTE = "Per cent right. Colour: from chance (white) to always right (blue)."


def knowledge_figure(panels: Mapping[str, Table], chance: Table, title: str, *, cell: tuple[int, int] = (76, 38)) -> Image.Image:
    """Heat tables side by side: one question each, layers by classes of words, coloured from chance (white) to always right.

    Args:
        panels: heading -> layer -> class -> share in [0, 1]; the layers of all panels are the rows, shallowest first.
        chance: heading -> class -> share without knowledge, shown as the last row; the colour of a cell is its share above this.
        title: of the whole figure.
        cell: width and height of a cell.
    """
    width, height = cell
    layers = list(dict.fromkeys(layer for table in panels.values() for layer in table))
    classes = {heading: list(dict.fromkeys(c for row in t.values() for c in row)) for heading, t in panels.items()}
    left = MARGIN + round(max(font(15).getlength(layer) for layer in (*layers, "chance"))) + GAP
    right = left + sum(len(names) * width + 2 * GAP for names in classes.values())
    top = MARGIN + HEADINGS
    bottom = top + (len(layers) + 1) * height + 8
    figure = Image.new("RGB", (right - 2 * GAP + MARGIN, bottom + MARGIN + 44), PAPER)
    draw = ImageDraw.Draw(figure)
    write(draw, (MARGIN, MARGIN - 8), title, 20)
    for row, layer in enumerate(layers):
        write(draw, (MARGIN, top + row * height + height / 2), layer, 15, MUTED, "lm")
    write(draw, (MARGIN, bottom - height / 2), "chance", 15, MUTED, "lm")
    for heading, table in panels.items():
        span = len(classes[heading]) * width
        size, lines = fit(heading, span, 2 * line_height(15), (15, 13, 12))
        write(draw, (left, top - 62), lines, size)
        for column, name in enumerate(classes[heading]):
            shares = [table.get(layer, {}).get(name) for layer in layers]
            _write_column(draw, (left + column * width, top), cell, name, shares, chance[heading].get(name))
        draw.line((left, bottom - height + 2, left + span - 3, bottom - height + 2), fill=RULE)
        left += span + 2 * GAP
    write(draw, (MARGIN, bottom + GAP), NOTE, 14, MUTED)
    return figure


def _write_column(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    cell: tuple[int, int],
    name: str,
    shares: Sequence[float | None],
    base: float | None,
) -> None:
    """A class of words over its shares at each layer, with that of chance below."""
    (x, top), (width, height) = corner, cell
    write(draw, (x + width / 2, top - 10), name, 14, MUTED, "mm")
    for row, share in enumerate(shares):
        if share is not None:
            _heat_cell(draw, (x, top + row * height, width - 3, height - 3), share, base or 0.0)
    if base is not None:
        middle = top + len(shares) * height + 8 + height / 2
        write(draw, (x + width / 2, middle), f"{100 * base:.0f}", 15, MUTED, "mm")


def _heat_cell(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], value: float, base: float) -> None:
    """One cell with its percentage."""
    x, y, width, height = box
    share = min(max((value - base) / max(1 - base, 1e-6), 0.0), 1.0)
    draw.rounded_rectangle((x, y, x + width, y + height), radius=4, fill=heat(share))
    write(draw, (x + width / 2, y + height / 2), f"{100 * value:.0f}", 16, PAPER if share > 0.5 else INK, "mm")


__all__ = ["knowledge_figure"]
