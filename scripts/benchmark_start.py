"""How long a user waits for help, an import, a first description, the quickstart; `python scripts/benchmark.py start quickstart`.

Each command runs in a process of its own, in turn with the same command of another checkout where one is named (`--before`, such
as the worktree of the commit before); figures are medians, on the clock and in processor seconds. The clock is right on a quiet
machine only.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEVIL = ("-m", "devil_hf")
COMMANDS = {
    "devil --help": (*DEVIL, "--help"),
    "import devil_hf": ("-c", "import devil_hf"),
    "devil describe": (*DEVIL, "describe"),
}
SHARE = 0.005  # of the seconds of a command: packages below are left out of its table


def run(checkout: Path, threads: int, command: Sequence[str]) -> tuple[float, float, str]:
    """Clock seconds, processor seconds and output of Python with the package of a checkout."""
    env = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(threads)}
    before, began = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    after, ended = os.times(), time.perf_counter()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return ended - began, used, done.stdout.decode()


def medians(values: Sequence[tuple[float, float, str]]) -> dict[str, float]:
    seconds, processor = ([value[at] for value in values] for at in (0, 1))
    return {"seconds": statistics.median(seconds), "processor_seconds": statistics.median(processor)}


def start(checkouts: Mapping[str, Path], threads: int, repeats: int) -> dict[str, Any]:
    """Medians of `COMMANDS` after a first run of each, which fills the caches of the disk; and what `devil describe` imports.

    Args:
        checkouts: name -> root of a checkout; the table of imports is of the first.
    """
    report: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        found: dict[str, list] = {label: [] for label in checkouts}
        for turn in range(repeats + 1):
            for label, checkout in checkouts.items():
                measured = run(checkout, threads, command)
                if turn:
                    found[label].append(measured)
        report[name] = {label: medians(values) for label, values in found.items()}
    program = (str(ROOT / "scripts/import_times.py"), "describe")
    found_imports = {label: json.loads(run(checkout, threads, program)[2]) for label, checkout in checkouts.items()}
    for label, imports in found_imports.items():
        report[f"searches for dead objects {label}"] = {"number": imports["searches"], "processor_seconds": imports["searched"]}
    imports = next(iter(found_imports.values()))
    ranked = sorted(imports["packages"].items(), key=lambda item: -item[1]["seconds"])
    shown = [(name, entry) for name, entry in ranked if entry["seconds"] > SHARE * imports["seconds"]]
    report["imports of devil describe"] = {
        name: f"{entry['seconds']:.2f} processor seconds, {entry['modules']} modules, first by {entry['asked_by']}"
        for name, entry in shown
    }
    return report


def quickstart(checkouts: Mapping[str, Path], threads: int, repeats: int) -> dict[str, Any]:
    """Medians of whole quickstarts, and what each scored."""
    report: dict[str, Any] = {}
    found: dict[str, list] = {label: [] for label in checkouts}
    for turn in range(repeats):
        for label, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as folder:
                measured = run(checkout, threads, (*DEVIL, "quickstart", "--json", "--output-dir", str(Path(folder) / "run")))
            found[label].append(measured)
            scores = json.loads(measured[2])
            first = scores.get("first_answer_seconds", "after the training")
            f1 = {name: row["f1"] for name, row in scores["described"]["all"].items() if isinstance(row, dict)}
            report[f"{label} {turn}"] = {"first answer": first, **f1}
    return report | {label: medians(values) for label, values in found.items()}
