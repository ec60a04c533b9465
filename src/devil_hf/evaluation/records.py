"""Records of an evaluation on disk, one line each: a run that was stopped goes on, and a later metric needs no new inference."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devil_hf.folders import DiskFull, is_full, written


class Records:
    """Rows by key in a JSON lines file, written as they come.

    The file begins with the settings that decide its rows. Opened again with the same settings it goes on; with others it
    refuses, since rows of two evaluations would mix. A row may say what it is of (a hash of its image): where that is another one
    by now, the row is not known any more.

    Args:
        path: the file; it and its folder are made if need be.
        settings: whatever decides the rows (checkpoint hash, data, seed, ...), as JSON. A limit does not: a later run may
            ask for more.

    Raises:
        ValueError: if the file holds rows of other settings, or is none of ours.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path = Path(path)
        self.rows: dict[str, Any] = {}
        self.identities: dict[str, str | None] = {}  # what the rows are of, by key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(settings))
        if self.path.exists() and self.path.stat().st_size:
            self._read(wanted)
        else:
            self._append({"settings": wanted})

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> Any:
        return self.rows[key]

    def add(self, key: str, row: Any, identity: str | None = None) -> None:
        """Keep a row; it is on disk when this returns, and survives the process.

        Args:
            identity: hash of what the row is of, where its key does not say it.

        Raises:
            DiskFull: when there is no room; the rows before are kept.
        """
        self._append({"key": key, "row": row} | ({} if identity is None else {"of": identity}))
        self.rows[key], self.identities[key] = row, identity

    def _append(self, line: Mapping[str, Any]) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            if not is_full(error):
                raise
            os.truncate(self.path, size)  # no half line in front of the next one
            raise DiskFull(
                f"{self.path} cannot be written, the disk is full ({error}). The {len(self.rows)} rows before are kept. Make "
                "room, and run the same again: it goes on there"
            ) from error

    def _read(self, wanted: Mapping[str, Any]) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text.endswith("\n")
        lines = text.splitlines()
        if not whole:  # cut off in the middle of a line
            lines.pop()
            with written(self.path) as unfinished:
                unfinished.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        if not lines:
            self._append({"settings": wanted})
            return
        try:
            found, *rows = [json.loads(line) for line in lines]
            found = found["settings"]
            self.rows = {row["key"]: row["row"] for row in rows}
            self.identities = {row["key"]: row.get("of") for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no record of an evaluation ({error}); give another file") from error
        if found != wanted:
            was, now = _differing(found, wanted)
            raise ValueError(f"{self.path} was made with {was}, not {now}: give another output folder, or remove it")


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those parts of two settings in which they differ, of nested ones too."""
    was, now = dict[str, Any](), dict[str, Any]()
    for name in sorted({*found, *wanted}):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            old, new = _differing(old, new)
        if old != new:
            was[name], now[name] = old, new
    return was, now
