"""Folders of YOLO labels as images with objects."""

import math
import unicodedata
from os import PathLike
from pathlib import Path

from devil_hf.data.images import EXTENSIONS
from devil_hf.data.objects import OBJECT_SOURCES, LocalisedImage, ObjectSource, of_file
from devil_hf.data.objects.masks import Part
from devil_hf.text_files import numbered_lines, read_yaml, text_lines


def read_yolo(source: str, images: str | PathLike | None = None, names: str | PathLike | None = None) -> list[LocalisedImage]:
    """YOLO labels: a line per object, its class and a box (centre, size) or a polygon, in shares of the image.

    Args:
        source: folder of `.txt` files named as their images.
        images: folder of the images; by default the label folder's path with `labels` replaced by `images`.
        names: see `open_localised`; by default a `data.yaml` or `classes.txt` in or above the folder.
    """
    folder = Path(source)
    usual = Path(*("images" if part == "labels" else part for part in folder.parts))
    pictures = Path(images) if images else usual
    if not pictures.is_dir():
        raise FileNotFoundError(f"{pictures} does not exist: name the folder of the images (--images)")
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(pictures.iterdir()):
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            by_stem.setdefault(unicodedata.normalize("NFC", path.stem), []).append(path)
    table = _read_names(_names_file(folder, names))
    found = []
    for file in sorted(folder.glob("*.txt")):
        if file.name == "classes.txt" or not file.is_file():
            continue
        parts: dict[str, list[Part]] = {}
        for where, line in numbered_lines(file):
            name, part = _read_label(line, table, where)
            parts.setdefault(name, []).append(part)
        if not parts:
            continue
        own = by_stem.get(unicodedata.normalize("NFC", file.stem), [])
        if not own:
            raise FileNotFoundError(f"no image {file.stem}.* in {pictures} for {file}")
        if len(own) > 1:
            raise ValueError(f"{file} may be of {own[0].name} or of {own[1].name} in {pictures}: keep one of them there")
        found.append(of_file(own[0], parts))
    return found


def _read_label(line: str, names: dict[int, str], where: str) -> tuple[str, Part]:
    """The name and the place of one label."""
    try:
        number, *values = [float(field) for field in line.split()]
    except ValueError as error:
        raise ValueError(f"{where} is no YOLO label ({error}): {line[:80]!r}") from error
    if not number.is_integer() or not all(map(math.isfinite, values)):
        raise ValueError(f"{where} is no YOLO label: its class must be a whole number, and what follows numbers: {line[:80]!r}")
    if int(number) not in names:
        raise ValueError(f"{where} is of class {int(number)}, which has no name; the names are of {sorted(names)[:10]}...")
    if len(values) == 4:
        x, y, width, height = values
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        return names[int(number)], {"box": box, "shares": True}
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{where} has {len(values)} numbers after the class: a box has 4, a polygon 6, 8, ...")
    return names[int(number)], {"polygons": [values], "shares": True}


def _names_file(folder: Path, names: str | PathLike | None) -> str:
    if names:
        return str(names)
    for parent in (folder, *list(folder.parents)[:3]):
        for name in ("data.yaml", "classes.txt"):
            if (parent / name).is_file():
                return str(parent / name)
    raise FileNotFoundError(f"no data.yaml or classes.txt in or above {folder}: give the class names (--names)")


def _read_names(spec: str) -> dict[int, str]:
    file, _, key = spec.partition("#")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: it should give the class names")
    if file.endswith(".txt"):
        names = {number: line.strip() for number, line in enumerate(text_lines(file))}  # the place of a line is its id
        return {number: name for number, name in names.items() if name}
    table = read_yaml(file)  # reads JSON as well
    if key or (isinstance(table, dict) and "names" in table):
        table = table.get(key or "names") if isinstance(table, dict) else None
    if isinstance(table, list):
        table = dict(enumerate(table))
    try:
        names = {int(number): str(name) for number, name in table.items() if name is not None}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{spec} maps no class ids to names; FILE#KEY names a table inside a file") from error
    if not names:
        raise ValueError(f"{spec} names no class; FILE#KEY names a table inside a file")
    return names


def _files(source: str, names: str | PathLike | None) -> list[Path]:
    return [Path(source), Path(_names_file(Path(source), names).partition("#")[0])]


OBJECT_SOURCES.register(
    "yolo", ObjectSource("folder of YOLO labels (*.txt)", lambda text: any(Path(text).glob("*.txt")), read_yolo, _files)
)
