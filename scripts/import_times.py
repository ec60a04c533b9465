"""What a command of `devil` imports: processor seconds, modules and who asked first, by package, as one JSON object.

    python scripts/import_times.py describe

Seconds are a package's own: what it makes others import is theirs. `searches` are Python's for dead objects, and `searched` the
seconds that they took, which are within the others. The command's own output goes to standard error.
"""

import contextlib
import gc
import importlib._bootstrap as bootstrap
import json
import sys
import time
from typing import Any

inner: list[float] = []  # for each import under way, the seconds of the imports within it
path: list[str] = []
packages: dict[str, dict[str, Any]] = {}
searches = {"searches": 0, "searched": 0.0}
load = bootstrap._load_unlocked


def timed(spec: Any) -> Any:
    """Load a module, and note its own seconds."""
    package = spec.name.partition(".")[0]
    asked = next((name for name in reversed(path) if name.partition(".")[0] != package), "the command")
    entry = packages.setdefault(package, {"seconds": 0.0, "modules": 0, "asked_by": asked})
    inner.append(0.0)
    path.append(spec.name)
    began = time.process_time()
    try:
        return load(spec)
    finally:
        whole = time.process_time() - began
        entry["seconds"] += whole - inner.pop()
        entry["modules"] += 1
        path.pop()
        if inner:
            inner[-1] += whole


def searched(phase: str, _: Any) -> None:
    """Note a search for dead objects."""
    searches["searched"] += time.process_time() * (1 if phase == "stop" else -1)
    searches["searches"] += phase == "stop"


def main() -> int:
    """Run the command line that follows as a process of `devil` does, and print what it imported."""
    bootstrap._load_unlocked = timed
    gc.callbacks.append(searched)
    with contextlib.redirect_stdout(sys.stderr):
        from devil_hf.cli.main import main as command

        code = command()
    bootstrap._load_unlocked = load
    gc.callbacks.remove(searched)
    print(json.dumps({"seconds": time.process_time(), **searches, "packages": packages}))
    return code


if __name__ == "__main__":
    sys.exit(main())
