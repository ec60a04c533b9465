"""Captioned images in a folder and in shards, a tiny run on them, and one that has ended."""

import json
from pathlib import Path

import pytest

from devil_hf.settings import make
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from tests.conftest import SMALL_TRANSLATOR
from tests.training.runs import CAPTIONS, write_shards


@pytest.fixture(scope="session")
def caption_folder(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    lines = []
    for index in range(9):
        images[index % 3].rotate(10 * index).save(folder / f"{index}.png")
        record = {"image": f"{index}.png", "captions": CAPTIONS[index % 3 : index % 3 + 2]}
        lines.append(json.dumps(record | {"split": "train" if index < 6 else "val"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture(scope="session")
def shards(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cc3m")
    write_shards(folder, images)
    return folder


@pytest.fixture(scope="session")
def shared_fields(sources, caption_folder):
    """A tiny run on files."""
    return {
        "backbone": sources["backbone"],
        "language_model": sources["language_model"],
        "train_data": [{"kind": "folder", "path": caption_folder, "split": "train"}],
        "validation_data": [{"kind": "folder", "path": caption_folder, "split": "val"}],
        "model": SMALL_TRANSLATOR,
        "batch_size": 4,
        "max_steps": 6,
        "evaluation_steps": 2,
        "logging_steps": 2,
        "warmup_steps": 1,
        "report_to": "none",
        "precision": "fp32",
    }


@pytest.fixture
def fields(shared_fields, tmp_path):
    """A tiny run on files, in a folder of its own."""
    return shared_fields | {"output_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def finished(shared_fields, tmp_path_factory) -> Path:
    """The checkpoint of that run; beside it lie those of its steps. Nothing may be written there."""
    folder = tmp_path_factory.mktemp("finished")
    return train(make(Recipe, shared_fields | {"output_dir": str(folder), "report_to": "tensorboard"}))
