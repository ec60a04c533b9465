"""The tests with the oldest and the newest set of packages that pyproject.toml admits, on several Pythons.

Makes one environment after the other with uv (`pip install uv`), runs the tests there, and prints a table. A Python that this
machine does not have is a row that says so; a package without a wheel for a Python begins with the first release that has one.
Exits with 1 where a set cannot be installed or a test fails. Example:
`python scripts/versions.py --pythons 3.11 3.13 --sets oldest --tests tests/model tests/hub`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = {"oldest": "lowest-direct", "newest": "highest"}
# Compiled packages, never built here: a Python without a wheel of one gets the first release that has it.
COMPILED = ("numpy", "scipy", "scikit-learn", "pillow", "pyyaml", "pycocotools", "safetensors", "tokenizers", "pandas", "pyarrow")
NAMED = ("torch", "transformers", "huggingface-hub", "timm", "numpy")  # whose releases the table tells
COLUMNS = ("python", "set", *NAMED, "ran", "passed", "failed", "skipped", "minutes", "note")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=["3.11", "3.12", "3.13"], help="versions, or paths of interpreters")
    parser.add_argument("--sets", nargs="+", default=[*RESOLUTION], choices=[*RESOLUTION])
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest runs, with its options behind a --")
    parser.add_argument("--folder", type=Path, help="where environments and downloads lie meanwhile; a temporary one by default")
    parser.add_argument("--keep", action="store_true", help="leave the environments and the downloads in the folder")
    parser.add_argument("--json", type=Path, help="a file for the rows, with the tests that failed; written as they come")
    options, pytest_options = parser.parse_known_args()
    if shutil.which("uv") is None:
        raise SystemExit("the environments are made by uv, which is not installed: `pip install uv`")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="versions-"))
    rows = []
    try:
        for chosen in options.sets:
            for python in options.pythons:
                rows.append(try_one(python, chosen, folder, [*options.tests, *pytest_options], options.keep))
                print(table(rows), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(any(row["failed"] or row["note"] for row in rows))


def try_one(python: str, chosen: str, folder: Path, tests: list[str], keep: bool) -> dict:
    """The row of one environment: made, tested, and removed again."""
    began, place = time.perf_counter(), (folder / f"{chosen}-{Path(python).name}").absolute()
    row = dict.fromkeys(COLUMNS, "") | {"python": python, "set": chosen}
    say = lambda text: print(f"{chosen}, Python {python}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    try:
        row |= install(python, chosen, place, folder, say)
        row |= run_tests(place, tests, say)
    except subprocess.CalledProcessError as error:
        row["note"] = (error.stderr or f"{error.cmd[0]} ended with {error.returncode}").strip().splitlines()[-1][:200]
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
    return row | {"minutes": round((time.perf_counter() - began) / 60, 1)}


def install(python: str, chosen: str, place: Path, folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """An environment with the package and all of its extras; returns the releases that the table tells."""
    environment = os.environ | {"UV_CACHE_DIR": str(folder.absolute() / "downloads"), "VIRTUAL_ENV": str(place)}

    def uv(*arguments: str) -> str:
        done = subprocess.run(["uv", *arguments], cwd=ROOT, env=environment, encoding="utf-8", capture_output=True, check=True)
        return done.stdout

    uv("venv", "--quiet", "--clear", "--no-python-downloads", "--python", python, str(place))
    say("resolving")
    wanted = place / "requirements.txt"
    extras = ["--extra", "test", "--resolution", RESOLUTION[chosen], *(f"--only-binary={name}" for name in COMPILED)]
    listed = uv("pip", "compile", "--quiet", "pyproject.toml", *extras, "--python", str(place / "bin" / "python"))
    wanted.write_text(listed, encoding="utf-8")
    say("installing")
    uv("pip", "install", "--quiet", "--no-deps", "-r", str(wanted))
    uv("pip", "install", "--quiet", "--no-deps", "--editable", ".")
    installed = {one["name"]: one["version"] for one in json.loads(uv("pip", "list", "--format", "json"))}
    return {name: installed[name] for name in NAMED}


def run_tests(place: Path, tests: list[str], say: Callable[[str], None]) -> dict:
    """Counts of the tests, and the names of those that failed."""
    say("testing")
    report, environment = place / "report.xml", os.environ.copy()
    environment.pop("PYTHONPATH", None)  # of the caller's checkout
    environment["PATH"] = f"{place / 'bin'}{os.pathsep}{environment['PATH']}"
    command = [str(place / "bin" / "python"), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    with (place / "tests.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if not report.is_file():
        last = (place / "tests.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
        return {"note": f"pytest ended with {code}: {''.join(last)[:200]}"}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed, ran = count["failures"] + count["errors"], count["tests"] - count["skipped"]
    reasons = {
        f"{case.get('classname')}.{case.get('name')}": (problem.get("message") or "").splitlines()[:1]
        for case in suite.iter("testcase")
        for problem in [*case.iter("failure"), *case.iter("error")]
    }
    return {"ran": ran, "passed": ran - failed, "failed": failed, "skipped": count["skipped"], "failures": reasons}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([str(row[name]) for name in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
