"""Pairs of any data set of the Hub, or of a local one that `datasets` can load."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.utils.file_utils import xexists

from devil_hf.data.pairs import MAX_SHARDS, PAIR_FEATURES, PAIR_SOURCES
from devil_hf.data.pairs.folder import caption_columns, texts_of


@PAIR_SOURCES.register("hub")
def open_hub(
    path: str,
    image_column: str,
    caption_column: str | list,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    key_column: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Any data set of the Hub, or a local directory that `datasets` can load.

    Args:
        path: hub id, directory with data files, or directory written by `save_to_disk`.
        image_column: column of images, or of their paths.
        caption_column: columns with a caption or a list of them.
        split: split, or part of one such as `train[:10%]`.
        name: configuration of the data set.
        revision: commit, branch or tag.
        key_column: column by which a row is named in the log; by default its number.
        streaming: read rows when they are needed, without download and cache.
    """
    dataset = _load(path, name, split, revision, streaming)
    if dataset.column_names is None:
        dataset = dataset._resolve_features()  # a stream of files without a schema: its first rows tell
    where, columns = f"split {split} of {path}", set(dataset.column_names)
    captions = caption_columns(caption_column, columns, where)
    for column in filter(None, (image_column, key_column)):
        if column not in columns:
            raise ValueError(f"{where} has no column {column!r}; its columns are {sorted(columns)}")
    _check_types(dataset.features, image_column, captions, where)
    dataset = dataset.cast_column(image_column, Image(decode=False))
    _check_first(next(iter(dataset), None), image_column, where)
    arguments = {"captions": captions, "key": key_column, "where": f"{path} {split}"}
    if isinstance(dataset, IterableDataset):
        dataset = dataset.select_columns(list({image_column, *captions, *filter(None, [key_column])}))
        return dataset.map(
            _hub_row,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=PAIR_FEATURES,
            fn_kwargs=arguments | {"image": image_column},
        )
    pictures = dataset.select_columns([image_column]).rename_column(image_column, "image")
    texts = dataset.select_columns(list({*captions, *filter(None, [key_column])}))  # images are not rewritten
    texts = texts.map(
        _hub_row,
        with_indices=True,
        remove_columns=texts.column_names,
        features=Features({name: PAIR_FEATURES[name] for name in ("key", "captions", "region", "problem")}),
        fn_kwargs=arguments,
        desc=f"captions of {path}",
    )
    return concatenate_datasets([pictures, texts], axis=1).select_columns(list(PAIR_FEATURES))


def _load(path: str, name: str | None, split: str, revision: str | None, streaming: bool) -> Dataset | IterableDataset:
    written = [file for file in ("state.json", "dataset_dict.json") if (Path(path) / file).is_file()]
    if not written:
        return load_dataset(path, name, split=split, revision=revision, streaming=streaming)
    try:
        dataset = load_from_disk(path)
    except IndexError as error:  # what datasets makes of a data set that was saved without a row
        raise ValueError(f"{path} is empty") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{path} has no split {split!r}; its splits are {sorted(dataset)}")
        dataset = dataset[split]
    return dataset.to_iterable_dataset(num_shards=min(len(dataset), MAX_SHARDS)) if streaming else dataset


def _check_types(features: Features, image_column: str, captions: Sequence[str], where: str) -> None:
    feature = features[image_column]
    if not (isinstance(feature, Image | dict) or getattr(feature, "dtype", "") in ("string", "large_string", "binary")):
        raise ValueError(f"{where}: column {image_column!r} holds {feature}, not images or their paths")
    for name in captions:
        feature = getattr(features[name], "feature", features[name])  # of a list, its elements
        if getattr(feature, "dtype", "") not in ("string", "large_string"):
            raise ValueError(f"{where}: column {name!r} holds {features[name]}, not captions or lists of captions")


def _check_first(row: dict | None, image_column: str, where: str) -> None:
    if row is None:
        raise ValueError(f"{where} is empty")
    image = row[image_column]
    if image and image["bytes"] is None and not xexists(image["path"]):
        raise FileNotFoundError(f"{where}: column {image_column!r} names {image['path']!r}, which does not exist")


def _hub_row(row: dict, index: int, captions: list[str], key: str | None, where: str, image: str | None = None) -> dict:
    texts = [text for name in captions for text in texts_of(row[name])]
    pair = {"key": str(row[key]) if key else f"{where} row {index}", "captions": texts, "region": None, "problem": None}
    return pair | {"image": row[image]} if image else pair
