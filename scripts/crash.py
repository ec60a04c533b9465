r"""Kill, starve and crowd the long work of this package, and see that nothing is lost.

    python scripts/crash.py --kills 50 --output-dir /tmp/crash
    python scripts/crash.py --kills 3 --subjects train captions --scenarios kill

Every subject is a small job of seconds. It runs once undisturbed; then it is killed (SIGKILL, its whole process group) at random
moments, runs out of disk (a small tmpfs where that can be mounted, a limit on the size of files otherwise), loses its images
midway, or is started twice in one folder. Started again it must end with the same result, and where it ends by itself, with one
clear line. `crash.json` and `crash.md` of the output folder hold the tally; started again, the campaign goes on where it was.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.loopback_hub import LoopbackHub  # noqa: E402

HUB = LoopbackHub().__enter__()  # before huggingface_hub is imported, which reads where the Hub is
HOME = os.environ.get("HF_HOME", "/tmp/crash-home")
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | HUB.environment(HOME)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import devil_hf.report.neurons  # noqa: E402
import devil_hf.report.scenes  # noqa: E402
from devil_hf.cli.main import main as devil  # noqa: E402
from devil_hf.data.worlds import World  # noqa: E402
from devil_hf.folders import written  # noqa: E402
from devil_hf.settings import option, parse  # noqa: E402
from devil_hf.training import feature_cache  # noqa: E402

SCENES = 40  # as many as a check of labels needs on every second one
SCENARIOS = ("kill", "disk", "vanish", "two")
LIMIT = 400.0  # seconds that a job may take before it counts as hanging


@dataclass(frozen=True)
class Subject:
    """A job.

    Args:
        argv: its command line, by the folder that it works in and the folder of its images.
        result: what must be equal, read from the folder.
        reads: whether it reads the images, which can vanish.
    """

    argv: Callable[[Path, Path], list[str]]
    result: Callable[[Path], Any]
    reads: bool = True


def record(file: Path, *without: str) -> Any:
    """What a JSON file holds, without what differs from run to run."""
    return {name: value for name, value in json.loads(file.read_text(encoding="utf-8")).items() if name not in without}


def training(folder: Path) -> Any:
    """Weights and loss curve."""
    newest = max(folder.glob("checkpoint-*"), key=lambda one: int(one.name.rpartition("-")[2]))
    history = record(newest / "trainer_state.json")["log_history"]
    curve = [(row["step"], name, row[name]) for row in history for name in ("loss", "eval_loss") if name in row]
    return {"weights": load_file(folder / "checkpoint" / "model.safetensors"), "losses": curve}


def exemplars(folder: Path) -> Any:
    """Tensors of every layer, and the pictures' names."""
    found = folder / "exemplars"
    keys = [json.loads(line)["key"] for line in (found / "images" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"keys": keys, "tensors": {file.name: load_file(file) for file in sorted(found.glob("*.safetensors"))}}


def maps(folder: Path) -> Any:
    """Scores, and every array."""
    arrays = {file.name: dict(np.load(file)) for file in sorted((folder / "maps").glob("*.npz"))}
    return {"scores": record(folder / "scores.json"), "arrays": arrays}


def atlas(folder: Path) -> Any:
    """Labels, checks and atlas."""
    files = ("labels.json", "checks.json", "atlas/atlas.json")
    return {name: record(folder / name) for name in files} | {"page": (folder / "atlas" / "index.html").is_file()}


def pushed(folder: Path) -> Any:
    """What the Hub has of a repository."""
    files = HUB.files(f"tester/{folder.name}")
    return {path: hashlib.sha256(data.replace(folder.name.encode(), b"")).hexdigest() for path, data in files.items()}


def trains(folder: Path, images: Path, *more: str) -> list[str]:
    """A training of eight steps on the images."""
    sources = [json.dumps([{"kind": "folder", "path": str(images), "split": split}]) for split in ("train", "val")]
    options = {"checkpoint": "shapes", "new-translator": "true", "output-dir": folder, "report-to": "none", "resume": "true"}
    options |= {"train-data": sources[0], "validation-data": sources[1], "max-steps": 8, "batch-size": 4, "evaluation-steps": 2}
    options |= {"logging-steps": 2, "warmup-steps": 1, "model": json.dumps({"translator_depth": 1, "max_caption_tokens": 40})}
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value))), *more]


def evaluates(name: str, folder: Path, *more: str) -> list[str]:
    return ["evaluate", name, *more, "--output-dir", str(folder)]


def names_neurons(folder: Path, images: Path, stage: str, *more: str) -> list[str]:
    layers = ["--checkpoint", "shapes", "--layers", "layer1", "--exemplars", "3", "--batch-size", "4"]
    return ["neurons", str(images), "--stage", stage, *layers, "--output-dir", str(folder), *more]


def pushes(folder: Path, images: Path) -> list[str]:
    return ["push", str(images.parent / "checkpoint"), f"tester/{folder.name}", "--license", "apache-2.0"]


SMALL = ["--batch-size", "2"]
QUICK = ["--scenes", "64", "--steps", "6", "--held-out", "3"]
SUBJECTS = {
    "train": Subject(trains, training),
    "features": Subject(lambda f, i: trains(f, i, "--cache-features", f"{f}/features", "--draws", "2"), training),
    "exemplars": Subject(lambda f, i: names_neurons(f, i, "exemplars"), exemplars),
    "captions": Subject(
        lambda f, i: evaluates(
            "captions", f, "shapes", str(i), "--metrics", "rouge_l", "--batch-size", "2", "--max-new-tokens", "8"
        ),
        lambda f: record(f / "scores.json"),
    ),
    "maps": Subject(lambda f, i: evaluates("maps", f, "shapes", "shapes:6:3", "--boards", "2"), maps, False),
    "controls": Subject(
        lambda f, i: evaluates(
            "controls", f, "shapes", "--data", str(i), "--limit", "4", "--map-images", "2", "--batch-size", "2"
        ),
        lambda f: record(f / "scores.json"),
    ),
    "quickstart": Subject(
        lambda f, i: ["quickstart", *QUICK, "--output-dir", str(f)],
        lambda f: {"scores": record(f / "scores.json", "seconds", "first_answer_seconds"), **training(f)},
        False,
    ),
    "push": Subject(pushes, pushed, False),
    "report": Subject(lambda f, i: names_neurons(f, i, "all", "--held-out", "2", "--permutations", "100"), atlas),
}


@dataclass
class CrashSettings:
    """What is tried, how often, and where."""

    subjects: list[str] = option(f"of {', '.join(SUBJECTS)} (default: all)", list(SUBJECTS))
    scenarios: list[str] = option(f"of {', '.join(SCENARIOS)} (default: all)", list(SCENARIOS))
    kills: int = option("of each subject", 50)
    disks: int = option("full disks of each subject", 3)
    output_dir: Path = option("of the tally and of everything that runs", Path("crash"))
    seed: int = option("of the moments", 0)
    keep: bool = option("keep the folders of what went wrong", False)

    def validate(self) -> None:
        """Raise a ValueError for names that are none."""
        for given, known in ((self.subjects, SUBJECTS), (self.scenarios, SCENARIOS)):
            if wrong := sorted(set(given) - set(known)):
                raise ValueError(f"{wrong} are none of {list(known)}")


# ------------------------------------------------------------------------------------------------------------- processes


def start(argv: list[str], log: Path, environment: dict[str, str] | None = None, file_size: int | None = None) -> int:
    """Run `devil` in a process group of its own; its number. What is imported here is there at once."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= environment or {}
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        code = devil(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def end_of(pid: int) -> int:
    """The exit code, -9 of a killed one; one that hangs is killed."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    kill(pid)
    return -99


def kill(pid: int) -> int:
    """SIGKILL to the whole group; the exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said(log: Path) -> str:
    """The last line that was said."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def is_clear(log: Path) -> bool:
    """Whether a run ended with one line of the command line's own, and no traceback."""
    return said(log).startswith("devil ") and "Traceback" not in log.read_text(encoding="utf-8", errors="replace")


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where results differ first by more than the rounding of batches of another size; None where they are equal."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return where or "/"
        found = (difference(one[name], other[name], f"{where}/{name}") for name in one)
        return next((place for place in found if place), None)
    if isinstance(one, torch.Tensor | np.ndarray | float):
        first, second = (np.asarray(value, dtype=np.float64) for value in (one, other))
        equal = first.shape == second.shape and np.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True)
    else:
        equal = one == other
    return None if equal else where or "/"


# ------------------------------------------------------------------------------------------------------------- scenarios


class Campaign:
    """The tally and the undisturbed runs."""

    def __init__(self, settings: CrashSettings):
        self.settings, self.folder = settings, settings.output_dir.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "crash.json"
        self.cases: dict[str, dict] = record(self.file) if self.file.is_file() else {}
        self.images = self.folder / "material" / "images"
        if not self.images.is_dir():
            self._material()
        self._undisturbed: dict[str, tuple[Any, float, int]] = {}

    def _material(self) -> None:
        with written(self.images.parent) as whole:
            (whole / "images").mkdir(parents=True)
            lines = []
            for index in range(SCENES):
                scene, texts = World(SCENES, 5).captioned(index, 2)
                Image.fromarray(scene.image).save(whole / "images" / f"{index:02d}.png")
                split = "train" if index < SCENES - 4 else "val"
                lines.append(json.dumps({"image": f"{index:02d}.png", "captions": texts, "split": split}))
            (whole / "images" / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
            from devil_hf.checkpoints.loading import load

            model, processor = load("shapes", "cpu")
            model.save_pretrained(whole / "checkpoint")
            processor.save_pretrained(whole / "checkpoint")

    def undisturbed(self, name: str) -> tuple[Any, float, int]:
        """Result, seconds and bytes of the whole run."""
        if name not in self._undisturbed:
            folder, began = self.fresh(f"{name}-undisturbed"), time.monotonic()
            code = end_of(start(SUBJECTS[name].argv(folder, self.images), self.log(folder)))
            if code not in (0, 3):  # 3 is a verdict of the controls
                raise RuntimeError(f"{name} fails undisturbed ({code}): {self.log(folder)}")
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            self._undisturbed[name] = SUBJECTS[name].result(folder), time.monotonic() - began, size
        return self._undisturbed[name]

    def fresh(self, name: str) -> Path:
        """A new folder and a new log."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.log(folder).unlink(missing_ok=True)
        return folder

    @staticmethod
    def log(folder: Path, more: str = "") -> Path:
        """Where a run in a folder says what it says."""
        return folder.with_name(f"{folder.name}{more}.log")

    def run(self) -> None:
        """Everything that the tally lacks."""
        for name in self.settings.subjects:
            for scenario in self.settings.scenarios:
                if scenario == "vanish" and not SUBJECTS[name].reads:
                    continue
                if scenario == "disk" and name == "push":  # nothing of it lies in a folder of the user's
                    continue
                times = {"kill": self.settings.kills, "disk": self.settings.disks}.get(scenario, 1)
                for number in range(times):
                    key = f"{name} {scenario} {number}"
                    if key not in self.cases:
                        self.cases[key] = self.case(name, scenario, key)
                        self.write()
                        print(key, self.cases[key]["fault"] or "ok", flush=True)

    def case(self, name: str, scenario: str, key: str) -> dict[str, Any]:
        """One disturbance, and the run after it."""
        folder, draw = self.fresh(key.replace(" ", "-")), random.Random(f"{self.settings.seed} {key}")
        result, seconds, size = self.undisturbed(name)
        began, faults = time.monotonic(), []
        with getattr(self, scenario)(SUBJECTS[name], folder, draw, seconds, size, faults):
            code = end_of(start(SUBJECTS[name].argv(folder, self.images), self.log(folder)))
            if code not in (0, 3):
                faults.append(f"started again it ended with {code}: {said(self.log(folder))}")
            else:
                with contextlib.suppress(FileNotFoundError):
                    if place := difference(SUBJECTS[name].result(folder), result):
                        faults.append(f"started again it came to another result in {place}")
        if not faults or not self.settings.keep:
            shutil.rmtree(folder, ignore_errors=True)
        if not faults:
            for log in folder.parent.glob(f"{folder.name}*.log"):
                log.unlink()
        return {"fault": "; ".join(faults), "seconds": round(time.monotonic() - began, 1)}

    @contextlib.contextmanager
    def kill(self, subject, folder, draw, seconds, size, faults) -> Iterator[None]:
        """Killed once or twice."""
        for _ in range(1 + (draw.random() < 0.3)):
            pid = start(subject.argv(folder, self.images), self.log(folder))
            time.sleep(draw.uniform(0.02, 1.0) * seconds)
            kill(pid)
        yield

    @contextlib.contextmanager
    def disk(self, subject, folder, draw, seconds, size, faults) -> Iterator[None]:
        """Out of disk somewhere on the way; with room it goes on."""
        room = int(size * draw.uniform(0.05, 0.95)) + 4096
        mounted = (
            os.geteuid() == 0
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)], capture_output=True, check=False
            ).returncode
        )
        try:
            limit = None if mounted else draw.randint(2_000, 200_000)
            code = end_of(start(subject.argv(folder, self.images), self.log(folder), file_size=limit))
            if code not in (0, 3) and not (code == 1 and is_clear(self.log(folder)) and tells_of_room(said(self.log(folder)))):
                faults.append(f"a full disk ended with {code}: {said(self.log(folder))}")
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=2g", str(folder)], check=True)
            yield
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(folder)], check=True)

    @contextlib.contextmanager
    def vanish(self, subject, folder, draw, seconds, size, faults) -> Iterator[None]:
        """The images go midway, and come back."""
        pid, away = start(subject.argv(folder, self.images), self.log(folder)), self.images.with_name("away")
        time.sleep(draw.uniform(0.1, 0.9) * seconds)
        os.rename(self.images, away)
        try:
            code = end_of(pid)
        finally:
            os.rename(away, self.images)
        if code not in (0, 3) and not (code == 1 and is_clear(self.log(folder))):
            faults.append(f"without its images it ended with {code}: {said(self.log(folder))}")
        yield

    @contextlib.contextmanager
    def two(self, subject, folder, draw, seconds, size, faults) -> Iterator[None]:
        """Started twice: one of them works, the other one says who does, or both end well, one after the other."""
        logs = [self.log(folder, f"-{number}") for number in range(2)]
        pids = [start(subject.argv(folder, self.images), log) for log in logs]
        codes = [end_of(pid) for pid in pids]
        refused = [log for code, log in zip(codes, logs, strict=True) if code not in (0, 3)]
        if len(refused) > 1 or any(not is_clear(log) or "in use" not in said(log) for log in refused):
            faults.append(f"two at once ended with {codes}: {[said(log) for log in refused]}")
        yield

    def write(self) -> None:
        """The tally, as JSON and as a table."""
        with written(self.file) as unfinished:
            unfinished.write_text(json.dumps(self.cases, indent=1), encoding="utf-8")
        lines = ["| | " + " | ".join(SCENARIOS) + " | faults |", "|---" * (len(SCENARIOS) + 2) + "|"]
        for name in SUBJECTS:
            own = {key.split()[1:][0]: [] for key in self.cases if key.startswith(f"{name} ")}
            for key, case in self.cases.items():
                if key.startswith(f"{name} "):
                    own[key.split()[1]].append(bool(case["fault"]))
            if own:
                counts = [str(len(own[one])) if one in own else "-" for one in SCENARIOS]
                lines.append(f"| {name} | " + " | ".join(counts) + f" | {sum(map(sum, own.values()))} |")
        (self.folder / "crash.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tells_of_room(line: str) -> bool:
    """Whether an error says that the disk is full."""
    return any(word in line.lower() for word in ("disk is full", "gb free", "no space left", "file too large"))


def main() -> int:
    settings = parse(CrashSettings, sys.argv[1:], description=__doc__)
    torch.set_num_threads(1)
    feature_cache.SHARD_IMAGES = 4  # as small as the jobs are
    devil_hf.report.neurons.find_exemplars = functools.partial(devil_hf.report.neurons.find_exemplars, save_every=4)
    devil_hf.report.scenes.draw_pictures.__defaults__ = (1, print)
    campaign = Campaign(settings)
    campaign.run()
    print((campaign.folder / "crash.md").read_text(encoding="utf-8"))
    return int(any(case["fault"] for case in campaign.cases.values()))


if __name__ == "__main__":
    sys.exit(main())
