"""Records of an evaluation on disk, one line each: a run that was stopped goes on, and a later metric needs no new inference."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Records:
    """Rows by key in a JSON lines file, written as they come.

    The file begins with the settings that decide its rows. Opened again with the same settings it goes on; with others it
    refuses, since rows of two evaluations would mix.

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

    def add(self, key: str, row: Any) -> None:
        """Keep a row; it is on disk when this returns, and survives the process."""
        self._append({"key": key, "row": row})
        self.rows[key] = row

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self, wanted: Mapping[str, Any]) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text.endswith("\n")
        lines = text.splitlines()
        if not whole:  # cut off in the middle of a line
            lines.pop()
            self.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        if not lines:
            self._append({"settings": wanted})
            return
        try:
            found, *rows = [json.loads(line) for line in lines]
            found = found["settings"]
            self.rows = {row["key"]: row["row"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no record of an evaluation ({error}); give another file") from error
        if found != wanted:
            names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            was = {name: found.get(name) for name in names}
            now = {name: wanted.get(name) for name in names}
            raise ValueError(f"{self.path} was made with {was}, not {now}: give another output folder, or remove it")
