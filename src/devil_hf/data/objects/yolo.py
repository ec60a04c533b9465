"""Folders of YOLO labels as images with objects."""

from os import PathLike
from pathlib import Path

import yaml

from devil_hf.data.images import EXTENSIONS
from devil_hf.data.objects import OBJECT_SOURCES, LocalisedImage, ObjectSource, of_file
from devil_hf.data.objects.masks import Part


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
    by_stem = {path.stem: path for path in pictures.iterdir() if path.suffix.lower() in EXTENSIONS}
    table = _read_names(_names_file(folder, names))
    found = []
    for file in sorted(folder.glob("*.txt")):
        if file.name == "classes.txt":
            continue
        parts: dict[str, list[Part]] = {}
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line.strip():
                name, part = _read_label(line, table, f"{file}:{number}")
                parts.setdefault(name, []).append(part)
        if not parts:
            continue
        if file.stem not in by_stem:
            raise FileNotFoundError(f"no image {file.stem}.* in {pictures} for {file}")
        found.append(of_file(by_stem[file.stem], parts))
    return found


def _read_label(line: str, names: dict[int, str], where: str) -> tuple[str, Part]:
    """The name and the place of one label."""
    try:
        number, *values = [float(field) for field in line.split()]
    except ValueError as error:
        raise ValueError(f"{where} is no YOLO label ({error}): {line[:80]!r}") from error
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
    text = Path(file).read_text(encoding="utf-8")
    if file.endswith(".txt"):
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    table = yaml.safe_load(text)  # reads JSON as well
    if key or (isinstance(table, dict) and "names" in table):
        table = table.get(key or "names")
    if isinstance(table, list):
        table = dict(enumerate(table))
    try:
        return {int(number): str(name) for number, name in table.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{spec} maps no class ids to names; FILE#KEY names a table inside a file") from error


OBJECT_SOURCES.register(
    "yolo", ObjectSource("folder of YOLO labels (*.txt)", lambda text: any(Path(text).glob("*.txt")), read_yolo)
)
