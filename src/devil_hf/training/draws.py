"""What a model in training mode does otherwise: it hides layers and locations at random, as the configuration wants it (paper,
sections 3.1 and 3.2), and reads its captions in groups of like length.

Registered with the model, so that `model.train(); model(pixel_values, input_ids)` does so in anybody's own loop.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from devil_hf.model.checkpoint_devil import COMPANIONS
from devil_hf.model.pooling_devil import region_weights
from devil_hf.model.scoring_devil import run_language_model
from devil_hf.training.attention import short_attention

COMPANIONS["training"] = sys.modules[__name__]

GROUP_ROWS = 32  # captions that are read at once on a CPU: of fewer, matrices are too small; of more, padding is read


def location_dropout(
    rows: int,
    grids: Sequence[Sequence[int]],
    probability: float,
    schedule: str,
    whole_probability: float,
    device=None,
    regions: Tensor | None = None,
    region_schedule: str | None = None,
) -> list[Tensor]:
    """Draw training weights, one (rows, H_l, W_l) per layer: uniform over a random, never empty subset of its locations.

    `"constant"` drops each location with `probability` (paper). `"log_uniform"` draws the number of kept locations of each
    layer log-uniformly between one and all, so that few places and many are both common, and with `whole_probability` shows
    a row whole in every layer: what most questions will be.

    With `regions` (rows, H_in, W_in), soft masks of which no row is empty, the subset is one of the locations that lie at least
    half as much in the region as the one that lies in it most, weighted by how much they do (beyond the paper). Where a large
    part of the region fills a location, small parts elsewhere are thereby left out. Rows whose region leaves out anything follow
    `region_schedule`, where one is given: phrases say what single places hold, and captions of whole images need not.
    """
    whole = torch.rand(rows, 1, device=device) < whole_probability
    few = torch.full((rows, 1), schedule == "log_uniform", device=device)
    if regions is not None and region_schedule is not None:
        partial = (regions.flatten(1).amin(dim=1, keepdim=True) < 1).to(few.device)
        few = few.masked_fill(partial, region_schedule == "log_uniform")
    weights = []
    for H, W in grids:
        share = torch.ones(rows, H * W, device=device)
        if regions is not None:
            share = region_weights(regions[:, None], (H, W))[0].flatten(1).to(share)
        eligible = share >= 0.5 * share.amax(dim=1, keepdim=True)
        draw = torch.rand(rows, H * W, device=device)
        # A random order in which the eligible locations come first; `rank` 0 is the first.
        rank = draw.masked_fill(~eligible, 2.0).argsort(dim=1).argsort(dim=1)  # (rows, H * W)
        places = eligible.sum(dim=1, keepdim=True)
        keep = (draw >= probability) | (rank == places - 1)
        if few.any():
            kept = torch.exp(torch.rand(rows, 1, device=device) * places.log()).round()
            keep = torch.where(few, (rank < kept) | whole, keep)
        mass = keep * eligible * share
        weights.append((mass / mass.sum(dim=1, keepdim=True)).view(rows, H, W))
    return weights


def layer_dropout(
    rows: int, layers: int, probability: float, null_probability: float, all_layers_probability: float = 0.0, device=None
) -> Tensor:
    """Draw a training layer mask (rows, L), True = hidden: never all hidden unless the null prefix is drawn.

    Args:
        probability: that a layer is hidden.
        null_probability: that every layer of a row is hidden.
        all_layers_probability: that none is, of the other rows and beyond what `probability` gives.
    """
    draw = torch.rand(rows, layers, device=device)
    hidden = draw < probability
    hidden.scatter_(1, draw.argmax(dim=1, keepdim=True), False)
    if all_layers_probability:
        hidden &= torch.rand(rows, 1, device=device) >= all_layers_probability
    null = torch.rand(rows, 1, device=device) < null_probability
    return hidden | null


def draw_location_weights(config, rows: int, feature_maps: Sequence[Tensor], regions: Tensor | None = None) -> list[Tensor]:
    """Training weights as `config` (a `DevilConfig`) wants them, one (rows, H_l, W_l) per layer; inside of `regions`."""
    return location_dropout(
        rows,
        [maps.shape[-2:] for maps in feature_maps],
        config.location_dropout,
        config.location_schedule,
        config.whole_probability,
        feature_maps[0].device,
        regions,
        config.region_schedule,
    )


def draw_layer_mask(config, rows: int, layers: int, device=None) -> Tensor:
    """A training layer mask (rows, L) as `config` (a `DevilConfig`) wants it."""
    return layer_dropout(rows, layers, config.layer_dropout, config.null_probability, config.all_layers_probability, device)


def caption_loss(language_model, labels: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of a batch of captions in nats (paper, equation 3), without the padding that the longest asks of all.

    On a CPU captions are read in groups of like length, each as long as its own longest; on other devices all at once.

    Args:
        labels: (B, T) tokens, -100 on padding, which is on the right alone.
        embeds, mask: (B, P + T, D_lm) and (B, P + T), the start of P vectors before the caption included.
    """
    labels, mask = labels.to(embeds.device), mask.to(embeds.device)
    rows, longest = labels.shape
    start = embeds.shape[1] - longest
    lengths = (labels != -100).sum(dim=1)
    groups = -(-rows // GROUP_ROWS) if embeds.device.type == "cpu" else 1
    total = embeds.new_zeros((), dtype=torch.float32)
    for group in lengths.argsort(stable=True).chunk(groups) if groups > 1 else [slice(None)]:
        length = max(1, int(lengths[group].max())) if groups > 1 else longest
        read = slice(0, start + length - 1)  # what would follow the last token is nobody's label
        with short_attention(embeds.device):
            logits = run_language_model(language_model, embeds[group, read], length, mask[group, read]).logits
        wanted = labels[group, :length].to(logits.device).flatten()
        total = total + F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="sum").to(total.device)
    return total / lengths.sum()


__all__ = ["caption_loss", "draw_layer_mask", "draw_location_weights", "layer_dropout", "location_dropout"]
