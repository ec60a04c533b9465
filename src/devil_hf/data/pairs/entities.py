"""Pairs of Flickr30k Entities: each entity with a box is a region, and its phrases are what is said of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from devil_hf.data.objects.entities import REGIONS_FILE, read_entities
from devil_hf.data.objects.masks import pack_region
from devil_hf.data.pairs import PAIR_FEATURES, PAIR_SOURCES

LAYOUT = 1  # of the rows; another number makes them anew


@PAIR_SOURCES.register("entities")
def open_entities(path: str, images: str | None = None, split: str | None = None, smallest_share: float = 0.0) -> Dataset:
    """Entities as captioned regions, without decoding an image or drawing a mask.

    Rows are written once to the cache of `datasets` and mapped from there.

    Args:
        path: folder of the original distribution, or with a `regions.jsonl`; see `devil_hf.data.objects.entities`.
        images: folder of the images, where it is not the usual one.
        split: of a `regions.jsonl`.
        smallest_share: entities whose boxes together cover less of the image, from 0 to 1, are left out.

    Raises:
        FileNotFoundError: if a folder or an image is missing.
        ValueError: for a malformed file, or a share outside of 0 to 1 or that leaves no entity.
    """
    if not 0 <= smallest_share < 1:
        raise ValueError(f"smallest_share={smallest_share} must be a share of the image, from 0 to below 1")
    source = f"{path}:{split}" if split else path
    arguments = {"source": source, "images": images, "smallest_share": smallest_share, "states": repr([LAYOUT, *_states(path)])}
    try:
        return Dataset.from_generator(_entity_rows, features=PAIR_FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # what the source said


def _states(path: str) -> list:
    """What changes when an annotation does."""
    folder = Path(path)
    files = [folder / REGIONS_FILE, *sorted(folder.glob("Sentences/*.txt")), *sorted(folder.glob("Annotations/*.xml"))]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _entity_rows(source: str, images: str | None, smallest_share: float, states: str) -> Iterator[dict[str, Any]]:
    """A row for each entity with a box; `states` only tells the cache which files these are."""
    found = 0
    for image in read_entities(source, images):
        for entity in image.entities:
            share = sum((right - left) * (bottom - top) for left, top, right, bottom in entity.boxes)
            if entity.boxes and share >= smallest_share * image.size[0] * image.size[1]:
                found += 1
                region = {"parts": [{"box": list(box)} for box in entity.boxes], "size": list(image.size)}
                yield {
                    "key": f"{image.key} {entity.name}",
                    "image": {"bytes": None, "path": str(image.path)},
                    "captions": list(entity.phrases),
                    "region": pack_region(region),
                    "problem": None,
                }
    if not found:
        raise ValueError(f"{source}: smallest_share={smallest_share} leaves no entity")


__all__ = ["open_entities"]
