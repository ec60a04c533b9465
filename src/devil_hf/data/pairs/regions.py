"""Pairs of image regions: objects with masks and names, each a row of its own.

The translator sees the object's places only, and learns its name. A row holds where the object is as data, and its mask is drawn
when the row is read. Rows are written once to the cache of `datasets` and mapped from there, so that memory does not grow with
their number, however many processes read them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from devil_hf.data.objects import LocalisedImage, deciding_files, open_localised
from devil_hf.data.objects.masks import covers_nothing, pack_region
from devil_hf.data.pairs import PAIR_FEATURES, PAIR_SOURCES
from devil_hf.data.pairs.world import png
from devil_hf.model.image_processing_devil import load_images

REGION_TEMPLATES = ("{}", "a {}", "the {}")
LAYOUT = 1  # of the rows; another number makes them anew


@PAIR_SOURCES.register("regions")
def open_regions(path: str, images: str | None = None, names: str | None = None, templates: list | None = None) -> Dataset:
    """Objects with masks and names, without decoding an image or drawing a mask.

    All objects of a class in an image are one region, of which training reads what fills its locations most: beside a large
    object, small ones of its class count little (see `location_dropout`). A region that turns out to cover no pixel is left out
    when it is read, as those that the model would not see are.

    Args:
        path: COCO instances JSON, Pascal VOC folder, folder of YOLO labels, Flickr30k Entities, or `shapes:COUNT[:SEED]`; see
            `devil_hf.data.objects.open_localised`.
        images: folder of the images, where it is not the usual one.
        names: class names of YOLO labels.
        templates: what is said of a region, with `{}` for its name.
    """
    templates = list(REGION_TEMPLATES) if templates is None else templates
    if not templates or not all(isinstance(template, str) and template.count("{}") == 1 for template in templates):
        raise ValueError(f"templates={templates!r} must each hold the name once, as {{}}, such as 'a {{}}'")
    files = {"path": path, "images": images, "names": names}
    states = [LAYOUT, *map(_state, deciding_files(path, names))]
    arguments = files | {"templates": tuple(templates), "states": repr(states)}  # a list would be read as shards
    try:
        return Dataset.from_generator(_region_rows, features=PAIR_FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # what the source said


def _state(place: Path) -> list:
    """What changes when a file, or a file of a folder, does."""
    files = sorted(place.rglob("*.*")) if place.is_dir() else [place]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _region_rows(
    path: str, images: str | None, names: str | None, templates: Sequence[str], states: str
) -> Iterator[dict[str, Any]]:
    """A row for each class of an image; `states` only tells the cache which files these are."""
    found = 0
    for example in tqdm(open_localised(path, images, names), desc="regions", unit="image", leave=False):
        for phrase, parts in example.parts.items():
            if phrase in example.groups and not covers_nothing(parts):
                found += 1
                yield {
                    "key": f"{example.key} {phrase}",
                    "image": _image(example),
                    "captions": [template.format(phrase) for template in templates],
                    "region": pack_region(example.region(phrase)),
                    "problem": None,
                }
    if not found:
        raise ValueError(f"{path} has no object that covers a pixel of its image")


def _image(example: LocalisedImage) -> dict[str, Any]:
    content = example.read()
    if isinstance(content, str | Path):
        return {"bytes": None, "path": str(content)}
    return {"bytes": png(load_images(content)[0]), "path": None}
