"""Statements about images, true and false: the one reader of the files that `devil evaluate pairs` takes.

A JSON lines file names an image in each line (`image`, relative to the file or to a folder that is given), what is said of it,
and perhaps a split (`image_split`, else `split`). What is said has one of three forms:

    {"image": "a.jpg", "type": "swap_att", "caption": "A red car by a blue hut.", "negative_caption": "A blue car by a red hut."}
    {"image": "b.jpg", "caption": "The cat is on the bench.", "label": 1, "relation": "on"}
    {"image": "c.jpg", "statements": [{"caption": "The cat is under the bench.", "label": 0, "relation": "under"}, ...]}

The first is a pair of a true caption and a false one that differs little, as SugarCrepe has it (Hsieh et al., 2023); the second
is a statement that is true or false, as VSR has it (Liu et al., 2023), the third several of an image. Lines may name an image
again; a file holds pairs or statements, not both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from devil_hf.text_files import existing_file, read_json_lines

FORMS = 'caption and negative_caption; or caption and label (0 or 1); or a list "statements" of the latter'


@dataclass(frozen=True)
class Said:
    """Something that is said of an image.

    Args:
        group: its type or relation; "" where the line does not say it.
        text: a caption.
        true: whether it is true of the image.
        against: of a pair, the false caption beside a true `text`; None for a statement on its own.
    """

    group: str
    text: str
    true: bool = True
    against: str | None = None


@dataclass
class StatedImage:
    """An image, and everything that a file says of it.

    Args:
        key: its name in the file.
        path: of the image.
        said: in the order of the lines.
    """

    key: str
    path: Path
    said: list[Said] = field(default_factory=list)


def read_statements(file: str | PathLike, images: str | PathLike | None = None, split: str | None = None) -> list[StatedImage]:
    """The images of a file in their order, each once, none of them opened.

    Args:
        file: JSON lines, see above.
        images: folder that the names are relative to; by default that of the file.
        split: only lines of this split.

    Raises:
        FileNotFoundError: if the file or an image is not there.
        ValueError: for a line of another form, pairs beside statements, a split that is not there, and a file that says nothing.
    """
    file, found = Path(file), dict[str, StatedImage]()
    folder, splits = Path(images) if images else file.parent, set()
    for where, line in read_json_lines(file):
        own = line.get("image_split", line.get("split"))
        splits.add(str(own))
        if split is not None and own != split:
            continue
        name = line.get("image")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} names no image: its fields are {sorted(line)}")
        name = str(PurePosixPath(name))  # "./a.png" is a.png
        path = existing_file(folder, name) or folder / name
        found.setdefault(name, StatedImage(name, path)).said.extend(_said(line, where))
    if split is not None and not found:
        raise ValueError(f"no image of {file} is in split {split!r}; its splits are {sorted(splits)}")
    if not any(one.said for one in found.values()):
        raise ValueError(f"{file} says nothing of any image: a line needs {FORMS}")
    if len({said.against is None for one in found.values() for said in one.said}) > 1:
        raise ValueError(f"{file} holds pairs and single statements: put them into two files, which are scored differently")
    missing = [one.path for one in found.values() if existing_file(folder, one.key) is None]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(found)} images are absent, the first is {missing[0]}; name their folder")
    return [one for one in found.values() if one.said]


def _said(line: Mapping[str, Any], where: str) -> Iterator[Said]:
    several = line.get("statements", [line])
    if not isinstance(several, list) or not all(isinstance(one, Mapping) for one in several):
        raise ValueError(f"{where}: statements must be a list of objects, not {several!r:.80}")
    for one in several:
        text, against, label = one.get("caption"), one.get("negative_caption"), one.get("label")
        group = one.get("type", one.get("relation")) or ""
        if not _is_text(text) or not isinstance(group, str) or (against is None) == (label is None):
            raise ValueError(f"{where} needs {FORMS}; got {dict(one)!r:.120}")
        if against is not None and not _is_text(against):
            raise ValueError(f"{where}: negative_caption must be text, not {against!r:.80}")
        if label is not None and label not in (0, 1):
            raise ValueError(f"{where}: label must be 0 or 1, not {label!r:.80}")
        yield Said(group, text, label is None or bool(label), against)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


__all__ = ["Said", "StatedImage", "read_statements"]
