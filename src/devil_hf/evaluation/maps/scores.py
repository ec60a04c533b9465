"""Scores of recorded maps: a table per group of phrases, chance and a centre prior beside it, with bootstrap intervals.

Intervals are of images drawn with replacement, 95 %. Measures by pixel compare maps enlarged to the crop. Within one phrase the
three measures of a map rank its places alike (evidence is the sum over the phrase's tokens, less a constant, times a
constant): `pointing` and `average_precision` are those of the evidence. The rows "sum" and "per_token" have what differs: `iou`,
`iou_best`, `miou` and `energy`, which start from zero or, for the log-probabilities, from the map's minimum (their energy is 0:
they are never positive), and `choice`, where phrases compete.

Pointing is decided on each map's own grid, where half a cell of a coarse grid is more of the image than of a fine one. So every
row has its own `pointing_chance` beside it, and in `pointing_centre` the centre prior on that grid; the rows "chance" and
"centre prior" are those of the finest grid. On boards the centre prior is that of each image. Grad-CAM is in the group of the
classes of the backbone only, since it has a map for these phrases only.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from devil_hf.data.pairs.folder import read_caption_folder
from devil_hf.evaluation.maps.collecting import CENTRE, DEFAULT_COMBINATION, GRADCAM, RANDOM, read_arrays
from devil_hf.evaluation.maps.measures import (
    FIXED_LEVEL,
    LEVELS,
    average_precision,
    bootstrap,
    centre_prior,
    choice,
    energy_pointing,
    enlarge,
    overlaps,
    ratio,
)
from devil_hf.evaluation.maps.pointing import chance_pointing, pointing
from devil_hf.evaluation.results import CHANCE, metric_name

CLASSIFIED = "classes of the backbone"
PER_PHRASE = ("pointing", "energy", "average_precision", "iou", "insertion", "deletion")
POINTING_CHANCE, POINTING_CENTRE = "pointing_chance", "pointing_centre"
METRICS = (
    PER_PHRASE[0],
    POINTING_CHANCE,
    POINTING_CENTRE,
    *PER_PHRASE[1:4],
    "iou_best",
    "miou",
    "choice",
    *PER_PHRASE[4:],
)
FIXED = int(np.argmin(np.abs(LEVELS - FIXED_LEVEL)))


@dataclass
class Sample:
    """What one row of the table has for one phrase of one image (or board)."""

    image: int
    phrase: str
    tags: tuple[str, ...]
    values: dict[str, float] = field(default_factory=dict)
    overlap: np.ndarray | None = None  # (levels, 2): intersection and union in shares of the crop


def score_maps(
    rows: Mapping[str, Any], folder: Path, seen: Collection[str] | None = None, resamples: int = 2_000, seed: int = 0
) -> dict[str, Any]:
    """Score what `collect_maps` wrote.

    Args:
        rows: key -> row, those to score.
        folder: that of the records.
        seen: class names that the training captions hold; class phrases are then reported as "seen" and "unseen".

    Returns:
        `images`: how many hold a phrase; `groups`: group -> row -> metric -> value; `intervals`: the same with (low, high);
        `counts`: group -> phrases, images, area; `boards`: the multi-object game likewise, row -> metric.

    Raises:
        ValueError: if no phrase of any image is visible in the crop.
    """
    if not any(row["phrases"] for row in rows.values() if "board" not in row):
        raise ValueError("no phrase of these images is visible in the crop: give more images (--limit), or others")
    table: dict[str, list[Sample]] = {}
    boards: dict[str, list[Sample]] = {}
    areas: list[Sample] = []
    for number, row in enumerate(tqdm(rows.values(), desc="scores", unit="image", leave=False)):
        if not row["phrases"]:
            continue
        masks, maps = read_arrays(folder / "maps" / row["file"])
        if "board" in row:
            _score_board(number, row, masks, maps, boards)
            continue
        tags = {phrase: _tags(phrase, row, seen) for phrase in row["phrases"]}
        areas += [
            Sample(number, p, tags[p], {"area": float(m.mean())}) for p, m in zip(row["phrases"], masks, strict=True)
        ]
        _score_image(number, row, masks, maps, tags, table)
    groups: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for tag in dict.fromkeys(tag for sample in areas for tag in sample.tags):
        chosen = [sample for sample in areas if tag in sample.tags]
        counts[tag] = {
            "phrases": len(chosen),
            "images": len({sample.image for sample in chosen}),
            "area": float(np.mean([sample.values["area"] for sample in chosen])),
        }
        groups[tag], intervals[tag] = {}, {}
        for name, samples in table.items():
            found = summarise([sample for sample in samples if tag in sample.tags], resamples, seed)
            if found:
                groups[tag][name] = {metric: value for metric, (value, _) in found.items()}
                intervals[tag][name] = {metric: interval for metric, (_, interval) in found.items()}
    content: dict[str, Any] = {"groups": groups, "intervals": intervals, "counts": counts}
    content["images"] = len({sample.image for sample in areas})
    summaries = {name: summarise(samples, resamples, seed) for name, samples in boards.items()}
    content["boards"] = {name: {metric: value for metric, (value, _) in one.items()} for name, one in summaries.items()}
    content["board_intervals"] = {
        name: {metric: span for metric, (_, span) in one.items()} for name, one in summaries.items()
    }
    return content


def named_in_captions(names: Collection[str], sources: Sequence[str], least: int) -> set[str]:
    """The names that the captions of at least `least` images hold as words, one or many of the thing.

    Args:
        sources: caption folders, `FOLDER` or `FOLDER:SPLIT`.
    """
    texts = []
    for source in sources:
        folder, split = (source, None) if Path(source).is_dir() else source.rpartition(":")[::2]
        if not folder:
            raise ValueError(f"--captions {source!r} is no folder: give FOLDER or FOLDER:SPLIT, such as flickr8k:train")
        texts += [" ".join(one.captions).lower() for one in read_caption_folder(folder, split)]
    counted = {name: re.compile(rf"\b{re.escape(name.lower())}(s|es)?\b") for name in names}
    return {name for name, pattern in counted.items() if sum(bool(pattern.search(text)) for text in texts) >= least}


def _tags(phrase: str, row: Mapping[str, Any], seen: Collection[str] | None) -> tuple[str, ...]:
    group = row["groups"][phrase]
    if seen is not None:
        group = "seen" if phrase in seen else "unseen"
    return (group, CLASSIFIED) if phrase in row.get("classified", ()) else (group,)


def _score_image(number: int, row, masks, maps, tags, table: dict[str, list[Sample]]) -> None:
    phrases, size = row["phrases"], masks.shape[-2:]
    finest = max((one.shape[-2:] for name, one in maps.items() if name != GRADCAM), key=lambda grid: grid[0] * grid[1])
    everything = {name: (phrases if name != GRADCAM else row["classified"], one) for name, one in maps.items()}
    everything[CENTRE] = (phrases, np.repeat(centre_prior(finest)[None], len(phrases), axis=0))
    everything[CHANCE] = (phrases, np.ones((len(phrases), *finest)))
    tokens, null = np.array(row["tokens"]), np.array(row["null"])
    for name, (own, values) in everything.items():
        large = enlarge(values, size)
        shares = choice(large, masks) if name not in (GRADCAM, CENTRE) else None  # what does not know of phrases
        # The other two measures of the same maps, where phrases compete.
        other: dict[str, np.ndarray] = {}
        if name == DEFAULT_COMBINATION:
            for measure, one in (
                ("per_token", large + (null / tokens)[:, None, None]),
                ("sum", large * tokens[:, None, None] + null[:, None, None]),
            ):
                other[measure] = one
        won = {measure: choice(one, masks)[0] for measure, one in other.items()}
        grid = (values.shape[-2], values.shape[-1])
        for at, phrase in enumerate(own):
            index = phrases.index(phrase)
            mask = masks[index]
            sample = _by_pixels(number, phrase, (CLASSIFIED,) if name == GRADCAM else tags[phrase], large[at], mask)
            sample.values |= {
                "pointing": pointing(values[at], mask),
                POINTING_CHANCE: chance_pointing(grid, mask),
                POINTING_CENTRE: pointing(centre_prior(grid), mask),
                "average_precision": average_precision(large[at], mask),
            }
            if shares is not None and shares[1][index]:
                sample.values["choice"] = float(shares[0][index])
            for measure, one in other.items():
                also = _by_pixels(number, phrase, tags[phrase], one[at], mask)
                if shares is not None and shares[1][index]:
                    also.values["choice"] = float(won[measure][index])
                table.setdefault(f"{name}, {measure}", []).append(also)
            for curve, sign in (("insertion", 1), ("deletion", -1)):
                if name in row[curve]:
                    steps = np.mean(row[curve][name][index])
                    sample.values[curve] = float(steps if sign > 0 else row["whole"][index] - steps)
            table.setdefault(name, []).append(sample)
    for index, phrase in enumerate(phrases):
        drawn = {"insertion": np.mean(row["insertion"][RANDOM][index])}
        drawn["deletion"] = row["whole"][index] - np.mean(row["deletion"][RANDOM][index])
        table.setdefault("random order", []).append(
            Sample(number, phrase, tags[phrase], {name: float(value) for name, value in drawn.items()})
        )


def _by_pixels(number: int, phrase: str, tags: tuple[str, ...], values: np.ndarray, mask: np.ndarray) -> Sample:
    overlap = overlaps(values, mask) / mask.size
    scores = {"energy": energy_pointing(values, mask), "iou": float(overlap[FIXED, 0] / overlap[FIXED, 1])}
    return Sample(number, phrase, tags, scores, overlap)


def quarters(grid: tuple[int, int]) -> np.ndarray:
    """The share of each cell that lies in each quarter of a board, (4, rows, columns); cells on the middle line are halved."""
    rows, columns = (np.sign((np.arange(edge) + 0.5) - edge / 2) / 2 + 0.5 for edge in grid)
    return np.stack([np.outer(down, right) for down in (1 - rows, rows) for right in (1 - columns, columns)])


def _score_board(number: int, row, masks, maps, table: dict[str, list[Sample]]) -> None:
    """Does the maximum lie on the object (`pointing_N`), and in the quarter of the right image (`tile_N`, without tolerance)?

    The maximum is that of the quarters that hold an image.
    """
    size = row["board"]
    finest = max((one.shape[-2:] for one in maps.values()), key=lambda grid: grid[0] * grid[1])
    centre = np.repeat(centre_prior(finest, tiles=2)[None], len(masks), axis=0)
    for name, values in {**maps, CENTRE: centre, CHANCE: np.ones((len(masks), *finest))}.items():
        tiles = quarters((values.shape[-2], values.shape[-1]))[:size]
        used = tiles.sum(axis=0)
        own_centre = np.where(used > 0, centre_prior((values.shape[-2], values.shape[-1]), tiles=2), -1)
        for at, mask in enumerate(masks):
            shown = np.where(used > 0, values[at], values[at].min() - 1)
            top = shown == shown.max()
            found = {
                f"pointing_{size}": pointing(shown, mask),
                f"{POINTING_CHANCE}_{size}": pointing((used > 0).astype(float), mask),
                f"{POINTING_CENTRE}_{size}": pointing(own_centre, mask),
                f"tile_{size}": 1 / size if name == CHANCE else float((tiles[at][top] / used[top]).mean()),
            }
            table.setdefault(name, []).append(Sample(number, row["phrases"][at], ("board",), found))


def summarise(samples: Iterable[Sample], resamples: int, seed: int) -> dict[str, tuple[float, tuple[float, float]]]:
    """Metric -> its value over the samples, and its 95 % interval over images."""
    samples = list(samples)
    metrics = dict.fromkeys(metric for sample in samples for metric in sample.values)
    found = {}
    for metric in metrics:
        chosen = [sample for sample in samples if metric in sample.values]
        images = {image: at for at, image in enumerate(dict.fromkeys(sample.image for sample in chosen))}
        sums, weights = np.zeros(len(images)), np.zeros(len(images))
        for sample in chosen:
            sums[images[sample.image]] += sample.values[metric]
            weights[images[sample.image]] += 1
        found[metric] = (float(sums.sum() / weights.sum()), bootstrap(sums, weights, resamples, seed))
    drawn = [sample for sample in samples if sample.overlap is not None]
    if drawn:
        found |= _overlap_metrics(drawn, resamples, seed)
    return found


def _overlap_metrics(samples: list[Sample], resamples: int, seed: int) -> dict[str, tuple[float, tuple[float, float]]]:
    """`iou_best`: mean IoU at the one level, for all maps, that is best with the masks in hand; `miou`: intersection over union
    of all images together, per phrase, averaged over phrases."""
    images = {image: at for at, image in enumerate(dict.fromkeys(sample.image for sample in samples))}
    phrases = {phrase: at for at, phrase in enumerate(dict.fromkeys(sample.phrase for sample in samples))}
    overlap = np.stack([sample.overlap for sample in samples if sample.overlap is not None])  # (samples, levels, 2)
    by_level = overlap[..., 0] / overlap[..., 1]
    best = int(by_level.mean(axis=0).argmax())
    rows = np.array([images[sample.image] for sample in samples])
    columns = np.array([phrases[sample.phrase] for sample in samples])
    sums = np.bincount(rows, by_level[:, best], len(images))
    weights = np.bincount(rows, minlength=len(images)).astype(float)
    crossed, joined = np.zeros((len(images), len(phrases))), np.zeros((len(images), len(phrases)))
    np.add.at(crossed, (rows, columns), overlap[:, FIXED, 0])
    np.add.at(joined, (rows, columns), overlap[:, FIXED, 1])
    return {
        "iou_best": (float(by_level[:, best].mean()), bootstrap(sums, weights, resamples, seed)),
        "miou": (
            float(ratio(crossed.sum(axis=0)[None], joined.sum(axis=0)[None])[0]),
            bootstrap(crossed, joined, resamples, seed),
        ),
    }


def as_results(content: Mapping[str, Any], dataset: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `score_maps` returned in the layout of `evaluation/results.py`; metrics carry their group where there are several."""
    several = len(content["groups"]) > 1
    scores: dict[str, dict[str, float]] = {}
    for group, rows in content["groups"].items():
        for name, values in rows.items():
            target = scores.setdefault(name, {})
            for metric, value in values.items():
                if metric in (POINTING_CHANCE, POINTING_CENTRE):  # no scores of the row, see below
                    continue
                target[f"{metric}_{group.replace(' ', '_')}" if several else metric] = value
    for name, values in content["boards"].items():
        scores.setdefault(name, {}).update(
            {
                metric: value
                for metric, value in values.items()
                if not metric.startswith((POINTING_CHANCE, POINTING_CENTRE))
            }
        )
    aside = [name for name in (CHANCE, CENTRE, GRADCAM, "random order") if name in scores]
    beside = {name: scores.pop(name) for name in aside}
    first = scores.pop(DEFAULT_COMBINATION)
    return {
        "title": "Attribution maps",
        "dataset": {"name": dataset, "size": content["images"]},
        "settings": dict(settings),
        "scores": {DEFAULT_COMBINATION: first} | scores,
        "controls": {CHANCE: beside.pop(CHANCE)},
        "baselines": beside,
        "intervals": content["intervals"],
        "board_intervals": content["board_intervals"],
        "counts": content["counts"],
        **{
            metric: {
                group: {name: row[metric] for name, row in rows.items() if metric in row}
                for group, rows in content["groups"].items()
            }
            for metric in (POINTING_CHANCE, POINTING_CENTRE)
        },
        **{
            f"board_{own}": {
                name: {metric: value for metric, value in row.items() if metric.startswith(own)}
                for name, row in content["boards"].items()
            }
            for own in (POINTING_CHANCE, POINTING_CENTRE)
        },
    }


def maps_table(content: Mapping[str, Any]) -> str:
    """The scores as text: per group a row for each map, then the multi-object game."""
    lines: list[str] = []
    for group, rows in content["groups"].items():
        counts = content["counts"][group]
        lines.append(
            f"{group}: {counts['phrases']} phrases on {counts['images']} images, mean area {counts['area']:.3f}"
        )
        lines += _block(
            rows,
            [metric for metric in METRICS if any(metric in row for row in rows.values())],
            content["intervals"][group],
        )
        lines.append("")
    if content["boards"]:
        lines.append("several images on one board, a phrase each")
        rows = content["boards"]
        lines += _block(rows, list(next(iter(rows.values()))), content["board_intervals"])
    return "\n".join(lines).rstrip()


def _block(rows, metrics: list[str], intervals) -> list[str]:
    width = max(len(name) for name in rows) + 2
    heads = [metric_name(metric) for metric in metrics]
    lines = [" " * width + "".join(f"{head:>20}" for head in heads)]
    for name, row in rows.items():
        cells = []
        for metric in metrics:
            text = ""
            if metric in row:
                low, high = intervals[name][metric]
                text = f"{row[metric]:.3f} {low:.3f}-{high:.3f}"
            cells.append(f"{text:>20}")
        lines.append(f"{name:{width}}" + "".join(cells))
    return lines


__all__ = ["CLASSIFIED", "METRICS", "Sample", "as_results", "maps_table", "score_maps", "summarise"]
