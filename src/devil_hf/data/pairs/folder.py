"""Pairs of a caption folder: images and one file that says what is on them.

The one reader of `captions.jsonl`, `metadata.jsonl` and `metadata.csv`, as `imagefolder` has it: each line names an image
(`image` or `file_name`, relative to the file), captions, and perhaps a split.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from datasets import Dataset

from devil_hf.data.pairs import PAIR_FEATURES, PAIR_SOURCES
from devil_hf.text_files import existing_file, read_csv, read_json_lines

METADATA_FILES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("image", "file_name")
CAPTION_COLUMNS = ("captions", "caption", "text")


@dataclass(frozen=True)
class CaptionedFile:
    """A line of a caption folder.

    Args:
        name: of the image, as the line has it.
        path: of the image.
        captions: as they were found, empty ones too.
        split: which the image belongs to, where the line says it.
    """

    name: str
    path: Path
    captions: list[str]
    split: str | None


def read_caption_folder(
    folder: str | PathLike, split: str | None = None, caption_column: str | list | None = None
) -> list[CaptionedFile]:
    """Read the lines of a caption folder, without opening any image.

    Args:
        folder: with one of `METADATA_FILES`.
        split: the lines with this value of `split`, or the subfolder of this name with a metadata file; None takes all.
        caption_column: columns with a caption or a list of them; by default the first of `CAPTION_COLUMNS` that is there.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if a line is no JSON object or names no image, a column is not there, or no image is in `split`.
    """
    file = metadata_file(Path(folder), split)
    lines = list((read_csv if file.suffix == ".csv" else read_json_lines)(file))
    if not lines:
        raise ValueError(f"{file} is empty: it should name an image in each line")
    columns = {name for _, line in lines for name in line}
    image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image_column is None:
        raise ValueError(f"{file} has no column {' or '.join(IMAGE_COLUMNS)}; its columns are {sorted(columns)}")
    chosen = caption_columns(caption_column, columns, str(file))
    inner = split is not None and file.parent != Path(folder)
    found = []
    for where, line in lines:
        if not line.get(image_column):
            raise ValueError(f"{where} names no {image_column}: its fields are {sorted(line)}")
        if not isinstance(line[image_column], str):
            raise ValueError(f"{where}: {image_column} must be the name of one file, not {line[image_column]!r:.80}")
        name = texts_of(line[image_column])[0]
        captions = [text for column in chosen for text in texts_of(line.get(column))]
        path = existing_file(file.parent, name) or file.parent / name
        found.append(CaptionedFile(name, path, captions, line.get("split")))
    return found if split is None or inner else _in_split(found, split, file, "split" in columns)


@PAIR_SOURCES.register("folder")
def open_folder(path: str, split: str | None = None, caption_column: str | list | None = None) -> Dataset:
    """Images with a `captions.jsonl`, `metadata.jsonl` or `metadata.csv`.

    Args:
        path: the folder.
        split: the lines with this value of `split`, or the subfolder of this name with a metadata file.
        caption_column: columns with a caption or a list of them; by default the first of `captions`, `caption` and `text`.
    """
    found = read_caption_folder(path, split, caption_column)
    base = metadata_file(Path(path), split).parent
    return rows_of_files(base, [one.name for one in found], [one.captions for one in found])


def rows_of_files(folder: Path, names: Sequence[str], captions: Sequence[list[str]]) -> Dataset:
    """Rows of images in files.

    Args:
        folder: which the names are relative to.
        names: of the images; they become the keys.
        captions: of each image.

    Raises:
        ValueError: if there is no image.
        FileNotFoundError: if an image is absent.
    """
    if not names:
        raise ValueError(f"no image of {folder} has captions")
    paths = [existing_file(folder, name) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} images are absent, the first is {folder / missing[0]}")
    nothing = [None] * len(names)
    columns = {
        "key": list(names),
        "image": [{"path": str(path), "bytes": None} for path in paths],
        "captions": list(captions),
        "region": nothing,
        "problem": nothing,
    }
    return Dataset.from_dict(columns, features=PAIR_FEATURES)


def caption_columns(wanted: str | list | None, columns: Collection[str], where: str) -> list[str]:
    """The columns that hold captions: those that are wanted, else the first of the usual ones that is there.

    Raises:
        ValueError: if one is not there.
    """
    if wanted is None:
        wanted = [name for name in CAPTION_COLUMNS if name in columns][:1] or list(CAPTION_COLUMNS)
    names = [wanted] if isinstance(wanted, str) else wanted
    missing = [name for name in names if name not in columns]
    if missing or not names:
        raise ValueError(f"{where} has no column {' or '.join(missing)}; its columns are {sorted(columns)}")
    return names


def texts_of(value: str | Sequence | None) -> list[str]:
    """A caption, a list of captions or nothing -> list of captions; what is no text counts as nothing.

    Half a pair of surrogates, which JSON may hold and Arrow refuses, becomes a question mark.
    """
    values = value if isinstance(value, list) else [value]
    return [text.encode("utf-8", "replace").decode() for text in values if isinstance(text, str)]


def metadata_file(folder: Path, split: str | None = None) -> Path:
    """The file of a caption folder that names its images, or that of its subfolder `split`.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    folders = [folder, *([folder / split] if split else [])]
    found = next((place / name for place in folders for name in METADATA_FILES if (place / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{' and '.join(map(str, folders))} hold none of {', '.join(METADATA_FILES)}")
    return found


def _in_split(found: list[CaptionedFile], split: str, file: Path, has_splits: bool) -> list[CaptionedFile]:
    if not has_splits:
        raise ValueError(f"{file} has no column split, so split={split!r} cannot be chosen; leave it out")
    chosen = [one for one in found if one.split == split]
    if not chosen:
        known = sorted({str(one.split) for one in found})
        raise ValueError(f"no image of {file} is in split {split!r}; its splits are {known}")
    return chosen
