"""Image-text pairs of every source, as one `datasets` data set of undecoded rows.

A source is a dictionary of a recipe: `kind` and the keyword arguments of that kind's function in `SOURCE_KINDS`.

What a trainer may rely on, and what not:

* Rows and their order depend on (sources, seed, epoch, nodes, workers) and on nothing else.
* `split_dataset_by_node`, then the workers of a `DataLoader`, see every row exactly once per pass. Where the shards cannot
  be dealt out evenly to the nodes, every node reads all of them and takes every n-th row. Nodes may get different
  numbers of rows: a trainer whose steps are collective reads [`~devil_hf.data.decoding.PairStream`], which has no end.
* Exact resume of a stream is reading its rows again up to the place that was reached (undecoded, which is cheap).
  `IterableDataset.state_dict` is *not* exact once there is a shuffle buffer: its content is lost and filled anew.
* `IterableDataset.set_epoch` shuffles the order of shards in every epoch but the first, even where `shuffle=False`.
* Bad rows flow like others until they are decoded, so they never change who reads what.
"""

import inspect
from collections.abc import Sequence
from typing import Any, get_type_hints

from datasets import Dataset, IterableDataset, concatenate_datasets

from devil_hf.data.sources import SOURCE_KINDS

MAX_SHARDS = 64  # of a map-style source that joins a stream


def open_pairs(
    sources: Sequence[dict[str, Any]], seed: int, shuffle: bool, shuffle_buffer: int = 1000
) -> Dataset | IterableDataset:
    """Open all `sources` as one data set.

    Its columns are `key` (str), `image` (`datasets.Image(decode=False)`: `{"bytes", "path"}`, read lazily), `captions`
    (list of str, as they were found) and `problem` (why the row is known to be unusable, else `None`). Several
    sources are concatenated; where one streams, all do, and their shards are shuffled together.

    Args:
        sources (sequence of `dict`): Sources as written in a recipe.
        seed (`int`): Seed of the order.
        shuffle (`bool`): Shuffle; a stream shuffles the order of its shards and rows in a buffer.
        shuffle_buffer (`int`): Rows held in the buffer of a stream, per worker.

    Raises:
        FileNotFoundError: if a file, folder or shard is missing.
        ValueError: if a source is malformed or empty, or lacks a column or split.
    """
    if not sources:
        raise ValueError(f"no source of image-text pairs is given; kinds are {sorted(SOURCE_KINDS)}")
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1")
    for position, source in enumerate(sources):
        _check_source(source, f"sources[{position}]")
    opened = []
    for position, source in enumerate(sources):
        arguments = {name: value for name, value in source.items() if name != "kind"}
        try:
            opened.append(SOURCE_KINDS[source["kind"]](**arguments))
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"sources[{position}] ({source['kind']}): {error}") from error
    if all(isinstance(dataset, Dataset) for dataset in opened):
        dataset = concatenate_datasets(opened)
        return dataset.shuffle(seed=seed) if shuffle else dataset
    stream = concatenate_datasets([_as_stream(dataset) for dataset in opened])
    return stream.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle else stream


def _check_source(source: dict[str, Any], where: str) -> None:
    if not isinstance(source, dict) or source.get("kind") not in SOURCE_KINDS:
        raise ValueError(f"{where} needs a `kind`, one of {sorted(SOURCE_KINDS)}; it is {source!r}")
    function = SOURCE_KINDS[source["kind"]]
    fields, hints = inspect.signature(function).parameters, get_type_hints(function)
    for name, value in source.items():
        if name == "kind":
            continue
        if name not in fields:
            raise ValueError(f"{where} ({source['kind']}) has no field {name!r}; its fields are {list(fields)}")
        if not isinstance(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise ValueError(f"{where} ({source['kind']}): {name}={value!r} must be of type {wanted}")
    missing = [name for name, field in fields.items() if field.default is field.empty and name not in source]
    if missing:
        raise ValueError(f"{where} ({source['kind']}) lacks {missing}; its fields are {list(fields)}")


def _as_stream(dataset: Dataset | IterableDataset) -> IterableDataset:
    if isinstance(dataset, Dataset):
        return dataset.to_iterable_dataset(num_shards=min(len(dataset), MAX_SHARDS))
    return dataset
