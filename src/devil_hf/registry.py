"""Registries: what can be added in one place, by a file of the room or by somebody else's package.

A registry knows the package (room) whose modules register entries when they are imported; they are imported when the registry is
first asked. Packages outside of this one name a module under the entry point group `devil_hf.plugins`, which is imported
then as well; in a script, `register` before the question is enough.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

PLUGINS = "devil_hf.plugins"
Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Entries by name, in the order of their registration.

    Args:
        kind: what the entries are, for messages ("map measure").
        room: package whose modules register entries, such as `devil_hf.evaluation`; None where there is none.
    """

    def __init__(self, kind: str, room: str | None = None):
        self.kind = kind
        self.room = room
        self._entries: dict[str, Entry] = {}
        self._complete = False

    def register(self, name: str, entry: Entry | None = None) -> Any:
        """Add an entry; without one, the decorator of a function or class.

        Raises:
            ValueError: for a name that another entry has.
        """
        if entry is None:
            return lambda decorated: self.register(name, decorated)
        known = self._entries.setdefault(name, entry)
        if known is not entry and _origin(known) != _origin(entry):
            raise ValueError(f"there are two entries {name!r} among the {self.kind}s: {_origin(known)}, {_origin(entry)}")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> Entry:
        """The entry of this name.

        Raises:
            ValueError: for an unknown name, with those that there are.
        """
        if name not in self._entries:
            self._discover()
        if name not in self._entries:
            close = difflib.get_close_matches(str(name), self._entries, n=1)
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"there is no {self.kind} {name!r}{guess}; there are {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(self._entries)

    def __len__(self) -> int:
        self._discover()
        return len(self._entries)

    def _discover(self) -> None:
        if self._complete:
            return
        self._complete = True  # before the imports, which may ask this registry
        try:
            if self.room is not None:
                package = importlib.import_module(self.room)
                for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
                    if module.name != "__main__":
                        importlib.import_module(f"{self.room}.{module.name}")
            load_plugins()
        except BaseException:
            self._complete = False
            raise


def _origin(entry: Any) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', entry)}"


@cache
def load_plugins() -> None:
    """Import the modules that installed packages name under the entry point group `devil_hf.plugins`."""
    for point in entry_points(group=PLUGINS):
        point.load()


__all__ = ["PLUGINS", "Registry", "load_plugins"]
