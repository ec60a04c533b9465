"""Curves are where their values are, and every name is there."""

import numpy as np
import pytest
from PIL import ImageDraw

from devil_hf.report.curves import AXIS, PLOT, SERIES, Curve, curves_panel
from devil_hf.report.emergence import depths_figure


@pytest.fixture
def written(monkeypatch) -> list[str]:
    texts: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def record(draw, xy, text, *args, **kwargs):
        texts.append(text)
        return draw_text(draw, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def rows_of(panel, colour) -> np.ndarray:
    """Rows of the plot with a pixel of a colour."""
    pixels = np.asarray(panel, dtype=int)[:, AXIS : AXIS + PLOT[0]]
    return np.where((np.abs(pixels - np.array(colour)).sum(axis=-1) < 20).any(axis=1))[0]


def test_higher_values_are_drawn_higher_and_names_stand_beside_them(written):
    curves = [Curve("low", [0.0, 0.1, 0.1], SERIES[0]), Curve("high", [0.9, 1.0, 1.0], SERIES[1], [(0.8, 1.0)] * 3)]
    panel = curves_panel("a title", ["one", "two", "all"], curves, base=0.5, ends=(0.0, 1.0), note="a note")
    assert {"low", "high", "one", "two", "all", "a title", "a note", "0", "0.5", "1"} <= set(written)
    assert rows_of(panel, SERIES[1]).max() < rows_of(panel, SERIES[0]).min()


@pytest.mark.parametrize("values", [[0.0], [1e-9, 0.0], [-3000.0, 7.0], [0.5] * 40])
def test_any_scale_and_any_number_of_layers_is_drawn(values, written):
    curves_panel("t", [f"blocks.{at}" for at in range(len(values))], [Curve("a", values, SERIES[0])], base=0.0)
    shown = [text for text in written if text.startswith("blocks.")]
    assert shown[0] == f"blocks.{len(values) - 1}" and "…" not in "".join(shown), "the deepest one, and none cut short"
    assert len(shown) == len(values) or len(shown) > 4


def test_the_groups_that_are_not_drawn_are_counted(written):
    row = {"p_value": 0.01, "auroc": 0.9, "true": 1.0, "false": -1.0}
    row |= dict.fromkeys(("auroc_interval", "true_interval", "false_interval"))
    depths_figure({f"group {at}": {"layer1": row} for at in range(10)}, "images")
    assert "group 7" in written and "group 8" not in written and any("2 more groups" in text for text in written)
