"""The reliability diagram: how often answers are right, against how sure they are."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from devil_hf.report.colours import COOL, INK, MUTED, PAPER, RULE
from devil_hf.report.drawing import GAP, MARGIN, line_height, write

HEADINGS, AXIS = 64, 46  # heights above and below the panels


def reliability_figure(
    panels: Mapping[str, Sequence[Sequence[float | None]]], notes: Mapping[str, str], title: str, side: int = 200
) -> Image.Image:
    """Panels side by side: bars of the share that is right over confidence, as wide as their bin, and the diagonal of a perfect
    answerer; below each, how many answers a bin holds.

    Args:
        panels: heading -> bins of equal width over [0, 1]: (answers, mean confidence, share right), the latter NaN or None in
            an empty bin.
        notes: heading -> a line below it.
        title: of the whole figure.
        side: of a panel.
    """
    counts = 44
    width = 2 * MARGIN + 24 + len(panels) * (side + GAP)
    figure = Image.new("RGB", (width, MARGIN + HEADINGS + side + GAP + counts + AXIS + MARGIN), PAPER)
    draw = ImageDraw.Draw(figure)
    write(draw, (MARGIN, MARGIN - 8), title, 20)
    top = MARGIN + HEADINGS
    bottom = top + side
    for share in (0.0, 0.5, 1.0):
        write(draw, (MARGIN + 18, bottom - share * side), f"{share:g}", 13, MUTED, "rm")
    for number, (heading, bins) in enumerate(panels.items()):
        left = MARGIN + 24 + number * (side + GAP)
        write(draw, (left, top - 2 * line_height(14) - 4), [heading, notes.get(heading, "")], 14)
        _draw_panel(draw, (left, top), side, bins, counts)
    write(
        draw,
        (MARGIN + 24, bottom + GAP + counts + 26),
        "confidence; bars: share right, lines: mean confidence; below: number of answers",
        13,
        MUTED,
    )
    return figure


def _draw_panel(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, bins: Sequence[Sequence[float | None]], counts: int
) -> None:
    (left, top), step = corner, side / len(bins)
    bottom = top + side
    draw.rectangle((left, top, left + side, bottom), outline=RULE)
    most = max(float(one[0] or 0) for one in bins) or 1.0
    floor = bottom + GAP + counts
    for at, (number, confidence, right) in enumerate(bins):
        if not number or right is None or confidence is None or math.isnan(right):
            continue
        x = left + at * step
        draw.rectangle((x + 1, bottom - right * side, x + step - 1, bottom), fill=COOL)
        y = bottom - confidence * side
        draw.line((x, y, x + step, y), fill=INK, width=2)
        draw.rectangle((x + 1, floor - max(number / most * counts, 1), x + step - 1, floor), fill=MUTED)
    draw.line((left, bottom, left + side, top), fill=RULE, width=2)
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        write(draw, (left + share * side, floor + 5), f"{share:g}", 13, MUTED, anchor)


__all__ = ["reliability_figure"]
