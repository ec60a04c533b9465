"""Pictures of emergence: phrases against depth and place in one image, and groups of phrases against depth over many."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from devil_hf.model.outputs_devil import AttributionOutput
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.emergence import ERROR_RATE
from devil_hf.report.colours import PAPER
from devil_hf.report.curves import SERIES, Curve, curves_panel, side_by_side
from devil_hf.report.drawing import MARGIN
from devil_hf.report.figures import attribution_figure

TILE = 160  # longest side of a map
EVIDENCE = "evidence in the whole image, nats per token over the null prefix"


def emergence_figure(
    processor: DevilProcessor, image: Any, maps: AttributionOutput, evidence: Mapping[str, Tensor], phrases: Sequence[str]
) -> Image.Image:
    """Maps of every phrase (rows) at every layer (columns), and below them the curve of each phrase's evidence over the layers.

    Args:
        processor: the processor that prepared the image.
        image: the image, in any form that `load_images` accepts.
        maps: what `model.attribute` returned.
        evidence: what `evidence_by_layer` returned for this image, layer -> (1, K).
        phrases: the K phrases.
    """
    layers = list(evidence)
    curves = [
        Curve(phrase, [float(evidence[layer][0, at]) for layer in layers], SERIES[at % len(SERIES)])
        for at, phrase in enumerate(phrases)
    ]
    grid = attribution_figure(processor, image, maps, phrases, tile=TILE)
    panel = curves_panel(EVIDENCE, layers, curves, base=0.0)
    figure = Image.new("RGB", (max(grid.width, panel.width + 2 * MARGIN), grid.height + panel.height + MARGIN), PAPER)
    figure.paste(grid, (0, 0))
    figure.paste(panel, (MARGIN, grid.height))
    return figure


def depths_figure(depths: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str) -> Image.Image:
    """How well each group's true phrases are told from false ones at each layer, and the evidence of both.

    Args:
        depths: group -> layer -> the fields of a `Depth`; of more groups than there are colours, the first ones.
        name: of the images.
    """
    shown = dict(list(depths.items())[: len(SERIES)])
    layers = list(next(iter(shown.values())))
    told, evidence = [], []
    for colour, (group, by_layer) in zip(SERIES, shown.items(), strict=False):
        rows = [by_layer[layer] for layer in layers]
        above = [row["p_value"] <= ERROR_RATE for row in rows]
        told.append(Curve(group, [row["auroc"] for row in rows], colour, [row["auroc_interval"] for row in rows], above))
        for kind, dashed in (("true", False), ("false", True)):
            intervals = [row[f"{kind}_interval"] for row in rows]
            evidence.append(Curve("" if dashed else group, [row[kind] for row in rows], colour, intervals, dashed=dashed))
    left_out = f" {len(depths) - len(shown)} more groups are not drawn." if len(depths) > len(shown) else ""
    least = min([0.4, *(end for curve in told for one in curve.intervals if one for end in one)])
    panels = [
        curves_panel(
            f"AUROC of true against false phrases; {name}",
            layers,
            told,
            base=0.5,
            ends=(max(round(least - 0.05, 1), 0.0), 1.0),
            note=f"Band: 95 % interval. Filled: above chance, p <= {ERROR_RATE:g} over all groups and layers.{left_out}",
        ),
        curves_panel(EVIDENCE, layers, evidence, base=0.0, note="Lines: true phrases. Dashes: false ones."),
    ]
    return side_by_side(panels)


__all__ = ["depths_figure", "emergence_figure"]
