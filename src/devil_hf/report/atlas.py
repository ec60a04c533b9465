"""An atlas of units: their labels, evidence, checks and exemplars, as parquet, as JSON, and as a page that opens from disk.

atlas.parquet    a row per unit, with its exemplars' pictures by file name
atlas.json       the same without exemplars, and the summary of the check
index.html       the explorer: search, sort, filter, exemplars with masks; it needs no server and no network
data.js          what the explorer shows
thumbs/          each exemplar once, masks/LAYER/UNIT.png a strip of masks of each unit
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Features, List, Value
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from devil_hf.data.exemplar_set import ExemplarSet, layer_file, write_rows
from devil_hf.folders import write_json, written
from devil_hf.report.templates import render

PAGE = "index.html"
TEMPLATE = "report/templates/atlas.html"
THUMBNAIL = 128  # pixels
MASK = 64
INSIDE, OUTSIDE, OUTLINE = 0, 1, 2
# Colour and opacity of the three: masks let the picture through where the unit is active.
PALETTE, OPACITY = (0, 0, 0, 14, 16, 20, 255, 214, 64), bytes((0, 176, 255))
COLUMNS = {
    "layer": "string",
    "unit": "int32",
    "name": "string",
    "label": "string",
    "evidence": "float32",
    "runner_up": "string",
    "runner_up_evidence": "float32",
    "pearson": "float32",
    "pearson_p": "float32",
    "q": "float32",
    "auprc": "float32",
    "auprc_p": "float32",
    "passed": "bool",
    "threshold": "float32",
}


def write_atlas(
    exemplars: ExemplarSet,
    labels: Sequence[Mapping[str, Any]],
    output_dir: str | PathLike,
    checks: Sequence[Mapping[str, Any]] | None = None,
    summary: Mapping[str, Any] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write the atlas.

    Args:
        labels: what `label_units` returned, a row per unit.
        checks: what `check_labels` returned, in the same order; None where labels were not checked.
        summary: whatever describes the whole; goes into `atlas.json` and, its entry `title`, over the page.
        names: per layer a name of each direction, in their order; units without one are numbered.

    Returns:
        The page.
    """
    if len(labels) != len(exemplars) or (checks is not None and len(checks) != len(labels)):
        raise ValueError(f"{len(labels)} labels and {len(checks or labels)} checks for {len(exemplars)} units")
    output_dir = Path(output_dir)
    rows = _rows(exemplars, labels, checks, names or {})
    (output_dir / PAGE).unlink(missing_ok=True)  # the last to come: an atlas that has it is whole
    for name, write in (("thumbs", _write_thumbnails), ("masks", _write_masks)):
        with written(output_dir / name) as unfinished:
            unfinished.mkdir()
            write(exemplars, unfinished)
    features = Features(
        {name: Value(kind) for name, kind in COLUMNS.items()}
        | {"words": List(Value("string")), "word_evidence": List(Value("float32"))}
        | {"images": List(Value("string")), "peaks": List(Value("float32")), "keys": List(Value("string"))}
    )
    write_rows(_parquet_rows(exemplars, rows), features, output_dir / "atlas.parquet")
    plain = [{name: row[name] for name in (*COLUMNS, "words")} for row in rows]
    write_json(output_dir / "atlas.json", {"summary": dict(summary or {}), "units": plain})
    with written(output_dir / "data.js") as unfinished:
        unfinished.write_text(_data(exemplars, rows, checks is not None), encoding="utf-8")
    title = (summary or {}).get("title", "Atlas of units")
    page = render(TEMPLATE, title=title, about=_about(exemplars, rows, checks is not None))
    with written(output_dir / PAGE) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return output_dir / PAGE


def _rows(exemplars: ExemplarSet, labels, checks, names: Mapping[str, Sequence[str]]) -> list[dict]:
    rows = []
    for at, (layer, unit) in enumerate(exemplars.units):
        own = exemplars.tensors[layer]
        named, place = names.get(layer, ()), unit - exemplars.summary["shapes"][layer]["channels"]
        name = named[place] if 0 <= place < len(named) else f"unit {unit}"
        row = dict.fromkeys(COLUMNS) | {"passed": False} | dict(labels[at]) | (dict(checks[at]) if checks else {})
        if (row["layer"], row["unit"]) != (layer, unit):
            raise ValueError(f"label {at} is of unit {row['unit']} of {row['layer']}, expected unit {unit} of {layer}")
        count = int((own["images"][unit] >= 0).sum())
        rows.append(
            row
            | {
                "name": name,
                "threshold": float(own["threshold"][unit]),
                "images": own["images"][unit, :count].tolist(),
                "peaks": own["peaks"][unit, :count].tolist(),
            }
        )
    return rows


def _parquet_rows(exemplars: ExemplarSet, rows: list[dict]) -> Iterator[dict]:
    for row in rows:
        yield {name: row[name] for name in (*COLUMNS, "peaks")} | {
            "words": [word for word, _ in row["words"]],
            "word_evidence": [nats for _, nats in row["words"]],
            "images": [f"thumbs/{number}.jpg" for number in row["images"]],
            "keys": [exemplars.keys[number] for number in row["images"]],
        }


def _write_thumbnails(exemplars: ExemplarSet, folder: Path) -> None:
    for number in tqdm(sorted(exemplars.keys), desc="atlas: pictures", unit="image"):
        image = exemplars.image(number)
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        image.save(folder / f"{number}.jpg", quality=85)


def _write_masks(exemplars: ExemplarSet, folder: Path) -> None:
    """One strip of masks per unit: dark where the unit does not exceed its threshold, an outline where it begins to."""
    bar = tqdm(total=len(exemplars), desc="atlas: masks", unit="unit")
    for layer in exemplars.layers:
        own = exemplars.tensors[layer]
        into = folder / Path(layer_file(layer)).stem
        into.mkdir()
        for units in torch.arange(len(own["peaks"])).split(64):
            masks = exemplars.masks(layer, units, (MASK, MASK))
            pictures = mask_colours(masks.flatten(0, 1)).unflatten(0, masks.shape[:2])  # (n, k, MASK, MASK)
            for unit, strip in zip(units.tolist(), pictures, strict=True):
                count = int((own["images"][unit] >= 0).sum())
                picture = Image.fromarray(np.concatenate(list(strip[:count].numpy()), axis=1), mode="P")
                picture.putpalette(PALETTE)
                picture.save(into / f"{unit}.png", transparency=OPACITY)
                bar.update()
    bar.close()


def mask_colours(masks: Tensor) -> Tensor:
    """Palette indices (n, H, W), uint8, of masks (n, H, W): inside, outside, and an outline two pixels wide around them."""
    wide = F.max_pool2d(masks[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    colours = torch.where(masks, INSIDE, torch.where(wide, OUTLINE, OUTSIDE))
    return colours.to(torch.uint8)


def _about(exemplars: ExemplarSet, rows: list[dict], checked: bool) -> str:
    about = f"{len(rows):,} units, exemplars from {exemplars.summary['images']:,} images"
    if checked:
        passed = sum(row["passed"] for row in rows)
        about += f"; {passed:,} labels passed the check ({passed / len(rows):.0%})"
    return about


def _data(exemplars: ExemplarSet, rows: list[dict], checked: bool) -> str:
    shown = [
        {name: _rounded(row[name]) for name in (*COLUMNS, "words", "images", "peaks")}
        | {"folder": Path(layer_file(row["layer"])).stem}
        for row in rows
    ]
    meta = {"layers": exemplars.layers, "checked": checked, "keys": exemplars.keys}
    return f"window.ATLAS = {json.dumps({'meta': meta, 'units': shown}, separators=(',', ':'))};\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
