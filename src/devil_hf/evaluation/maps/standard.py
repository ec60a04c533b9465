"""The measures of maps that are reported, in this order.

| measure | what it is | chance |
|---|---|---|
| pointing | is the maximum on the object, within half a cell | cells that count as hits (`pointing_chance`) |
| pointing_exact | the same without tolerance, the field's own rule | cells (`pointing_exact_centre`: the middle of the image) |
| energy | share of the positive evidence that lies on the object | area |
| average_precision | pixels ranked by the map | area |
| iou | overlap with the pixels that have at least half of the map's maximum | area |
| iou_best | the same at the one level, for all maps, that is best with the masks in hand | area |
| miou | intersection over union of all images together, per phrase, averaged over phrases | area |
| choice | object pixels at which this phrase beats those of the image's other objects | one of the phrases |
| insertion, deletion | evidence for the phrase while locations are shown, or lost while they are hidden | random order |
"""

from collections.abc import Sequence

import numpy as np

from devil_hf.evaluation.maps import measures
from devil_hf.evaluation.maps.pointing import chance_pointing, pointing
from devil_hf.evaluation.maps.views import MapView, Pooled, map_measure, mean_of_phrases
from devil_hf.statistics import ratio

FIXED = int(np.argmin(np.abs(measures.LEVELS - measures.FIXED_LEVEL)))


@map_measure("pointing", by_order=True)
def _pointing(view: MapView) -> float:
    return pointing(view.values, view.mask)


@map_measure("pointing_chance", by_order=True, beside=True)
def _pointing_chance(view: MapView) -> float:
    return chance_pointing(view.grid, view.mask)


@map_measure("pointing_centre", by_order=True, beside=True)
def _pointing_centre(view: MapView) -> float:
    return pointing(measures.centre_prior(view.grid), view.mask)


@map_measure("pointing_exact", by_order=True)
def _pointing_exact(view: MapView) -> float:
    return pointing(view.values, view.mask, 0)


@map_measure("pointing_exact_centre", by_order=True, beside=True)
def _pointing_exact_centre(view: MapView) -> float:
    height, width = view.mask.shape
    return float(view.mask[height // 2, width // 2])


@map_measure("energy", from_zero=True)
def _energy(view: MapView) -> float:
    return measures.energy_pointing(view.large, view.mask)


@map_measure("average_precision", by_order=True)
def _average_precision(view: MapView) -> float:
    return measures.pixel_precision(view.large, view.mask)


@map_measure("iou")
def _iou(view: MapView) -> float:
    crossed, joined = view.overlaps[FIXED]
    return float(crossed / joined)


def _best_level(overlaps: Sequence[np.ndarray], images: np.ndarray, phrases: np.ndarray) -> Pooled:
    every = np.stack(overlaps)  # (maps, levels, 2)
    by_level = every[..., 0] / every[..., 1]
    best = by_level[:, int(by_level.mean(axis=0).argmax())]
    return mean_of_phrases(best, images, phrases)


@map_measure("iou_best", pool=_best_level)
def _iou_best(view: MapView) -> np.ndarray:
    return view.overlaps


def _by_phrase(overlaps: Sequence[np.ndarray], images: np.ndarray, phrases: np.ndarray) -> Pooled:
    crossed, joined = np.zeros((2, images.max() + 1, phrases.max() + 1))
    every = np.stack(overlaps)
    np.add.at(crossed, (images, phrases), every[:, FIXED, 0])
    np.add.at(joined, (images, phrases), every[:, FIXED, 1])
    return Pooled(float(ratio(crossed.sum(axis=0)[None], joined.sum(axis=0)[None])[0]), crossed, joined)


@map_measure("miou", pool=_by_phrase)
def _miou(view: MapView) -> np.ndarray:
    return view.overlaps


@map_measure("choice")
def _choice(view: MapView) -> float | None:
    return measures.choice(view.maps, view.masks, view.at) if view.knows_phrases else None


@map_measure("insertion", by_order=True)
def _insertion(view: MapView) -> float | None:
    return float(np.mean(view.curves["insertion"])) if "insertion" in view.curves else None


@map_measure("deletion", by_order=True)
def _deletion(view: MapView) -> float | None:
    return float(view.whole - np.mean(view.curves["deletion"])) if "deletion" in view.curves else None
