"""Text files as people have them: the one reader of each format, for every room.

Text is UTF-8, with or without the byte order mark that Windows programs write, whatever the locale says; lines end in either way;
a gzipped file is read as what is in it. What cannot be read is a ValueError that names file, line and remedy, and shows no bytes.
"""

import csv
import gzip
import json
import unicodedata
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

GZIP = b"\x1f\x8b"
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
LARGEST_RESULTS = 2**26  # bytes of a file with results
LONGEST_FIELD = 2**30  # characters of a CSV field; the csv module stops at 131,072, the most is a C long


def text_lines(path: str | PathLike) -> Iterator[str]:
    """The lines of a text file, one after the other, each without its end.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is no UTF-8 text, or gzipped and damaged.
    """
    with open(path, "rb") as file, _whole(path):
        lines = gzip.GzipFile(fileobj=file) if file.peek(2).startswith(GZIP) else file
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                encoding = BYTE_ORDER_MARKS.get(line[:2], "another encoding") if number == 1 else "another encoding"
                raise ValueError(f"{path}:{number} is not UTF-8 text but {encoding}: save the file as UTF-8") from error


@contextmanager
def _whole(path: str | PathLike) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}): fetch it anew") from error


def read_text(path: str | PathLike) -> str:
    """The text of a file, its lines joined by line feeds; errors are those of `text_lines`."""
    return "\n".join(text_lines(path))


def numbered_lines(path: str | PathLike) -> Iterator[tuple[str, str]]:
    """`file:number` and text of every line that is not blank."""
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            yield f"{path}:{number}", line


def read_list(path: str | PathLike) -> list[str]:
    """A list with an entry on each line that is not blank; an entry may hold spaces, but not begin or end with them."""
    return [text.strip() for _, text in numbered_lines(path)]


def read_json(path: str | PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is no JSON, or nested too deeply to be read.
    """
    return parse_json(read_text(path), str(path))


def read_results(path: str | PathLike) -> Any:
    """What a JSON file of results holds, which may have come from anybody.

    Raises:
        OSError: if it cannot be opened.
        ValueError: as of `read_json`; also for a file of more than `LARGEST_RESULTS` bytes, unpacked, and for one that names a
            key twice, of which JSON would silently take the last.
    """
    with open(path, "rb") as file, _whole(path):
        content = gzip.GzipFile(fileobj=file) if file.peek(2).startswith(GZIP) else file
        if len(content.read(LARGEST_RESULTS + 1)) > LARGEST_RESULTS:
            raise ValueError(f"{path} has more than {LARGEST_RESULTS >> 20} MB, as no file of results has: look what it is")
    return parse_json(read_text(path), str(path), _unique)


def parse_json(text: str, where: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text holds; `where` is named in the ValueError of one that cannot be read.

    Args:
        pairs: makes an object of its keys and values; a `TwiceError` of it is told.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except TwiceError as error:
        raise ValueError(f"{where} cannot be read: {error}; remove or rename one of them") from error
    except (RecursionError, ValueError) as error:  # the latter for numbers of thousands of digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a number of it is too long"
        raise ValueError(f"{where} cannot be read as JSON: {reason}") from error


class TwiceError(ValueError):
    """A key that an object names twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise TwiceError(f"the key {key!r:.100} is there twice")
        found[key] = value
    return found


def read_json_lines(path: str | PathLike) -> Iterator[tuple[str, dict]]:
    """`file:number` and the object of every line that is not blank.

    Raises:
        OSError: if it cannot be opened.
        ValueError: for a line that is not a JSON object.
    """
    for where, line in numbered_lines(path):
        fields = parse_json(line, where)
        if not isinstance(fields, dict):
            raise ValueError(f"{where} is not a JSON object but a {type(fields).__name__}")
        yield where, fields


def read_csv(path: str | PathLike) -> Iterator[tuple[str, dict[str, str]]]:
    """`file:number` and the fields by column of every row of a CSV file that is not blank; the first row names the columns.

    Raises:
        OSError: if it cannot be opened.
        ValueError: for a row with more or fewer fields than there are columns, a column named twice, and quotes that do not end.
    """
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader((f"{line}\n" for line in text_lines(path)), strict=True)
    try:
        columns: list[str] = []
        for row in rows:
            if not any(field.strip() for field in row):
                continue
            where = f"{path}:{rows.line_num}"
            if not columns:
                columns = [field.strip() for field in row]
                if twice := sorted({name for name in columns if columns.count(name) > 1}):
                    raise ValueError(f"{where} names the columns {twice} twice: rename or remove one of each")
                continue
            if len(row) != len(columns):
                raise ValueError(
                    f"{where} has {len(row)} fields, but there are {len(columns)} columns ({', '.join(columns)}): put texts with "
                    'commas into double quotes, "a dog, a cat", and leave no field out'
                )
            yield where, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num} is no CSV ({error}): look for a double quote that is not closed") from error


def read_yaml(path: str | PathLike) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is no YAML, or names a key twice.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; `where` is named in the ValueError of one that cannot be read."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line} is no YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:  # nested too deeply; a date without a month
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{where} is no YAML: {reason:.200}") from error


def key_lines(path: str | PathLike) -> dict[tuple[str | int, ...], int]:
    """In which line of a YAML file each key and each entry of a list stands, by its path from the top.

    What an alias repeats is told of its first place alone: aliases of aliases would never end.
    """
    found: dict[tuple[str | int, ...], int] = {}
    seen: set[int] = set()

    def walk(node: yaml.Node | None, path: tuple[str | int, ...]) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*path, str(key.value))
                found[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                found[(*path, number)] = value.start_mark.line + 1
                walk(value, (*path, number))

    walk(yaml.compose(read_text(path), _Loader), ())
    return found


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def existing_file(folder: Path, name: str) -> Path | None:
    """The file of this name in a folder, also where the disk composes its accents otherwise (macOS).

    None where there is none, because the name is one that no file can have, too.
    """
    forms = dict.fromkeys([name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)])
    return next((folder / form for form in forms if _is_file(folder / form)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than the disk allows, or with a character that it does not
        return False


__all__ = [
    "existing_file",
    "key_lines",
    "numbered_lines",
    "parse_json",
    "parse_yaml",
    "read_csv",
    "read_json",
    "read_json_lines",
    "read_list",
    "read_results",
    "read_text",
    "read_yaml",
    "text_lines",
]
