"""The kinds of sources that a recipe can name, each opened as undecoded rows with the columns of `PAIR_FEATURES`.

    {"kind": "folder", "path": "flickr8k", "split": "train"}
    {"kind": "coco", "annotations": "captions_val2017.json", "images": "val2017"}
    {"kind": "flickr", "captions": "Flickr8k.token.txt", "images": "Images", "names": "Flickr_8k.trainImages.txt"}
    {"kind": "webdataset", "urls": "https://host/cc3m/{00000..00331}.tar"}
    {"kind": "hub", "path": "user/pairs", "split": "train", "image_column": "image", "caption_column": "caption"}
    {"kind": "shapes", "size": 100000, "seed": 0}
    {"kind": "regions", "path": "instances_train2017.json", "images": "train2017"}

A source is opened completely checked: what is missing is an error here, not in the middle of a run. The one thing that is
left to the decoding of rows is whether each image and caption is any good.
"""

import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.utils.file_utils import xexists
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers.utils import logging

from devil_hf.data.captions import read_coco_captions, read_flickr_captions, read_json_lines
from devil_hf.data.objects import LocalisedImage, open_localised
from devil_hf.data.shards import check_shards, expand_urls, shard_rows
from devil_hf.data.worlds import SHAPES, USUAL_COUNT, World, parse_world
from devil_hf.model.image_processing_devil import load_images

logger = logging.get_logger(f"transformers.{__name__}")

PAIR_FEATURES = Features(
    {
        "key": Value("string"),
        "image": Image(decode=False),
        "captions": List(Value("string")),
        "region": Value("binary"),  # PNG, white where the captions speak of; None for the whole image
        "problem": Value("string"),
    }
)
METADATA_FILES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("image", "file_name")
CAPTION_COLUMNS = ("captions", "caption", "text")
REGIONS = "regions"
REGION_TEMPLATES = ("{}", "a {}", "the {}")
MAX_SHARDS = 64  # of a stream of a saved data set


def open_folder(path: str, split: str | None = None, caption_column: str | list | None = None) -> Dataset:
    """Images with a `captions.jsonl`, `metadata.jsonl` or `metadata.csv`, as `imagefolder` has it.

    Args:
        path (`str`): The folder. Each line names an image (`image` or `file_name`, relative to the file).
        split (`str`, *optional*): The lines with this value of `split`, or the subfolder of this name with a metadata file.
        caption_column (`str` or list of `str`, *optional*): Columns with a caption or a list of them; by default the
            first of `captions`, `caption` and `text` that is there.
    """
    file = _metadata_file(Path(path), split)
    lines = list(_read_csv(file)) if file.suffix == ".csv" else [fields for _, fields in read_json_lines(file)]
    columns = {name for line in lines for name in line}
    image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image_column is None:
        raise ValueError(f"{file} has no column {' or '.join(IMAGE_COLUMNS)}; its columns are {sorted(columns)}")
    caption_columns = _caption_columns(caption_column, columns, str(file))
    if split is not None and file.parent == Path(path):
        if "split" not in columns:
            raise ValueError(f"{file} has no column split, so split={split!r} cannot be chosen; leave it out")
        known = sorted({str(line.get("split")) for line in lines})
        lines = [line for line in lines if line.get("split") == split]
        if not lines:
            raise ValueError(f"no image of {file} is in split {split!r}; its splits are {known}")
    unnamed = [position for position, line in enumerate(lines, 1) if not line.get(image_column)]
    if unnamed:
        raise ValueError(f"{file}: {len(unnamed)} rows name no {image_column}, the first is row {unnamed[0]}")
    names = [line[image_column] for line in lines]
    captions = [[text for name in caption_columns for text in _texts(line.get(name))] for line in lines]
    return _of_files(file.parent, names, captions)


def open_coco(annotations: str, images: str, names: str | list | None = None, allow_missing: bool = False) -> Dataset:
    """COCO captions.

    Args:
        annotations (`str`): JSON file with `images` and `annotations`, plain or gzipped.
        images (`str`): Folder of the images.
        names (`str` or list of `str`, *optional*): Only these file names; a file has one per line.
        allow_missing (`bool`): Leave out images that are absent, instead of an error.
    """
    return _of_captions(_existing(annotations), read_coco_captions(annotations), images, names, allow_missing)


def open_flickr(captions: str, images: str, names: str | list | None = None, allow_missing: bool = False) -> Dataset:
    """Flickr8k or Flickr30k captions.

    Args:
        captions (`str`): Token file with lines `name.jpg#0<TAB>caption`, plain or gzipped.
        images (`str`): Folder of the images.
        names (`str` or list of `str`, *optional*): Only these file names, the split; a file has one per line.
        allow_missing (`bool`): Leave out images that are absent, instead of an error.
    """
    return _of_captions(_existing(captions), read_flickr_captions(captions), images, names, allow_missing)


def open_webdataset(urls: str | list, caption_field: str = "txt") -> IterableDataset:
    """Tar shards in the layout of img2dataset, streamed; see `devil_hf.data.shards`.

    Args:
        urls (`str` or list of `str`): Paths or URLs, with `{00000..00331}` for numbered shards.
        caption_field (`str`): File ending of the caption, or `json.NAME` for a field of the json member.
    """
    shards = expand_urls(urls)
    check_shards(shards, caption_field)
    arguments = {"urls": shards, "caption_field": caption_field}
    return IterableDataset.from_generator(shard_rows, features=PAIR_FEATURES, gen_kwargs=arguments)


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
        path (`str`): Hub id, directory with data files, or directory written by `save_to_disk`.
        image_column (`str`): Column of images, or of their paths.
        caption_column (`str` or list of `str`): Columns with a caption or a list of them.
        split (`str`): Split, or part of one such as `train[:10%]`.
        name (`str`, *optional*): Configuration of the data set.
        revision (`str`, *optional*): Commit, branch or tag.
        key_column (`str`, *optional*): Column by which a row is named in the log; by default its number.
        streaming (`bool`): Read rows when they are needed, without download and cache.
    """
    dataset = _load(path, name, split, revision, streaming)
    if dataset.column_names is None:
        dataset = dataset._resolve_features()  # a stream of files without a schema: its first rows tell
    where, columns = f"split {split} of {path}", set(dataset.column_names)
    captions = _caption_columns(caption_column, columns, where)
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


def open_shapes(size: int, seed: int, captions: int = 5, streaming: bool = True) -> Dataset | IterableDataset:
    """The embedded world of shapes, drawn when it is read, or written once to the cache of `datasets`.

    Args:
        size: number of scenes.
        seed: of the world; different seeds share no scene. Recipes train on world 0, and world 1 is held out.
        captions: per scene.
        streaming: draw scenes when they are read.
    """
    if size < 1 or captions < 1:
        raise ValueError(f"size={size} and captions={captions} must both be positive")
    arguments = {"ranges": World(size, seed).ranges(), "size": size, "seed": seed, "captions": captions}
    cls = IterableDataset if streaming else Dataset
    return cls.from_generator(_shapes_rows, features=PAIR_FEATURES, gen_kwargs=arguments)


def open_regions(
    path: str, images: str | None = None, names: str | None = None, templates: list | None = None
) -> Dataset:
    """Objects with masks and names, each a row of its own: the translator sees the object's places only, and learns its name.

    The masks are drawn when the source is opened. All objects of a class in an image are one region, of which training reads
    what fills its locations most: beside a large object, small ones of its class count little (see `location_dropout`).

    Args:
        path (`str`): COCO instances JSON, Pascal VOC folder, folder of YOLO labels, or `shapes:COUNT[:SEED]`; see
            [`~devil_hf.data.objects.open_localised`].
        images (`str`, *optional*): Folder of the images, where it is not the usual one.
        names (`str`, *optional*): Class names of YOLO labels.
        templates (`list` of `str`, *optional*): What is said of a region, with `{}` for its name.
    """
    templates = list(REGION_TEMPLATES) if templates is None else templates
    if not templates or not all(isinstance(template, str) and template.count("{}") == 1 for template in templates):
        raise ValueError(f"templates={templates!r} must each hold the name once, as {{}}, such as 'a {{}}'")
    columns: dict[str, list] = {name: [] for name in PAIR_FEATURES}
    for example in tqdm(open_localised(path, images, names), desc="regions", unit="image", leave=False):
        for row in _region_rows(example, templates):
            for name, value in row.items():
                columns[name].append(value)
    if not columns["key"]:
        raise ValueError(f"{path} has no object that covers a pixel of its image")
    return Dataset.from_dict(columns, features=PAIR_FEATURES)


def _region_rows(example: LocalisedImage, templates: Sequence[str]) -> Iterator[dict]:
    """A row for each object of an image, or one with a problem."""
    try:
        content = example.read()
        picture = load_images(content)[0]
        masks = example.draw((picture.height, picture.width))
    except (OSError, ValueError) as error:  # one broken file among thousands must not stop a run
        yield {"key": example.key, "image": None, "captions": [], "region": None, "problem": str(error)}
        return
    image: dict[str, bytes | str | None] = {"bytes": _png(picture), "path": None}
    if isinstance(content, str | Path):
        image = {"bytes": None, "path": str(content)}
    for phrase, mask in masks.items():
        if phrase in example.groups and mask.any():
            captions = [template.format(phrase) for template in templates]
            region = _png(PILImage.fromarray(mask))
            key = f"{example.key} {phrase}"
            yield {"key": key, "image": image, "captions": captions, "region": region, "problem": None}


def _png(image: PILImage.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


SOURCE_KINDS: dict[str, Callable[..., Dataset | IterableDataset]] = {
    "folder": open_folder,
    "coco": open_coco,
    "flickr": open_flickr,
    "webdataset": open_webdataset,
    "hub": open_hub,
    SHAPES: open_shapes,
    REGIONS: open_regions,
}


def named_sources(name: str, split: str | None = None, count: int = USUAL_COUNT) -> list[dict[str, Any]]:
    """The sources that a name on the command line stands for.

    Args:
        name: a caption folder, scenes as `parse_world` reads them, or a YAML file with a source or a list of them.
        split: of a caption folder.
        count: scenes of "shapes" without a number.

    Raises:
        ValueError: for a name that is none of these, or a split of anything but a folder.
    """
    sources: list[dict[str, Any]]
    if world := parse_world(name, count):
        sources = [{"kind": SHAPES, "size": world.count, "seed": world.seed}]
    elif Path(name).is_dir():
        return [{"kind": "folder", "path": name} | ({"split": split} if split else {})]
    elif Path(name).is_file() and Path(name).suffix in (".yaml", ".yml"):
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        sources = content if isinstance(content, list) else [content]
    else:
        raise ValueError(
            f"{name!r} is neither a caption folder, nor shapes:COUNT, nor a YAML file of sources; a data set of the Hub is a "
            "YAML file with {kind: hub, path: USER/NAME, image_column: image, caption_column: caption}"
        )
    if split:
        raise ValueError(f"split={split!r} is of a caption folder; {name!r} names its own")
    return sources


def _metadata_file(folder: Path, split: str | None) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    folders = [folder, *([folder / split] if split else [])]
    found = next((place / name for place in folders for name in METADATA_FILES if (place / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{' and '.join(map(str, folders))} hold none of {', '.join(METADATA_FILES)}")
    return found


def _read_csv(file: Path) -> Iterator[dict]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _caption_columns(wanted: str | list | None, columns: Collection[str], where: str) -> list[str]:
    if wanted is None:
        wanted = [name for name in CAPTION_COLUMNS if name in columns][:1] or list(CAPTION_COLUMNS)
    names = [wanted] if isinstance(wanted, str) else wanted
    missing = [name for name in names if name not in columns]
    if missing or not names:
        raise ValueError(f"{where} has no column {' or '.join(missing)}; its columns are {sorted(columns)}")
    return names


def _texts(value: str | Sequence | None) -> list[str]:
    """A caption, a list of captions or nothing -> list of captions; what is no text counts as nothing."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _of_files(folder: Path, names: Sequence[str], captions: Sequence[list[str]]) -> Dataset:
    if not names:
        raise ValueError(f"no image of {folder} has captions")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} images are absent, the first is {folder / missing[0]}")
    images = [{"path": str(folder / name), "bytes": None} for name in names]
    nothing = [None] * len(names)
    columns = {
        "key": list(names),
        "image": images,
        "captions": list(captions),
        "region": nothing,
        "problem": nothing,
    }
    return Dataset.from_dict(columns, features=PAIR_FEATURES)


def _existing(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


def _of_captions(
    file: str, captions: dict[str, list[str]], images: str, names: str | list | None, allow_missing: bool
) -> Dataset:
    if not Path(images).is_dir():
        raise FileNotFoundError(f"there is no folder {images}")
    if isinstance(names, str):
        names = Path(_existing(names)).read_text(encoding="utf-8").split()
    chosen = list(captions) if names is None else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in captions]
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(chosen)} images have no caption in {file}, the first is {unknown[0]}")
    if allow_missing:
        present = [name for name in chosen if (Path(images) / name).is_file()]
        logger.info(f"{len(present)} of {len(chosen)} images of {file} are in {images}")
        chosen = present
    return _of_files(Path(images), chosen, [captions[name] for name in chosen])


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
    texts = [text for name in captions for text in _texts(row[name])]
    pair = {"key": str(row[key]) if key else f"{where} row {index}", "captions": texts, "region": None, "problem": None}
    return pair | {"image": row[image]} if image else pair


def _shapes_rows(ranges: Sequence[tuple[int, int]], size: int, seed: int, captions: int) -> Iterator[dict]:
    world = World(size, seed)
    for start, stop in ranges:
        for index in range(start, stop):
            scene, texts = world.captioned(index, captions)
            image = {"bytes": _png(PILImage.fromarray(scene.image)), "path": None}
            key = f"shapes {seed} {index}"
            yield {"key": key, "image": image, "captions": texts, "region": None, "problem": None}
