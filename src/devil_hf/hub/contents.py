"""The files of a published checkpoint: which of them go, and what of this machine is taken out of them."""

import fnmatch
import json
import os
import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from devil_hf.evaluation.results import read_evaluations
from devil_hf.folders import write_json
from devil_hf.hub.checks import CODE
from devil_hf.hub.facts import readable_recipe, without_paths
from devil_hf.questions.choices import CALIBRATION_FILE
from devil_hf.text_files import read_json, read_results, read_text

RECIPE_FILE = "recipe.yaml"
# What a checkpoint is made of; what else lies beside it (optimiser states, pickled arguments) stays at home.
PUBLISHED = (
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.py", "*.txt", "*.model", "*.tiktoken", "*.jinja"),
    *(RECIPE_FILE, "LICENSE*", "evaluations/*.json"),
)
PRIVATE = (".*", "evaluations/.*", "trainer_state.json", "*training_args*")
# Files of an earlier push that would contradict this one.
OUTDATED = (
    *("*.safetensors", "*.safetensors.index.json", CODE),
    *("pictures/*", "evaluations/*", "scores.json", CALIBRATION_FILE, RECIPE_FILE),
)


def is_outdated(path: str) -> bool:
    """Whether a file of an earlier push has to go where this one has none of its name."""
    return _matches(path, OUTDATED)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path is named by a pattern of its own depth: no folder's files are swept up by `*.json`."""
    return any(fnmatch.fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def copy_checkpoint(source: str | PathLike, folder: Path) -> None:
    """Copy what belongs to a checkpoint, and nothing that lies beside it.

    Raises:
        ValueError: for a link that leads out of the folder, and not to its own blobs in the cache of the Hub.
    """
    home = Path(source).resolve()
    homes = (home, home.parents[1] / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in sorted(path for path in Path(source).rglob("*") if path.is_file()):
        name = path.relative_to(source).as_posix()
        if _matches(name, PUBLISHED) and not _matches(name, PRIVATE):
            target = path.resolve()
            if not any(place in target.parents for place in homes):
                raise ValueError(f"{path} is a link to {target}, outside of the checkpoint: put the file itself there")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def score_files(folder: Path) -> list[Path]:
    """The files of results that a checkpoint holds."""
    return [path for path in (folder / "scores.json", *sorted(folder.glob("evaluations/*.json"))) if path.is_file()]


def add_scores(scores: Sequence[str | PathLike], folder: Path) -> None:
    """Put further files of results into `folder/evaluations`, none over another."""
    for path in map(Path, scores):
        target, number = folder / "evaluations" / path.name, 1
        while target.exists():
            number += 1
            target = target.with_name(f"{path.stem}_{number}{path.suffix}")
        target.parent.mkdir(exist_ok=True)
        _write_scores(path, target)


def _write_scores(path: Path, target: Path) -> None:
    write_json(target, without_paths(read_results(path)))


def forget_this_machine(folder: Path) -> None:
    """Take local paths, and the tokenizer's memory of having been a local directory, out of the files."""
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        settings = read_json(path)
        for part in ("backbone_config", "language_model_source"):
            if os.path.isabs((settings.get(part) or {}).get("source") or ""):
                settings[part]["source"] = None
        if name == "tokenizer_config.json":
            settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
        path.write_text(json.dumps(without_paths(settings), indent=2) + "\n", encoding="utf-8")
    for path in score_files(folder):
        read_evaluations(path)  # names a file that holds none
        _write_scores(path, path)
    recipe = folder / RECIPE_FILE
    if recipe.is_file():
        recipe.write_text(readable_recipe(read_text(recipe)) + "\n", encoding="utf-8")


__all__ = ["RECIPE_FILE", "add_scores", "copy_checkpoint", "forget_this_machine", "is_outdated", "score_files"]
