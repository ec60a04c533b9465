"""What a verb of the command line is, and what several of them share.

A file of this room, or a module that another package names under the entry point group `devil_hf.plugins`, adds one:

```python
@dataclass(kw_only=True)
class GreetSettings(JsonSettings):
    name: str = option("whom", positional=True)

VERBS.register("greet", Verb("greet", "say hello", "devil greet you", lambda: GreetSettings, greet))
```
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devil_hf.folders import finite
from devil_hf.registry import Registry
from devil_hf.settings import JsonSettings


@dataclass(frozen=True)
class Verb:
    """A verb of the command line, or a group of them.

    Args:
        name: the word after `devil`.
        summary: one line for `--help`, in lower case.
        example: a command line that `--help` ends with.
        settings: returns the dataclass of its settings (see `devil_hf.settings`); imports happen in here.
        run: does the work for settings; the exit code, None for 0.
        subjects: of a group: its members by name. A group has neither settings nor `run`.
        usual: the member that is meant where the command line begins with the name of none.
        notes: returns lines for `--help`, above the example.
        long: whether its work lasts so long that dead objects are looked for from its beginning on, and not after the start.
    """

    name: str
    summary: str
    example: str
    settings: Callable[[], type] | None = None
    run: Callable[[Any], int | None] | None = None
    subjects: "Callable[[], Mapping[str, Verb]] | None" = None
    usual: str | None = None
    notes: Callable[[], str] | None = None
    long: bool = False


VERBS: Registry[Verb] = Registry("verb", "devil_hf.cli")


def show(settings: JsonSettings, record: Any, text: str) -> None:
    """Print a record as JSON where that was asked for, its text otherwise; a number that is not finite is null there."""
    print(json.dumps(finite(record), allow_nan=False) if settings.json else text)


def look(model: Any, processor: Any, images: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The feature maps of images, read once for all that is asked of them; says so where they are unlike the training's."""
    from devil_hf.checkpoints.scope import out_of_scope

    maps = model.extract_features(processor(images=list(images), return_tensors="pt")["pixel_values"])
    if warning := out_of_scope(model, maps, names):
        print(f"note: {warning}", file=sys.stderr)
    return maps


def check_picture(file: Path) -> None:
    """Raise an OSError or ValueError for a file that no picture can be written to, before the work that it is to show."""
    from PIL import Image

    kinds = Image.registered_extensions()
    if kinds.get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output {file}: no picture has the ending {file.suffix!r}; name a file such as maps.png")
    check_file(file, "maps.png")


def check_file(file: Path, such_as: str) -> None:
    """Raise an OSError for a file that cannot be written, before the work that it is to hold."""
    if file.is_dir():
        raise IsADirectoryError(f"--output {file} is a folder; name a file in it, such as {file / such_as}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--output {file}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"--output {file} cannot be written: name another file")


def named_pictures(paths: list[str]) -> tuple[list[str], list[Any]]:
    """Names and pictures: those that are named, or a scene."""
    from devil_hf.data.worlds import HELD_OUT_WORLD, World
    from devil_hf.model.image_processing_devil import load_images

    if paths:
        return paths, [image for path in paths for image in load_images(path)]
    scene = World(1, HELD_OUT_WORLD).scene(0)
    objects = ", ".join(" ".join(one.attributes.values()) for one in scene.objects)
    return [f"a scene ({objects})"], [scene.image]
