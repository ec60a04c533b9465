"""Checked labels: does a unit's label predict what the unit does on images that it was not made from?

For every held-out image the label simulates the unit: the evidence of the label at the image under the model, in nats per
token over the null prefix. An image that makes every label likely (or none) says nothing of one unit, so the mean evidence of
all labels at the image is taken off. The simulation is compared with the unit's peak activation by two measures that notice
missing and surplus labels alike: Pearson correlation, and the area under the precision-recall curve (average precision) of
finding the tenth of the images that drive the unit most. p-values are one-sided, by permutation of the images (own code: one
set of permutations serves all units, which scipy's tests cannot share); a label passes
when its q-value (Benjamini and Hochberg, over all tested units, which are those with a label) stays within `alpha`. The most
frequent label, given to every unit, is tested beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from devil_hf.data.images import ImageStream
from devil_hf.data.unit_reader import UnitReader, pixel_batches
from devil_hf.evaluation.units.labels import most_frequent
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.statistics import false_discovery

POSITIVE_SHARE = 0.1
FEWEST_IMAGES, FEWEST_PERMUTATIONS, LEAST_ALPHA = 20, 100, 0.001
PHRASES = 256  # labels scored at once


@torch.no_grad()
def held_out_activations(reader: UnitReader, processor: DevilImageProcessor, images: ImageStream, batch_size: int = 32) -> Tensor:
    """Peak activations (U, N) of all units, layer by layer, at N images."""
    peaks = []
    for _, pixel_values, _ in tqdm(pixel_batches(images, processor, batch_size), desc="held-out activations", unit="batch"):
        peaks.append(torch.cat([activations.amax(dim=(2, 3)) for activations, _ in reader(pixel_values)], dim=1).cpu())
    if sum(len(part) for part in peaks) < FEWEST_IMAGES:
        raise ValueError(
            f"{sum(len(part) for part in peaks)} held-out images are too few to check a label: give {FEWEST_IMAGES} or more"
        )
    return torch.cat(peaks).T.contiguous()


@torch.no_grad()
def held_out_evidence(
    model: DevilModel,
    processor: DevilProcessor,
    images: ImageStream,
    labels: Sequence[str],
    batch_size: int = 32,
    carrier: str | None = None,
) -> Tensor:
    """Evidence (K, N), nats per token over the null prefix, of K labels at N images, each image whole with all its layers."""
    if not labels or not all(labels):
        raise ValueError("evidence needs labels, none of them empty")
    groups = _by_length(model, processor, labels, carrier)
    null = model.null_prefix()
    priors = [model.score_prefix(null, phrases).sum(dim=-1) for _, phrases in groups]
    columns = []
    batches = pixel_batches(images, processor.image_processor, batch_size)
    for _, pixel_values, _ in tqdm(batches, desc="held-out evidence", unit="batch"):
        prefix = model.ask(pixel_values)
        column = torch.empty(len(labels), len(prefix))
        for (positions, phrases), prior in zip(groups, priors, strict=True):
            scores = model.score_prefix(prefix, phrases).sum(dim=-1)
            column[positions] = ((scores - prior) / phrases["scored_mask"].sum(dim=1)).T.cpu().float()
        columns.append(column)
    return torch.cat(columns, dim=1)


def _by_length(
    model: DevilModel, processor: DevilProcessor, labels: Sequence[str], carrier: str | None
) -> list[tuple[Tensor, dict]]:
    """Labels of equal length in tokens together, so that none is padded: their positions and their phrases."""
    lengths = [len(processor.tokenizer(label)["input_ids"]) for label in labels]
    groups = []
    for length in sorted(set(lengths)):
        same = torch.tensor([at for at, own in enumerate(lengths) if own == length])
        for positions in same.split(PHRASES):
            texts = [labels[at] for at in positions.tolist()]
            groups.append((positions, model.check_phrases(processor(text=texts, carrier=carrier, return_tensors="pt"))))
    return groups


def check_alpha(alpha: float) -> None:
    """Raise a ValueError for a share of false discoveries that lets every label pass, or asks for permutations without end."""
    if not LEAST_ALPHA <= alpha < 1:
        raise ValueError(f"alpha={alpha} is a share of false discoveries: it must lie between {LEAST_ALPHA} and 1, such as 0.05")


def check_labels(
    activations: Tensor,
    evidence: Tensor,
    labels: Sequence[str],
    unit_labels: Sequence[str],
    permutations: int = 2_000,
    alpha: float = 0.05,
    seed: int = 0,
) -> list[dict]:
    """Test the label of every unit.

    Args:
        activations: (U, N).
        evidence: (K, N) of the K different `labels`.
        unit_labels: U of them, "" for units without a label, which are not tested.
        permutations: of the images, the same for all units; the smallest p-value is 1 / (permutations + 1). Correlations that
            none of them reaches get more, see `correlation_test`.
        alpha: share of false discoveries among the labels that pass.

    Returns:
        Per unit `pearson`, `pearson_p`, `q` (of `pearson_p`, over the tested units), `auprc`, `auprc_p`, `passed`; None and
        False where not tested, or not defined: units that do the same at every image, and labels as likely at each.
    """
    if permutations < FEWEST_PERMUTATIONS:
        raise ValueError(f"permutations={permutations} must be at least {FEWEST_PERMUTATIONS}")
    check_alpha(alpha)
    simulated = evidence - evidence.mean(dim=0) if len(labels) > 1 else evidence
    tested = [unit for unit, label in enumerate(unit_labels) if label]
    rows: list[dict] = [
        {"pearson": None, "pearson_p": None, "q": None, "auprc": None, "auprc_p": None, "passed": False} for _ in unit_labels
    ]
    if not tested:
        return rows
    order = {label: at for at, label in enumerate(labels)}
    chosen = simulated[[order[unit_labels[unit]] for unit in tested]]
    correlation, correlation_p = correlation_test(chosen, activations[tested], permutations, seed, alpha)
    precision, precision_p = precision_test(chosen, activations[tested], permutations, seed)
    q = false_discovery(correlation_p)
    varied = [bool(one.std() > 0 and other.std() > 0) for one, other in zip(chosen, activations[tested], strict=True)]
    columns = zip(tested, varied, correlation, correlation_p, q, precision, precision_p, strict=True)
    for unit, defined, r, r_p, r_q, ap, ap_p in columns:
        if not defined:
            continue
        rows[unit] = {
            "pearson": float(r),
            "pearson_p": float(r_p),
            "q": float(r_q),
            "auprc": float(ap),
            "auprc_p": float(ap_p),
            "passed": bool(r_q <= alpha),
        }
    return rows


def check_summary(rows: Sequence[dict]) -> dict[str, float | None]:
    """Means over the units where they are defined, None where none is, and the share of all units whose label passed."""
    tested = [row for row in rows if row["pearson"] is not None]
    mean = {name: sum(row[name] for row in tested) / len(tested) if tested else None for name in ("pearson", "auprc")}
    return {"units": len(rows), **mean, "passed": sum(row["passed"] for row in rows) / len(rows)}


def check_constant(activations: Tensor, evidence: Tensor, labels: Sequence[str], unit_labels: Sequence[str], **options) -> dict:
    """The same test of the most frequent label, given to every unit that has one."""
    constant = most_frequent(unit_labels)
    rows = check_labels(activations, evidence, labels, [constant if label else "" for label in unit_labels], **options)
    return {"label": constant, **check_summary(rows)}


def check_shuffled(
    activations: Tensor, evidence: Tensor, labels: Sequence[str], unit_labels: Sequence[str], seed: int = 0, **options
) -> dict:
    """The same test of labels that were dealt to other units at random; none keeps its own where that can be avoided."""
    return check_summary(check_labels(activations, evidence, labels, shuffled_labels(unit_labels, seed), seed=seed, **options))


def shuffled_labels(unit_labels: Sequence[str], seed: int = 0) -> list[str]:
    """Labels dealt anew among the units that have one, such that as few as possible keep theirs."""
    at = [unit for unit, label in enumerate(unit_labels) if label]
    generator = torch.Generator().manual_seed(seed)
    mixed = [at[int(i)] for i in torch.randperm(len(at), generator=generator)]
    # Groups of equal labels in random order, moved on by the size of the largest: no unit meets its own label unless one
    # label fills half.
    rank = {label: at for at, label in enumerate(dict.fromkeys(unit_labels[unit] for unit in mixed))}
    by_label = sorted(mixed, key=lambda unit: rank[unit_labels[unit]])
    largest = max((sum(unit_labels[u] == label for u in at) for label in {unit_labels[u] for u in at}), default=0)
    dealt = list(unit_labels)
    for position, unit in enumerate(by_label):
        dealt[unit] = unit_labels[by_label[(position + largest) % len(by_label)]]
    return dealt


def correlation_test(
    simulated: Tensor, actual: Tensor, permutations: int, seed: int = 0, alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Pearson correlation (U,) of the rows of two (U, N) tensors, and its one-sided permutation p-value.

    With `alpha`, permutations are doubled for the rows that none has reached yet, for as long as the smallest possible p-value
    would be too large for those rows to pass `false_discovery` at `alpha`: a few right labels can pass among many wrong ones.
    """
    one, other = _standardised(simulated), _standardised(actual)
    found = (one * other).sum(dim=1)
    generator = torch.Generator().manual_seed(seed)
    above = _exceeding(one, other, found, permutations, generator)
    drawn = torch.full_like(above, permutations)
    while alpha is not None:
        unreached = torch.nonzero(above == 0)[:, 0]
        if not len(unreached) or len(found) <= alpha * len(unreached) * (permutations + 1):
            break
        above[unreached] = _exceeding(one[unreached], other[unreached], found[unreached], permutations, generator)
        permutations *= 2
        drawn[unreached] = permutations
    return found, (above.double() + 1) / (drawn.double() + 1)  # exact, so that q-values at `alpha` pass


def _exceeding(one: Tensor, other: Tensor, found: Tensor, permutations: int, generator: torch.Generator) -> Tensor:
    """How many of so many permutations of the columns reach what was found, per row."""
    above = torch.zeros(len(found))
    for _ in range(permutations):
        order = torch.randperm(one.shape[1], generator=generator)
        above += (one[:, order] * other).sum(dim=1) >= found - 1e-7
    return above


def _standardised(values: Tensor) -> Tensor:
    """Rows with mean 0 and length 1; constant rows become zero."""
    centred = values.double() - values.double().mean(dim=1, keepdim=True)
    return F.normalize(centred, dim=1, eps=1e-12).float()


def precision_test(simulated: Tensor, actual: Tensor, permutations: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Average precision (U,) of finding the top tenth of each row of `actual` (U, N), and its permutation p-value."""
    images = actual.shape[1]
    positives = max(1, round(POSITIVE_SHARE * images))
    positive = torch.zeros_like(actual, dtype=torch.bool).scatter_(1, actual.topk(positives, dim=1).indices, True)
    found = ranked_precision(positive.gather(1, simulated.argsort(dim=1, descending=True, stable=True)))
    # By chance every order of the positives is as likely as any other, whatever the unit: one null serves all.
    generator = torch.Generator().manual_seed(seed)
    chance = torch.zeros(permutations, images, dtype=torch.bool)
    chance.scatter_(1, torch.rand(permutations, images, generator=generator).topk(positives, dim=1).indices, True)
    null = ranked_precision(chance).sort().values
    above = permutations - torch.searchsorted(null, found - 1e-9)
    return found.float(), (above + 1) / (permutations + 1)


def ranked_precision(hits: Tensor) -> Tensor:
    """Average precision of many rows (n, N) of hits, best first: the mean precision at the ranks of the hits.

    `statistics.average_precision` of each row, for thousands of permutations at once.
    """
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.double().cumsum(dim=1) / ranks
    return (precision * hits).sum(dim=1) / hits.sum(dim=1)
