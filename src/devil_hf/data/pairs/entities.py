"""Pairs of Flickr30k Entities: each entity with a box is a region, and its phrases are what is said of it.

Rows of an image follow each other, so that whoever reads features runs the backbone once for all of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from devil_hf.data.objects.entities import REGIONS_FILE, EntityImage, read_entities
from devil_hf.data.objects.masks import pack_region
from devil_hf.data.pairs import PAIR_FEATURES, PAIR_SOURCES
from devil_hf.data.pairs.folder import METADATA_FILES, read_caption_folder

LAYOUT = 2  # of the rows; another number makes them anew


@PAIR_SOURCES.register("entities")
def open_entities(
    path: str, images: str | None = None, split: str | None = None, smallest_share: float = 0.0, whole: int = 0
) -> Dataset:
    """Entities as captioned regions, without decoding an image or drawing a mask.

    Rows are written once to the cache of `datasets` and mapped from there.

    Args:
        path: folder of the original distribution, or with a `regions.jsonl`; see `devil_hf.data.objects.entities`.
        images: folder of the images, where it is not the usual one.
        split: of a `regions.jsonl`.
        smallest_share: entities whose boxes together cover less of the image, from 0 to 1, are left out.
        whole: rows of the whole image with its captions (those of the sentences, or of the folder's `captions.jsonl`), in front
            of those of its entities.

    Raises:
        FileNotFoundError: if a folder or an image is missing, or captions that `whole` needs.
        ValueError: for a malformed file, a share outside of 0 to 1 or that leaves no entity, and a negative `whole`.
    """
    if whole < 0:
        raise ValueError(f"whole={whole} must be a number of rows of each image, 0 or more")
    if not 0 <= smallest_share < 1:
        raise ValueError(f"smallest_share={smallest_share} must be a share of the image, from 0 to below 1")
    source = f"{path}:{split}" if split else path
    states = repr([LAYOUT, *_states(path)])
    arguments = {"source": source, "images": images, "smallest_share": smallest_share, "whole": whole, "states": states}
    try:
        return Dataset.from_generator(_entity_rows, features=PAIR_FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # what the source said


def _states(path: str) -> list:
    """What changes when an annotation does."""
    folder = Path(path)
    named = [folder / name for name in (REGIONS_FILE, *METADATA_FILES)]
    files = [*named, *sorted(folder.glob("Sentences/*.txt")), *sorted(folder.glob("Annotations/*.xml"))]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _entity_rows(source: str, images: str | None, smallest_share: float, whole: int, states: str) -> Iterator[dict[str, Any]]:
    """Rows of each image: `whole` without a region, one for each entity with a box; `states` only tells the cache the files."""
    found, read = 0, read_entities(source, images)
    captions = _captions(read) if whole else {}
    for image in read:
        row = {"image": {"bytes": None, "path": str(image.path)}, "problem": None}
        for number in range(whole):
            yield row | {"key": f"{image.key} whole {number}", "captions": captions[image.key], "region": None}
        for entity in image.entities:
            share = sum((right - left) * (bottom - top) for left, top, right, bottom in entity.boxes)
            if entity.boxes and share >= smallest_share * image.size[0] * image.size[1]:
                found += 1
                region = pack_region({"parts": [{"box": list(box)} for box in entity.boxes], "size": list(image.size)})
                yield row | {"key": f"{image.key} {entity.name}", "captions": list(entity.phrases), "region": region}
    if not found:
        raise ValueError(f"{source}: smallest_share={smallest_share} leaves no entity")


def _captions(read: Sequence[EntityImage]) -> dict[str, list[str]]:
    """Captions by image: those that came with the entities, or those of the caption folder that they lie in."""
    if all(image.captions for image in read):
        return {image.key: list(image.captions) for image in read}
    folder = read[0].path.parents[len(Path(read[0].key).parts) - 1]
    captions = {file.name: file.captions for file in read_caption_folder(folder)}
    if lacking := [image.key for image in read if not captions.get(image.key)]:
        raise ValueError(f"{folder} has no captions of {len(lacking)} images, the first is {lacking[0]}: leave `whole` out")
    return captions


__all__ = ["open_entities"]
