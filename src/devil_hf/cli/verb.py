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
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devil_hf.registry import Registry
from devil_hf.settings import option


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
    """

    name: str
    summary: str
    example: str
    settings: Callable[[], type] | None = None
    run: Callable[[Any], int | None] | None = None
    subjects: "Callable[[], Mapping[str, Verb]] | None" = None


VERBS: Registry[Verb] = Registry("verb", "devil_hf.cli")


@dataclass(kw_only=True)
class JsonSettings:
    """What a verb has that prints something."""

    json: bool = option("print JSON", False)


@dataclass(kw_only=True)
class ModelSettings(JsonSettings):
    """What a verb has that asks a checkpoint."""

    checkpoint: str | None = option("directory or Hub id (default: the shapes-world checkpoint of the package)", None)
    device: str | None = option("default: cuda where there is one", None)


@dataclass(kw_only=True)
class LayerSettings(ModelSettings):
    """What a verb has that asks some layers of a checkpoint."""

    layers: list[str] | None = option("names or indices of layers (default: every one)", None)


def show(settings: JsonSettings, record: Any, text: str) -> None:
    """Print a record as JSON where that was asked for, its text otherwise."""
    print(json.dumps(record) if settings.json else text)


def open_checkpoint(checkpoint: str | None, device: str | None):
    """A model and its processor; what the checkpoint says of its scope is printed."""
    from devil_hf.checkpoints.loading import load

    model, processor = load(checkpoint, device)
    state_scope(model)
    return model, processor


def state_scope(model) -> None:
    """Say what a checkpoint knows, where it says so."""
    if model.config.scope:
        print(f"note: {model.config.scope}", file=sys.stderr)


def read_layers(names: Sequence[str] | None, known: Sequence[str]) -> list[str | int] | None:
    """Layers as typed: a name wins over an index, since some networks name their layers by numbers."""
    if names is None:
        return None
    return [int(name) if name not in known and name.lstrip("-").isdigit() else name for name in names]
