"""Image-text pairs of every source, as one `datasets` data set of undecoded rows.

A source is a dictionary of a recipe, its `kind` and the keyword arguments of that kind's function in `PAIR_SOURCES`:

    {"kind": "folder", "path": "flickr8k", "split": "train"}
    {"kind": "coco", "annotations": "captions_val2017.json", "images": "val2017"}
    {"kind": "flickr", "captions": "Flickr8k.token.txt", "images": "Images", "names": "Flickr_8k.trainImages.txt"}
    {"kind": "webdataset", "urls": "https://host/cc3m/{00000..00331}.tar"}
    {"kind": "webdataset", "repo": "pixparse/cc3m-wds", "split": "train"}
    {"kind": "hub", "path": "user/pairs", "split": "train", "image_column": "image", "caption_column": "caption"}
    {"kind": "shapes", "size": 100000, "seed": 0}
    {"kind": "regions", "path": "instances_train2017.json", "images": "train2017"}
    {"kind": "entities", "path": "flickr30k_entities", "images": "flickr30k-images"}

A kind is a function of a file of this folder (or of another package) that registers itself and returns rows with the columns of
`PAIR_FEATURES`. A source is opened completely checked: what is missing is an error here, not in the middle of a run. The one
thing that is left to the decoding of rows is whether each image, caption and region is any good.

What a trainer may rely on, and what not:

* Rows and their order depend on (sources, seed, epoch, nodes, workers) and on nothing else.
* `split_dataset_by_node`, then the workers of a `DataLoader`, see every row exactly once per pass. Where the shards cannot
  be dealt out evenly to the nodes, every node reads all of them and takes every n-th row. Nodes may get different
  numbers of rows: a trainer whose steps are collective reads `devil_hf.data.decoding.PairStream`, which has no end.
* Exact resume of a stream is reading its rows again up to the place that was reached (undecoded, which is cheap).
  `IterableDataset.state_dict` is *not* exact once there is a shuffle buffer: its content is lost and filled anew.
* `IterableDataset.set_epoch` shuffles the order of shards in every epoch but the first, even where `shuffle=False`.
* Bad rows flow like others until they are decoded, so they never change who reads what.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets

from devil_hf.registry import Registry

PAIR_FEATURES = Features(
    {
        "key": Value("string"),
        "image": Image(decode=False),
        "captions": List(Value("string")),
        "region": Value("binary"),  # what the captions speak of, see `objects/masks.py`; None for the whole image
        "problem": Value("string"),  # why the row cannot be used, where its source knows it
    }
)
REGION_KINDS = ("regions", "entities")  # whose captions speak of a part of the image
MAX_SHARDS = 64  # of a map-style source that joins a stream


PAIR_SOURCES: Registry[Callable[..., Dataset | IterableDataset]] = Registry("kind of source", "devil_hf.data.pairs")


def open_pairs(
    sources: Sequence[dict[str, Any]], seed: int, shuffle: bool, shuffle_buffer: int = 1000
) -> Dataset | IterableDataset:
    """Open all `sources` as one data set.

    Its columns are those of `PAIR_FEATURES`; images (`{"bytes", "path"}`) and captions are as they were found. Several sources
    are concatenated; where one streams, all do, and their shards are shuffled together.

    Args:
        sources: sources as written in a recipe.
        seed: seed of the order.
        shuffle: shuffle; a stream shuffles the order of its shards and rows in a buffer.
        shuffle_buffer: rows held in the buffer of a stream, per worker.

    Raises:
        FileNotFoundError: if a file, folder or shard is missing.
        ValueError: if a source is malformed or empty, or lacks a column or split.
    """
    if not sources:
        raise ValueError(f"no source of image-text pairs is given; kinds are {sorted(PAIR_SOURCES)}")
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1")
    for position, source in enumerate(sources):
        _check_source(source, f"sources[{position}]")
    opened = []
    for position, source in enumerate(sources):
        arguments = {name: value for name, value in source.items() if name != "kind"}
        try:
            opened.append(PAIR_SOURCES[source["kind"]](**arguments))
        except (ValueError, OSError) as error:
            kind = next(one for one in (FileNotFoundError, OSError, ValueError) if isinstance(error, one))
            raise kind(f"sources[{position}] ({source['kind']}): {error}") from error
    if all(isinstance(dataset, Dataset) for dataset in opened):
        dataset = concatenate_datasets(opened)
        return dataset.shuffle(seed=seed) if shuffle else dataset
    stream = concatenate_datasets([_as_stream(dataset) for dataset in opened])
    return stream.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle else stream


def _check_source(source: dict[str, Any], where: str) -> None:
    if not isinstance(source, dict) or not isinstance(source.get("kind"), str) or source["kind"] not in PAIR_SOURCES:
        raise ValueError(f"{where} needs a `kind`, one of {sorted(PAIR_SOURCES)}; it is {source!r:.200}")
    function = PAIR_SOURCES[source["kind"]]
    fields, hints = inspect.signature(function).parameters, get_type_hints(function)
    for name, value in source.items():
        if name == "kind":
            continue
        if name not in fields:
            raise ValueError(f"{where} ({source['kind']}) has no field {name!r}; its fields are {list(fields)}")
        if not isinstance(value, hints[name]) or (isinstance(value, bool) and hints[name] is not bool):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise ValueError(f"{where} ({source['kind']}): {name}={value!r:.200} must be of type {wanted}")
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            raise ValueError(f"{where} ({source['kind']}): {name}={value!r:.200} must hold texts alone")
    missing = [name for name, field in fields.items() if field.default is field.empty and name not in source]
    if missing:
        raise ValueError(f"{where} ({source['kind']}) lacks {missing}; its fields are {list(fields)}")


def _as_stream(dataset: Dataset | IterableDataset) -> IterableDataset:
    if isinstance(dataset, Dataset):
        return dataset.to_iterable_dataset(num_shards=min(len(dataset), MAX_SHARDS))
    return dataset


__all__ = ["PAIR_FEATURES", "PAIR_SOURCES", "REGION_KINDS", "open_pairs"]
