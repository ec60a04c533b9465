"""Settings: one dataclass per verb, from which its command line, Python call, YAML file and JSON record are made.

```python
@dataclass
class DescribeSettings:
    '''What `devil describe` does.'''

    images: list[str] = option("files or URLs", positional=True)
    layers: list[str] | None = option("names or indices of layers; default: every one", None)
    window: int = option("side of the square around each place", 1)

settings = parse(DescribeSettings, ["dog.jpg", "--window", "3"])   # the command line
settings = make(DescribeSettings, {"images": ["dog.jpg"]})          # values of a YAML file, or of a Python call
record = as_record(settings)                                        # JSON
```

Options have hyphens; underscores are understood. The hint of a field decides how it is read: `bool` becomes `--x` and `--no-x`
(`--x true` is understood), `list[T]` takes several words, `Literal` is a choice, a bare `list` or `dict` is JSON, `X | None` is
X, or nothing. Settings inherit from settings (`@dataclass(kw_only=True)`); a method `validate` checks what belongs together,
and a static method `locate(path)` may know the file of what `--config` names (a folder, a name).

The same class read by tyro takes 0.16 s instead of 0.09 s of imports and parsing, by transformers' HfArgumentParser 0.72 s, and
neither of them checks YAML and Python calls by the same rules, so this file does it on argparse.
"""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from devil_hf import text_files

Settings = TypeVar("Settings")
LARGEST = 2**63  # whole numbers stay below, as those of torch do
NOTHING: tuple[Any, ...] = ("", None, [], {}, (), dataclasses.MISSING)  # defaults that need not be told


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    positional: bool = False,
    choices: Callable[[], Collection[str]] | None = None,
    metavar: str | None = None,
    least: float | None = None,
) -> Any:
    """A field of settings.

    Args:
        help: one line, for `--help` and the documentation.
        default: what counts where nothing is given; without one the option is required.
        positional: a word of the command line without `--name` in front, which is understood too where there is a default.
        choices: gives the allowed values when they are needed, for instance the names of a registry.
        metavar: what stands for the value in `--help`.
        least: the lowest value of a number.
    """
    metadata = {"help": help, "positional": positional, "choices": choices, "metavar": metavar, "least": least}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ------------------------------------------------------------------------------------------------------- command line


def add_options(parser: argparse.ArgumentParser, cls: type, relaxed: bool = False) -> None:
    """Add every field of a settings class to a parser, and `--config` for a YAML file of them.

    Args:
        relaxed: whether required fields may be missing, since a file gives them.
    """
    hints = typing.get_type_hints(cls)
    for field in _in_order_of_help(cls):
        _add_option(parser, field, hints[field.name], relaxed)
    place = "YAML file of these settings" + (", or a folder or name that has one" if hasattr(cls, "locate") else "")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"{place}; options win over it")


def _in_order_of_help(cls: type) -> list[dataclasses.Field]:
    """Positional fields, then the options that a class adds to those that it inherits, then these."""
    depth = {name: at for at, one in reversed(list(enumerate(cls.__mro__))) for name in vars(one).get("__annotations__", {})}
    fields = dataclasses.fields(cls)
    return sorted(fields, key=lambda field: -1 if field.metadata.get("positional") else depth[field.name])


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any, relaxed: bool) -> None:
    metadata, hint = field.metadata, _without_none(hint)
    default, flag = default_of(field), _flag(field.name)
    told = "" if isinstance(default, bool) or default in NOTHING else f" (default: {_shown(default)})"
    given: dict[str, Any] = {"default": argparse.SUPPRESS, "help": (metadata.get("help", "") + told).replace("%", "%%")}
    if hint is bool:
        if default is True:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **given)
            return
        parser.add_argument(flag, action="store_true", **given)
        parser.add_argument(
            _flag(f"no_{field.name}"), dest=field.name, action="store_false", **given | {"help": argparse.SUPPRESS}
        )
        return
    inner, several = _element(hint)
    given["type"] = _reader(inner)
    given["metavar"] = metadata.get("metavar") or _metavar(field.name.rstrip("s") if several else field.name, given["type"])
    if choices := allowed_values(field, inner):
        given["metavar"] = "{" + ",".join(choices) + "}"
    needed = default is dataclasses.MISSING and not relaxed
    if metadata.get("positional"):
        nargs = ("+" if needed else "*") if several else (None if needed else "?")
        parser.add_argument(field.name, nargs=nargs, **given)
    if choices:
        given["choices"] = [given["type"](choice) for choice in choices]
    if not metadata.get("positional"):
        parser.add_argument(flag, nargs="+" if several else None, required=needed, **given)
    elif not needed:
        parser.add_argument(flag, nargs="+" if several else None, **given | {"help": argparse.SUPPRESS})


def parse(cls: type[Settings], arguments: Sequence[str], **parser_settings: Any) -> Settings:
    """Settings of a command line; ends the process with a message for what argparse cannot read.

    Raises:
        ValueError: for values that the settings refuse.
    """
    parser = argparse.ArgumentParser(**parser_settings)
    words = understood(cls, arguments)
    add_options(parser, cls, relaxed=names_file(words))
    return from_namespace(cls, parser.parse_args(words))


def from_namespace(cls: type[Settings], namespace: argparse.Namespace) -> Settings:
    """Settings of parsed options: the fields of the file `--config`, and over them those of the command line."""
    file = getattr(namespace, "config", None)
    return make(cls, (read_yaml(cls, file) if file is not None else {}) | given(cls, namespace))


def names_file(arguments: Sequence[str]) -> bool:
    """Whether a command line has `--config FILE`, so that required settings may stand in the file."""
    return any(word.partition("=")[0] == "--config" for word in arguments)


def given(cls: type, namespace: argparse.Namespace) -> dict[str, Any]:
    """The fields of settings that were given on the command line."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(namespace).items() if name in names}


def understood(cls: type, arguments: Sequence[str]) -> list[str]:
    """A command line as argparse reads it: options with hyphens, `--flag true` as `--flag`, `--flag false` as `--no-flag`."""
    hints = typing.get_type_hints(cls)
    flags = {_flag(name): _flag(f"no_{name}") for name, hint in hints.items() if _without_none(hint) is bool}
    words: list[str] = []
    for word in hyphenated(arguments):
        name, equals, value = word.partition("=")
        if name in flags and equals and value in ("true", "false"):
            words += [name if value == "true" else flags[name]]
        elif words and words[-1] in flags and "--" not in words and word in ("true", "false"):
            words[-1] = words[-1] if word == "true" else flags[words[-1]]
        else:
            words.append(word)
    return words


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Options written with underscores (`--max_steps=3`) as they are known, with hyphens."""
    words, rest = [], False
    for word in arguments:
        rest = rest or word == "--"
        if word.startswith("--") and not rest:
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        words.append(word)
    return words


def _metavar(name: str, reader: Callable[[str], Any]) -> str:
    words: dict[Any, str] = {_whole_number: "N", _number: "X", _json: "JSON"}
    return words.get(reader) or name.rpartition("_")[2].upper()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _json(text: str) -> Any:
    return _typed(text_files.parse_json, text, repr(text))


def _reader(hint: Any) -> Callable[[str], Any]:
    if typing.get_origin(hint) is typing.Literal:
        return type(typing.get_args(hint)[0])
    readers: dict[Any, Callable[[str], Any]] = {int: _whole_number, float: _number, str: str, Path: Path}
    return readers.get(hint, _json)


def _whole_number(text: str) -> int:
    return _typed(read_number, int, text)


def _number(text: str) -> float:
    return _typed(read_number, float, text)


def _typed(read: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader makes of a word, whose ValueError argparse tells only as its own."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# --------------------------------------------------------------------------------------------- what many verbs have


@dataclasses.dataclass(kw_only=True)
class JsonSettings:
    """What a verb has that prints something."""

    json: bool = option("print JSON", False)


@dataclasses.dataclass(kw_only=True)
class ModelSettings(JsonSettings):
    """What a verb has that asks a checkpoint."""

    checkpoint: str | None = option("directory, Hub id, or a shipped one: photos (default) or shapes", None)
    device: str | None = option("default: cuda where there is one", None)
    quantize: Literal["int8"] | None = option("answers that are faster on a CPU, and not exact", None)


@dataclasses.dataclass(kw_only=True)
class LayerSettings(ModelSettings):
    """What a verb has that asks some layers of a checkpoint."""

    layers: list[str] | None = option("names or indices of layers (default: every one)", None)


def read_layers(names: Sequence[str] | None, known: Sequence[str]) -> list[str | int] | None:
    """Layers as typed: a name wins over an index, since some networks name their layers by numbers."""
    if names is None:
        return None
    return [int(name) if name not in known and name.lstrip("-").isdigit() else name for name in names]


def read_windows(typed: Sequence[str], asked: Sequence[str], known: Sequence[str]) -> dict[str, int]:
    """Windows as typed, LAYER=SIDE, by the layer's full name.

    Args:
        asked: the names of the layers that are asked.
        known: the names of all layers.

    Raises:
        ValueError: for one that is not LAYER=SIDE, names no layer that is asked, names one twice, or has an even side.
    """
    windows: dict[str, int] = {}
    for text in typed:
        name, equals, side = text.rpartition("=")
        if not equals or not re.fullmatch("[0-9]{1,9}", side) or int(side) % 2 == 0:
            raise ValueError(f"--windows {text} is not LAYER=SIDE with an odd side, such as {asked[0]}=3")
        (layer,) = read_layers([name], known) or [name]
        if isinstance(layer, int):
            layer = known[layer] if -len(known) <= layer < len(known) else name
        if layer not in asked or layer in windows:
            reason = "was given twice" if layer in windows else f"is not asked (asked: {', '.join(asked)})"
            raise ValueError(f"--windows {text}: layer {layer!r} {reason}")
        windows[layer] = int(side)
    return windows


def check_window(window: int, places: bool = True) -> None:
    """Raise a ValueError for the side of a square around places that is none, or where there are no places."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"--window {window} must be odd, 1 for the place alone")
    if window > 1 and not places:
        raise ValueError(f"--window {window} is the side of a square around places: name them, --locations all or ROW,COLUMN")


# ------------------------------------------------------------------------------------------------------- documentation


def markdown_table(cls: type) -> str:
    """The fields of a settings class as a Markdown table, for the documentation: name, type, default and help."""
    hints = typing.get_type_hints(cls)
    lines = ["| option | type | default | |", "| --- | --- | --- | --- |"]
    for field in _in_order_of_help(cls):
        default, (inner, several) = default_of(field), _element(_without_none(hints[field.name]))
        word = field.metadata.get("metavar") or _metavar(field.name.rstrip("s") if several else field.name, str)
        name = word if field.metadata.get("positional") else _flag(field.name)
        shown = "" if default is False or default in NOTHING else f"`{_shown(default)}`"
        told = "**required**" if default is dataclasses.MISSING else shown
        kind = _told_type(field, inner)
        cells = [f"`{name}`", f"several: {kind}" if several else kind, told, field.metadata.get("help", "")]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _told_type(field: dataclasses.Field, hint: Any) -> str:
    names = {bool: "flag", str: "text", int: "whole number", float: "number", Path: "path"}
    return " or ".join(f"`{one}`" for one in allowed_values(field, hint)) or names.get(hint, "JSON")


# --------------------------------------------------------------------------------------------------------- types of fields


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kept = [one for one in typing.get_args(hint) if one is not type(None)]
        return kept[0] if len(kept) == 1 else Any
    return hint


def _element(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there are several of them."""
    if typing.get_origin(hint) in (list, tuple, Sequence):
        return typing.get_args(hint)[0], True
    return hint, False


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, `dataclasses.MISSING` for one that must be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def allowed_values(field: dataclasses.Field, hint: Any) -> list[str]:
    """The values that a field may have; empty where any of its type will do."""
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    choices = field.metadata.get("choices")
    return [] if choices is None else list(choices())


# ----------------------------------------------------------------------------------------------- values, files, records


def make(cls: type[Settings], values: Mapping[str, Any], where: str = "") -> Settings:
    """Checked settings of values by name, as a YAML file or a Python call has them.

    Args:
        where: where they come from, for messages.

    Raises:
        ValueError: for names that are no setting, values of a wrong type, a missing one, and what `cls.validate` finds.
    """
    check_names(cls, values, where)
    hints, checked = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            checked[field.name] = _checked(field, hints[field.name], values[field.name])
        elif default_of(field) is dataclasses.MISSING:
            raise ValueError(f"{field.name} is missing: {field.metadata.get('help', 'it has no default')}")
    settings = cls(**checked)
    if validate := getattr(settings, "validate", None):
        validate()
    return settings


def checked(settings: Settings) -> Settings:
    """Settings made in Python, checked as `make` checks them."""
    return make(type(settings), {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)})  # type: ignore[arg-type]


def check_names(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Raise a ValueError for names that are no setting of `cls`."""
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := [str(name) for name in values if name not in names]:
        close = difflib.get_close_matches(unknown[0], names, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        place = f"{where} has " if where else ""
        raise ValueError(f"{place}fields {sorted(unknown)} that {cls.__name__} does not have{guess}; fields are {names}")


def _checked(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    if value is None:
        if type(None) in typing.get_args(hint) or default_of(field) is None:
            return None
        raise ValueError(f"{field.name} is empty: {field.metadata.get('help', '')}")
    hint = _without_none(hint)
    inner, several = _element(hint)
    if several:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
            raise ValueError(f"{field.name}={value!r:.200} must be a list")
        if not value and default_of(field) is dataclasses.MISSING:
            raise ValueError(f"{field.name} is empty: {field.metadata.get('help', '')}")
        return [_checked_one(field, inner, one) for one in value]
    return _checked_one(field, hint, value)


def _checked_one(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    name = field.name
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numbers of numpy and torch
        value = value.item()
    if allowed := allowed_values(field, hint):
        if str(value) not in allowed:
            raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")
        return value
    if hint in (int, float):
        try:
            number = read_number(hint, value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r:.200}: {error}") from error
        if (least := field.metadata.get("least")) is not None and number < least:
            raise ValueError(f"{name}={value!r:.200} must be at least {least}")
        return number
    if hint is Path and isinstance(value, str) and value:
        return Path(value)
    kind = typing.get_origin(hint) or hint
    if kind is not Any and isinstance(kind, type) and not isinstance(value, kind):
        remedy = {str: ", which YAML reads as text in quotes only", bool: ": true or false"}.get(kind, "")
        raise ValueError(f"{name}={value!r:.200} must be of type {getattr(hint, '__name__', hint)}{remedy}")
    return value


def read_number(kind: type[int] | type[float], value: Any) -> int | float:
    """A number of a value, or of its text: YAML reads 1e-3 as text, and 1e6 is a whole number.

    Raises:
        ValueError: for what is no number, is not finite, or not whole where `kind` is `int`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"a {type(value).__name__} is not a number")
    try:
        whole = isinstance(value, int) or (kind is int and re.fullmatch(r"\s*[+-]?\d{1,30}\s*", str(value)))
        number = int(value) if whole else float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{value!r:.200} is not a number") from error
    if not abs(number) < (LARGEST if kind is int else math.inf):
        raise ValueError(f"{value!r:.200} is not a finite number" if kind is float else f"{value!r:.200} is too large")
    if kind is int and not float(number).is_integer():
        raise ValueError(f"{value!r:.200} must be a whole number")
    return kind(number)


def read_yaml(cls: type, file: Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Args:
        file: a file, or whatever else `cls.locate`, where the class has one, knows the file of (a folder, a name).

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is no YAML mapping, and for names that are no setting of `cls`.
    """
    file = getattr(cls, "locate", Path)(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    values = text_files.read_yaml(file)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not fields of {cls.__name__} by name")
    check_names(cls, values, str(file))
    return values


def as_record(settings: Any) -> dict[str, Any]:
    """The settings as JSON can hold them."""
    return {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return {str(name): _plain(one) for name, one in value.items()} if isinstance(value, Mapping) else value


__all__ = [
    "JsonSettings",
    "LayerSettings",
    "ModelSettings",
    "add_options",
    "as_record",
    "check_names",
    "check_window",
    "checked",
    "from_namespace",
    "given",
    "hyphenated",
    "make",
    "markdown_table",
    "names_file",
    "option",
    "parse",
    "read_layers",
    "read_number",
    "read_windows",
    "read_yaml",
    "understood",
]
