"""Scores of recorded maps: a table per group of phrases, chance and a centre prior beside it, with bootstrap intervals.

Intervals are of images drawn with replacement, 95 %. Measures by pixel compare maps enlarged to the crop. Within one phrase the
three measures of a map rank its places alike (evidence is the sum over the phrase's tokens, less a constant, times a
constant): `pointing` and `average_precision` are those of the evidence. The rows "sum" and "per_token" have what differs: `iou`,
`iou_best` and `miou`, which start from zero or, for the log-probabilities, from the map's minimum, and `choice`, where phrases
compete; they have no energy, since they are never positive.

Pointing is decided on each map's own grid, where half a cell of a coarse grid is more of the image than of a fine one. So every
row has its own `pointing_chance` beside it, and in `pointing_centre` the centre prior on that grid; the rows "chance" and
"centre prior" are those of the finest grid. On boards the centre prior is that of each image. Grad-CAM is in the group of the
classes of the backbone only, since it has a map for these phrases only.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from devil_hf.data.objects import open_localised
from devil_hf.data.pairs.folder import read_caption_folder
from devil_hf.evaluation.maps.collecting import CENTRE, DEFAULT_COMBINATION, GRADCAM, RANDOM, read_arrays
from devil_hf.evaluation.maps.measures import centre_prior, enlarge
from devil_hf.evaluation.maps.pointing import pointing
from devil_hf.evaluation.maps.views import MAP_MEASURES, MapView, mean_of_phrases
from devil_hf.evaluation.results import CHANCE
from devil_hf.evaluation.tables import SIGNED, with_interval
from devil_hf.evaluation.tables import table as written
from devil_hf.evaluation.text.head_words import head_word
from devil_hf.statistics import bootstrap

CLASSIFIED = "classes of the backbone"
EVERY_PHRASE = "all phrases"  # where they are of several groups
RANDOM_ORDER = "random order"
POINTING_CHANCE, POINTING_CENTRE, POINTING_EXACT_CENTRE = "pointing_chance", "pointing_centre", "pointing_exact_centre"
UNSEEN_HEAD = "head word in no training region"


@dataclass
class Sample:
    """What one row of the table has for one phrase of one image (or board): measure -> what its `pool` understands."""

    image: int
    phrase: str
    tags: tuple[str, ...]
    values: dict[str, Any] = field(default_factory=dict)


Table = dict[str, list[Sample]]


def score_maps(
    rows: Mapping[str, Any],
    folder: Path,
    seen: Collection[str] | None = None,
    heads: Collection[str] | None = None,
    resamples: int = 2_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the recorded maps of images and boards.

    Args:
        rows: key -> row, those to score.
        folder: that of the records.
        seen: class names that the training captions hold; class phrases are then reported as "seen" and "unseen".
        heads: head words of the training's regions; phrases with another one are a group of their own, too.

    Returns:
        `images`: how many hold a phrase; `groups`: group -> row -> metric -> value; `intervals`: the same with (low, high);
        `over_centre`: group -> row -> `pointing` and `pointing_exact` less those of the centre on the same grid, as (value, low,
        high), paired; `counts`: group -> phrases, images, area; `boards`: the multi-object game likewise, row -> metric, with
        `board_intervals`.

    Raises:
        ValueError: if no phrase of any image is visible in the crop.
    """
    if not any(row["phrases"] for row in rows.values() if "board" not in row):
        problem = next((f"; the first: {row['problem']}" for row in rows.values() if row.get("problem")), "")
        raise ValueError(f"no phrase of these images is visible in the crop: give more images (--limit), or others{problem}")
    table, boards, areas = Table(), Table(), list[Sample]()
    for number, row in enumerate(tqdm(rows.values(), desc="scores", unit="image", leave=False)):
        if not row["phrases"]:
            continue
        masks, maps = read_arrays(folder / "maps" / row["file"])
        if "board" in row:
            _score_board(number, row, masks, maps, boards)
            continue
        tags = {phrase: _tags(phrase, row, seen, heads) for phrase in row["phrases"]}
        areas += [Sample(number, p, tags[p], {"area": float(m.mean())}) for p, m in zip(row["phrases"], masks, strict=True)]
        _score_image(number, row, masks, maps, tags, table)
    content: dict[str, Any] = {"groups": {}, "intervals": {}, "over_centre": {}, "counts": {}}
    if len({sample.tags[0] for sample in areas}) > 1:
        for sample in itertools.chain(areas, *table.values()):
            sample.tags = (*sample.tags, EVERY_PHRASE) if sample.tags != (CLASSIFIED,) else sample.tags
    for tag in dict.fromkeys(tag for sample in areas for tag in sample.tags):
        chosen = [sample for sample in areas if tag in sample.tags]
        content["counts"][tag] = {
            "phrases": len(chosen),
            "images": len({sample.image for sample in chosen}),
            "area": float(np.mean([sample.values["area"] for sample in chosen])),
        }
        own = {name: [sample for sample in samples if tag in sample.tags] for name, samples in table.items()}
        content["groups"][tag], content["intervals"][tag] = _summaries(own, resamples, seed)
        content["over_centre"][tag] = {name: over_centre(own[name], resamples, seed) for name in content["groups"][tag]}
    content["images"] = len({sample.image for sample in areas})
    content["boards"], content["board_intervals"] = _summaries(boards, resamples, seed)
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


def known_heads(sources: Sequence[str]) -> set[str]:
    """The head words of all phrases of sources of objects, such as those of a training."""
    phrases = {phrase for source in sources for image in open_localised(source) for phrase in image.groups}
    return {head for phrase in phrases if (head := head_word(phrase))}


def _tags(phrase: str, row: Mapping[str, Any], seen: Collection[str] | None, heads: Collection[str] | None) -> tuple[str, ...]:
    group = row["groups"][phrase]
    if seen is not None:
        group = "seen" if phrase in seen else "unseen"
    new = (UNSEEN_HEAD,) if heads is not None and head_word(phrase) not in heads else ()
    return (group, *new, CLASSIFIED) if phrase in row.get("classified", ()) else (group, *new)


def _score_image(number: int, row, masks, maps, tags, table: Table) -> None:
    phrases, size = row["phrases"], masks.shape[-2:]
    finest = max((one.shape[-2:] for name, one in maps.items() if name != GRADCAM), key=lambda grid: grid[0] * grid[1])
    everything = {name: (phrases if name != GRADCAM else row["classified"], one) for name, one in maps.items()}
    everything[CENTRE] = (phrases, np.repeat(centre_prior(finest)[None], len(phrases), axis=0))
    everything[CHANCE] = (phrases, np.ones((len(phrases), *finest)))
    tokens, null = np.array(row["tokens"])[:, None, None], np.array(row["null"])[:, None, None]
    for name, (own, values) in everything.items():
        large, at = enlarge(values, size), [phrases.index(phrase) for phrase in own]
        units = {name: large}
        if name == DEFAULT_COMBINATION:  # the other two measures of the same maps, where phrases compete
            units |= {f"{name}, per_token": large + null / tokens, f"{name}, sum": large * tokens + null}
        for title, one in units.items():
            for index, phrase in enumerate(own):
                view = MapView(
                    values[index], one, masks[at], index, name not in (GRADCAM, CENTRE), *_curves(row, name, at[index])
                )
                found = _measured(view, every=title == name)
                own_tags = (CLASSIFIED,) if name == GRADCAM else tags[phrase]
                table.setdefault(title, []).append(Sample(number, phrase, own_tags, found))
    for index, phrase in enumerate(phrases):
        view = MapView(np.ones((1, 1)), masks, masks, index, False, *_curves(row, RANDOM, index))
        found = {name: MAP_MEASURES[name].of_phrase(view) for name in view.curves}
        table.setdefault(RANDOM_ORDER, []).append(Sample(number, phrase, tags[phrase], found))


def _curves(row: Mapping[str, Any], name: str, index: int) -> tuple[dict[str, list[float]], float]:
    """The curves of one phrase that followed this map, and the evidence of the phrase for the whole image."""
    curves = {kind: row[kind][name][index] for kind in ("insertion", "deletion") if name in row[kind]}
    return curves, row["whole"][index]


def _measured(view: MapView, every: bool) -> dict[str, Any]:
    """Every measure of a map that says something; of log-probabilities those that neither follow from the order of places alone
    nor need a zero that means something."""
    asked = {name: measure for name, measure in MAP_MEASURES.items() if every or not (measure.by_order or measure.from_zero)}
    found = {name: measure.of_phrase(view) for name, measure in asked.items()}
    return {name: value for name, value in found.items() if value is not None}


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


def summarise(samples: Iterable[Sample], resamples: int, seed: int) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """Metric -> its value over the samples, and its 95 % interval over images, None for one image."""
    samples = list(samples)
    known = dict.fromkeys(metric for sample in samples for metric in sample.values)
    ordered = [*(name for name in MAP_MEASURES if name in known), *(name for name in known if name not in MAP_MEASURES)]
    found = {}
    for metric in ordered:
        chosen = [sample for sample in samples if metric in sample.values]
        images, phrases = (_numbered([getattr(sample, name) for sample in chosen]) for name in ("image", "phrase"))
        pool = MAP_MEASURES[metric].pool if metric in MAP_MEASURES else mean_of_phrases  # games on boards are means
        pooled = pool([sample.values[metric] for sample in chosen], images, phrases)
        found[metric] = (pooled.value, bootstrap(pooled.sums, pooled.weights, resamples, seed))
    return found


def over_centre(samples: Sequence[Sample], resamples: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """What pointing has over the centre prior on the map's own grid, and the field's rule over the middle of the image.

    Returns:
        Measure -> (difference, low, high): the 95 % interval of the paired difference over images; of several images only.
    """
    found = {}
    for measure, centre in (("pointing", POINTING_CENTRE), ("pointing_exact", POINTING_EXACT_CENTRE)):
        chosen = [sample for sample in samples if measure in sample.values and centre in sample.values]
        if chosen:
            more = [sample.values[measure] - sample.values[centre] for sample in chosen]
            images, phrases = (_numbered([getattr(sample, name) for sample in chosen]) for name in ("image", "phrase"))
            pooled = mean_of_phrases(more, images, phrases)
            if span := bootstrap(pooled.sums, pooled.weights, resamples, seed):
                found[measure] = (pooled.value, *span)
    return found


def _numbered(values: Sequence[Any]) -> np.ndarray:
    numbers = {value: at for at, value in enumerate(dict.fromkeys(values))}
    return np.array([numbers[value] for value in values])


def _summaries(table: Mapping[str, list[Sample]], resamples: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Row -> metric -> value, and -> (low, high)."""
    found = {name: summarise(samples, resamples, seed) for name, samples in table.items() if samples}
    values = {name: {metric: value for metric, (value, _) in one.items()} for name, one in found.items()}
    spans = {name: {metric: span for metric, (_, span) in one.items()} for name, one in found.items()}
    return values, spans


def as_table(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What `score_maps` returned as one table, row -> metric; metrics carry their group where there are several.

    Levels to compare with, such as chance on each map's own grid, are no scores of the row and left out.
    """
    several = len(content["groups"]) > 1
    scores: dict[str, dict[str, float]] = {}
    for group, rows in content["groups"].items():
        for name, values in rows.items():
            for metric, value in values.items():
                if not MAP_MEASURES[metric].beside:
                    scores.setdefault(name, {})[f"{metric}_{group.replace(' ', '_')}" if several else metric] = value
    for name, values in content["boards"].items():
        own = {m: value for m, value in values.items() if not m.startswith((POINTING_CHANCE, POINTING_CENTRE))}
        scores.setdefault(name, {}).update(own)
    return {name: scores[name] for name in (DEFAULT_COMBINATION, *scores)}


def beside(content: Mapping[str, Any]) -> dict[str, Any]:
    """The levels to compare with: measure -> group -> row -> value, and those of boards."""
    levels: dict[str, Any] = {
        metric: {
            group: {name: row[metric] for name, row in rows.items() if metric in row} for group, rows in content["groups"].items()
        }
        for metric, measure in MAP_MEASURES.items()
        if measure.beside
    }
    for own in (POINTING_CHANCE, POINTING_CENTRE):
        levels[f"board_{own}"] = {
            name: {metric: value for metric, value in row.items() if metric.startswith(own)}
            for name, row in content["boards"].items()
        }
    return levels


def maps_text(details: Mapping[str, Any]) -> str:
    """The scores as text: per group a row for each map, then the multi-object game."""
    lines: list[str] = []
    for group, rows in details["groups"].items():
        counts = details["counts"][group]
        lines += [
            f"{group}: {counts['phrases']} phrases on {counts['images']} images, mean area {counts['area']:.3f}",
            written(rows, list(MAP_MEASURES), intervals=details["intervals"][group]),
        ]
        for measure in ("pointing", "pointing_exact"):
            more = {
                name: row[measure]
                for name, row in details["over_centre"][group].items()
                if measure in row and name not in (CENTRE, CHANCE)
            }
            said = [f"{name} {with_interval(value, span, SIGNED)}" for name, (value, *span) in more.items()]
            lines += [f"{measure.replace('_', ' ')} over the centre: {', '.join(said)}"] if said else []
        lines += [""]
    if boards := details["boards"]:
        columns = list(next(iter(boards.values())))
        lines += ["several images on one board, a phrase each", written(boards, columns, intervals=details["board_intervals"])]
    return "\n".join(lines).rstrip()


__all__ = [
    "CLASSIFIED",
    "Sample",
    "as_table",
    "beside",
    "known_heads",
    "maps_text",
    "named_in_captions",
    "score_maps",
    "summarise",
]
