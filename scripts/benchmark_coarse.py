"""Maps from coarse to fine beside exact ones, at 56 x 56 places; `python scripts/benchmark.py coarse` runs it.

All are run in turn after a warm-up, and times are medians of CPU seconds.

The shipped checkpoint on scenes of 224 x 224 pixels, whose finest layer has 56 x 56 places. Its language model is small: what is
spent on the interpolation itself weighs more than with any other.
"""

import statistics
import time
from functools import partial

import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from devil_hf.checkpoints.loading import load
from devil_hf.data.shapes import make_scene
from devil_hf.evaluation.shapes import pixel_values
from devil_hf.questions.coarse_maps import attribute_coarsely

PHRASES = ["red", "blue", "a circle", "a striped square", "green triangle"]
SCENES = 5
SHARES = (0.25, 0.3)


def rank_correlations(found: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """Spearman's, of each map."""
    pairs = zip(found.flatten(0, 1).flatten(1), exact.flatten(0, 1).flatten(1), strict=True)
    return [float(spearmanr(one, other)[0]) for one, other in pairs]


def bilinear(exact: torch.Tensor) -> torch.Tensor:
    """Every second place of every second row, interpolated between neighbours."""
    known = exact[:, :, ::2, ::2]
    rows, columns = (2 * edge - 1 for edge in known.shape[-2:])
    between = F.interpolate(known, (rows, columns), mode="bilinear", align_corners=True)
    return F.pad(between, (0, exact.shape[3] - columns, 0, exact.shape[2] - rows), mode="replicate")


@torch.no_grad()
def coarse(repeats: int) -> dict:
    """Seconds, rank correlations (mean over scenes and phrases, and the lowest) and differences in nats per token."""
    model, processor = load("shapes", "cpu")
    pixels = F.interpolate(pixel_values(processor, [make_scene(7, index) for index in range(SCENES)]), (224, 224), mode="bicubic")
    phrases, features = processor(text=PHRASES, return_tensors="pt"), model.extract_features(pixels)
    report: dict = {}
    for name, options in {"joint": {"combine": "joint"}, "layer1": {"layers": "layer1"}}.items():
        ways = {None: partial(model.attribute, None, phrases, feature_maps=features, **options)}
        for share in SHARES:
            ways[share] = partial(attribute_coarsely, model, None, phrases, share, feature_maps=features, **options)
        taken: dict[float | None, list[float]] = {share: [] for share in ways}
        maps: dict[float | None, torch.Tensor] = {}
        for turn in range(repeats + 1):
            for share, ask in ways.items():
                began = time.process_time()
                (maps[share],) = ask().maps.values()
                taken[share] += [time.process_time() - began] if turn else []
        seconds, exact = {share: statistics.median(values) for share, values in taken.items()}, maps[None]
        ranks = rank_correlations(bilinear(exact), exact)
        report[f"{name}, 25% of the places, between neighbours"] = {"rank_correlation": sum(ranks) / len(ranks)}
        for share in SHARES:
            found = maps[share]
            ranks = rank_correlations(found, exact)
            report[f"{name}, {share:.0%} of the places"] = {
                "cpu_seconds": seconds[share],
                "ratio": seconds[None] / seconds[share],
                "rank_correlation": sum(ranks) / len(ranks),
                "lowest_rank_correlation": min(ranks),
                "rms_difference": (found - exact).square().mean().sqrt().item(),
                "largest_difference": (found - exact).abs().max().item(),
                "deviation_of_the_maps": exact.std().item(),
            }
    return {"coarse": report}
