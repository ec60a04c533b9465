"""A training loses nothing: not to a second run, a full disk, weights that diverge, or data that change under it."""

import contextlib
import json
import math
import os
import resource
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, TrainingArguments

from devil_hf.data.decoding import BadSamples, PairDecoder, PairTable
from devil_hf.data.pairs import open_pairs
from devil_hf.data.unit_reader import UnitReader
from devil_hf.folders import CLAIM, DiskFull, FolderInUse
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.training import run
from devil_hf.training.divergence import Diverged, check_loss, check_weights
from devil_hf.training.features import pool_draws
from devil_hf.training.feed import ImageTable
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from devil_hf.training.trainer import DevilTrainer
from tests.conftest import SMALL_TRANSLATOR
from tests.training.runs import CAPTIONS, Killed, kill_at, losses, weights


def captions_in(folder, images, count: int = 6) -> list[dict]:
    folder.mkdir()
    for number in range(count):
        images[number % 3].rotate(number).save(folder / f"{number}.png")
    lines = [json.dumps({"image": f"{number}.png", "caption": CAPTIONS[number % 4]}) for number in range(count)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return [{"kind": "folder", "path": str(folder)}]


def test_a_second_run_in_the_folder_is_refused_and_says_whose_it_is(fields):
    folder = Path(fields["output_dir"])
    folder.mkdir()
    claim_of_a_living_run(folder)
    with pytest.raises(FolderInUse, match=rf"{folder} is in use: a training since noon \(process {os.getppid()} on"):
        train(Recipe(**fields))
    assert [path.name for path in folder.iterdir()] == [CLAIM]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_diverged_run_is_an_error_and_leaves_the_last_finite_checkpoint(precision, fields, monkeypatch):
    step = DevilTrainer.training_step

    def diverging(self, *args, **kwargs):
        if self.state.global_step == 3:
            with torch.no_grad():
                self.model.translator.output.weight.fill_(torch.nan)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DevilTrainer, "training_step", diverging)
    with pytest.raises(Diverged, match=r"the loss is nan at step 4\. The newest whole checkpoint is .*checkpoint-2\. Lower"):
        train(Recipe(**fields | {"precision": precision}))
    folder = Path(fields["output_dir"])
    assert not (folder / "checkpoint").exists() and not (folder / "checkpoint-4").exists()
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder / "checkpoint-2").values())
    monkeypatch.undo()
    train(Recipe(**fields | {"resume": True}))


def test_a_step_that_breaks_the_weights_is_found_before_they_are_saved(fields):
    fields |= {"learning_rate": 1e38, "warmup_steps": 0, "weight_decay": 10.0, "validation_data": [], "logging_steps": 1}
    with pytest.raises(Diverged, match=r"No checkpoint was written before|newest whole checkpoint"):
        train(Recipe(**fields | {"max_steps": 4, "save_steps": 1, "evaluation_steps": 1}))
    for checkpoint in Path(fields["output_dir"]).glob("checkpoint-*"):
        assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())


@given(loss=st.floats(), values=st.lists(st.floats(width=32), min_size=1))
def test_only_what_is_finite_passes(loss, values):
    for finite, check, value in (
        (math.isfinite(loss), check_loss, loss),
        (all(map(math.isfinite, values)), check_weights, {"w": torch.tensor(values), "whole": torch.ones(1)}),
    ):
        with contextlib.nullcontext() if finite else pytest.raises(Diverged, match=r"at step 3.*Lower it"):
            check(value, 3, "Lower it")


def test_a_cache_that_does_not_fit_or_is_stale_is_found_before_the_validation_features(fields, tmp_path, monkeypatch):
    fields["cache_features"] = str(tmp_path / "features")
    monkeypatch.setattr(run, "validation_features", lambda *_: pytest.fail("work began"))
    usage = type("Usage", (), {"free": 10**8})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(DiskFull, match=r"GB free, but all that the run keeps, of which .* GB are cached features, needs"):
        train(Recipe(**fields | {"draws": 10**6}))
    monkeypatch.undo()
    train(Recipe(**fields | {"max_steps": 2}))
    monkeypatch.setattr(run, "validation_features", lambda *_: pytest.fail("work began"))
    fields["output_dir"] = str(tmp_path / "second")
    with pytest.raises(ValueError, match="is stale"):
        train(Recipe(**fields | {"draws": 3}))
    train(Recipe(**fields | {"max_steps": 2}))  # and they are computed once
    shard = next((tmp_path / "features").glob("features-*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match="lacks some of its 1 shards"):
        train(Recipe(**fields | {"output_dir": str(tmp_path / "third")}))


def test_validation_features_follow_their_images(fields, images, tmp_path, monkeypatch):
    made, original = [], run.validation_features
    monkeypatch.setattr(run, "validation_features", lambda *arguments: made.append(1) or original(*arguments))
    fields |= {"validation_data": captions_in(tmp_path / "val", images), "max_steps": 2}
    first = train(Recipe(**fields))
    train(Recipe(**fields | {"max_steps": 4, "resume": True}))
    assert len(made) == 1
    images[0].rotate(50).save(tmp_path / "val" / "1.png")
    with pytest.raises(ValueError, match=r"validation_data have changed since .*checkpoint-4"):
        train(Recipe(**fields | {"max_steps": 6, "resume": True}))
    train(Recipe(**fields | {"output_dir": str(first.parent) + "_2"}))
    assert len(made) == 2


def claim_of_a_living_run(folder: Path) -> None:
    claim = {"pid": os.getppid(), "host": socket.gethostname(), "work": "a training", "since": "noon"}
    (folder / CLAIM).write_text(json.dumps(claim))


def test_another_number_of_validation_images_is_no_change_of_them(fields, images, tmp_path):
    fields |= {"validation_data": captions_in(tmp_path / "val", images), "validation_images": 3, "max_steps": 2}
    train(Recipe(**fields))
    images[0].rotate(50).save(tmp_path / "val" / "5.png")  # not among the three
    train(Recipe(**fields | {"max_steps": 4, "resume": True}))
    train(Recipe(**fields | {"max_steps": 6, "resume": True, "validation_images": 6}))
    images[0].rotate(50).save(tmp_path / "val" / "1.png")
    with pytest.raises(ValueError, match="validation_data have changed since"):
        train(Recipe(**fields | {"max_steps": 8, "resume": True, "validation_images": 6}))


def test_a_complete_cache_is_read_by_several_runs_and_where_nothing_can_be_written(fields, tmp_path, monkeypatch):
    cache = tmp_path / "features"
    fields |= {"cache_features": str(cache), "max_steps": 2}
    train(Recipe(**fields))
    next(cache.glob("validation-*")).unlink()
    claim_of_a_living_run(cache)
    before, may = sorted(cache.iterdir()), os.access
    monkeypatch.setattr("os.access", lambda place, *rest: Path(place) != cache and may(place, *rest))
    second = Path(fields["output_dir"] + "_2")
    train(Recipe(**fields | {"output_dir": str(second)}))
    assert sorted(cache.iterdir()) == before and list(second.glob("validation-*"))
    (cache / CLAIM).unlink()
    (cache / "cache.json").write_text("")
    with pytest.raises(ValueError, match=r"cache\.json is not JSON"):
        train(Recipe(**fields | {"output_dir": str(tmp_path / "third")}))
    (cache / "cache.json").write_text("{}")
    with pytest.raises(ValueError, match=r"does not say what the feature cache .* delete it"):
        train(Recipe(**fields | {"output_dir": str(tmp_path / "third")}))


@pytest.mark.parametrize("kind", ["table", "cache"])
def test_a_stopped_run_does_not_go_on_over_changed_data(kind, fields, images, tmp_path, monkeypatch):
    fields |= {"train_data": captions_in(tmp_path / "train", images)}
    if kind == "cache":
        fields["cache_features"] = str(tmp_path / "features")
    kill_at(monkeypatch, 3)  # after checkpoint 2
    with pytest.raises(Killed):
        train(Recipe(**fields))
    fields["resume"] = True
    images[0].rotate(50).save(tmp_path / "train" / "1.png")
    with pytest.raises(ValueError, match=r"train_data have changed since .*checkpoint-2.*--output_dir"):
        train(Recipe(**fields))
    images[1].rotate(1).save(tmp_path / "train" / "1.png")  # as it was, and later
    train(Recipe(**fields))


def test_a_stopped_run_does_not_go_on_over_changed_frozen_parts(fields, sources, tmp_path, monkeypatch):
    backbone = tmp_path / "backbone"
    shutil.copytree(sources["backbone"], backbone)
    fields |= {"backbone": str(backbone), "validation_data": []}
    kill_at(monkeypatch, 3)  # after checkpoint 2
    with pytest.raises(Killed):
        train(Recipe(**fields))
    fields["resume"] = True
    before = (backbone / "config.json").read_text()
    config = json.loads(before)
    config["pretrained_cfg"]["std"] = [0.2, 0.3, 0.25]
    (backbone / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"weights, settings, preprocessing or tokenizer of the frozen parts have changed since .*checkpoint-2"
    ):
        train(Recipe(**fields))
    (backbone / "config.json").write_text(before)
    train(Recipe(**fields))


def fail_to_save(monkeypatch, step: int):
    """Let the disk be full from the checkpoint of a step on, but for the temporary directory."""
    original = DevilModel.save_pretrained

    def save(self, folder, *args, **kwargs):
        if f"checkpoint-{step}" in str(folder) or Path(folder).name.startswith(".unfinished-"):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        return original(self, folder, *args, **kwargs)

    monkeypatch.setattr(DevilModel, "save_pretrained", save)


@pytest.mark.parametrize("step", [4, 100])
def test_weights_that_have_no_room_are_kept_elsewhere_and_the_run_goes_on_from_its_checkpoint(
    step, fields, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder, newest = Path(fields["output_dir"]), 2 if step == 4 else 6
    fail_to_save(monkeypatch, step)
    kept_there = rf"The weights are kept in .*newest whole checkpoint is .*checkpoint-{newest}\. Make room"
    with pytest.raises(DiskFull, match=kept_there):
        train(Recipe(**fields))
    (kept,) = tmp_path.glob("devil-hf-*")
    assert isinstance(AutoModel.from_pretrained(kept), DevilModel)
    assert not (folder / "checkpoint").exists() and not list(folder.glob(".unfinished-*"))
    if step == 100:
        assert all(torch.equal(one, weights(folder / "checkpoint-6")[name]) for name, one in weights(kept).items())
    monkeypatch.undo()
    resumed = train(Recipe(**fields | {"resume": True}))
    torch.testing.assert_close(weights(resumed), weights(finished), rtol=0, atol=0)


def test_a_real_limit_of_the_disk_ends_in_one_clear_error(fields, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DiskFull, match="disk is full") as full:
            train(Recipe(**fields))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Nor could they be kept" in str(full.value) or "validation-" in str(full.value)
    train(Recipe(**fields | {"resume": True}))


@settings(max_examples=settings.default.max_examples // 5)
@given(step=st.integers(1, 6))
def test_a_run_stopped_at_any_step_ends_as_if_it_had_not_been(step, shared_fields, finished, tmp_path_factory):
    fields = shared_fields | {"output_dir": str(tmp_path_factory.mktemp("stopped")), "resume": True}
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(Recipe(**fields))
    torch.testing.assert_close(weights(train(Recipe(**fields))), weights(finished), rtol=0, atol=0)
    assert losses(fields["output_dir"]) == losses(finished.parent)


class Views(torch.nn.Module):
    """A network that flattens by `view`, which memory with channels last does not allow."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4))
        self.fc = torch.nn.Linear(128, 16)

    def forward(self, pixels):
        features = self.features(pixels)
        return self.fc(features.view(features.size(0), -1))


def test_a_backbone_that_views_is_trained_with_and_read_for_units(language_model, tokenizer, processor, images, tmp_path):
    layers = ["features.0", "fc"]
    model = DevilModel.from_backbone_and_language_model(Views(), language_model, layers, tokenizer=tokenizer, **SMALL_TRANSLATOR)
    table = ImageTable(PairTable(open_pairs(captions_in(tmp_path / "some", images), 0, False), PairDecoder(BadSamples())))
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[])
    DevilTrainer(model, arguments, processor, train_dataset=table).train()
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pool_draws(model, pixel_values)[0].shape == (3, 1, 8)
    assert UnitReader(model.backbone)(pixel_values)[0][0].shape[:2] == (3, 8)


def test_captions_longer_than_the_context_are_cut_and_descriptions_end_in_it(fields, sources, tokenizer, images, tmp_path):
    small = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    data = captions_in(tmp_path / "long", images)
    file = tmp_path / "long" / "captions.jsonl"
    file.write_text(file.read_text().replace("a red dog", "a red dog " * 50))
    fields |= {"language_model": str(tmp_path / "lm"), "train_data": data, "validation_data": data, "describe_validation": 2}
    assert train(Recipe(**fields | {"max_steps": 2})).is_dir()
    with pytest.raises(StrictDataclassError, match="prefix_length=15 needs a context of at least 17"):
        train(Recipe(**fields | {"model": SMALL_TRANSLATOR | {"prefix_length": 15}, "output_dir": str(tmp_path / "none")}))
