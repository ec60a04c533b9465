"""Training by recipe: frozen parts stay frozen, runs go on exactly, checkpoints are whole."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from tensorboard.backend.event_processing import event_accumulator
from transformers import AutoModel, AutoProcessor, EarlyStoppingCallback, TrainingArguments

from devil_hf import DevilModel
from devil_hf.data.decoding import BadSamples, TooManyBadSamples
from devil_hf.settings import make, parse
from devil_hf.training import run
from devil_hf.training.feature_cache import CachedFeatures
from devil_hf.training.features import PooledCaptions, pooled_feature_draws
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from devil_hf.training.trainer import DevilTrainer
from tests.conftest import SMALL_TRANSLATOR
from tests.training.runs import CAPTIONS, ROOT, Killed, environment, kill_at, launch, losses, weights, write_shards

# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_ends_in_a_checkpoint_that_loads_and_trains_again(finished, shared_fields, images, tmp_path):
    model, processor = AutoModel.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
    check_records(finished.parent, model.layer_names)
    assert model.config.frozen_weights == "reference"
    assert model.generate(**processor(images=images, return_tensors="pt"), max_new_tokens=3).shape[0] == 3
    again = parse(Recipe, ["--config", str(finished), "--output_dir", str(tmp_path / "again"), "--report-to", "none"])
    assert again == make(Recipe, shared_fields | {"output_dir": str(tmp_path / "again")})
    torch.testing.assert_close(weights(train(again)), weights(finished), rtol=0, atol=0)


def check_records(output_dir: Path, layers: list[str]) -> None:
    """Trackers got loss, learning rate, throughput, how often each layer was visible, and sample descriptions."""
    accumulator = event_accumulator.EventAccumulator(str(next(output_dir.glob("runs/*"))))
    accumulator.Reload()
    tags = accumulator.Tags()
    expected = {"train/loss", "train/learning_rate", "train/images_per_second", "eval/loss", "eval/evidence"}
    expected |= {f"train/visible/{name}" for name in layers} | {f"eval/evidence_{name}" for name in layers}
    assert expected <= set(tags["scalars"])
    assert any("descriptions" in tag for tag in tags["tensors"])
    lines = [json.loads(line) for line in (output_dir / "descriptions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert set(lines[0]["descriptions"]) == {"all", *layers} and len(lines[0]["descriptions"]["all"]) == 3


def test_frozen_means_frozen(fields, monkeypatch):
    kept = {}

    def build(recipe):
        kept["model"], kept["processor"] = original(recipe)
        kept["before"] = {name: tensor.clone() for name, tensor in kept["model"].state_dict().items()}
        return kept["model"], kept["processor"]

    original = run.build
    monkeypatch.setattr(run, "build", build)
    train(Recipe(**fields | {"max_steps": 2}, lora={"rank": 2, "dropout": 0.1}))
    model, before = kept["model"], kept["before"]
    trained = set(model.trainable_state_dict())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trained
    assert any(name.startswith("translator.") for name in changed) and any(".lora_B" in name for name in changed)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)
    folder = Path(fields["output_dir"]) / "checkpoint-2"
    assert set(weights(folder)) == trained
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(trained)


def test_validation_loss_is_that_of_every_caption_in_nats_per_token(finished, caption_folder):
    model, processor = DevilModel.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
    rows = [json.loads(line) for line in (Path(caption_folder) / "captions.jsonl").read_text().splitlines()]
    total = tokens = 0.0
    for row in rows[6:]:
        pixels = processor(images=str(Path(caption_folder) / row["image"]), return_tensors="pt")["pixel_values"]
        for caption in row["captions"]:
            text = processor(text=[caption], return_tensors="pt")
            with torch.no_grad():
                loss = model(pixels, text["input_ids"], text["attention_mask"]).loss.item()
            total, tokens = total + loss * (text["input_ids"].numel() + 1), tokens + text["input_ids"].numel() + 1
    best = min(value for _, name, value in losses(finished.parent) if name == "eval_loss")
    assert best == pytest.approx(total / tokens, abs=2e-3)  # features are kept in fp16


def test_losses_do_not_depend_on_the_batch_size(model, processor, pixel_values, tmp_path):
    data = PooledCaptions(pooled_feature_draws(model, [pixel_values]), [CAPTIONS[:2], CAPTIONS[1:3], CAPTIONS[2:]])
    metrics = []
    for size in (1, 2, 4):  # 4: more than the first captions
        arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_eval_batch_size=size, report_to="none", use_cpu=True)
        metrics.append(DevilTrainer(model, arguments, processor, data, data).evaluate())
    names = [name for name in metrics[0] if name.startswith(("eval_evidence", "eval_loss"))]
    assert len(names) == 2 + len(model.layer_names)
    for other in metrics[1:]:
        assert [other[name] for name in names] == pytest.approx([metrics[0][name] for name in names], abs=1e-4)


def test_evidence_of_all_layers_and_of_each_is_over_the_same_first_captions(model, processor, pixel_values, tmp_path):
    data = PooledCaptions(pooled_feature_draws(model, [pixel_values]), [CAPTIONS[:2], CAPTIONS[1:3], CAPTIONS[2:]])
    arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_eval_batch_size=2, report_to="none", use_cpu=True)
    metrics = DevilTrainer(model, arguments, processor, data, data).evaluate()
    first = processor(text=[texts[0] for texts in data.captions], return_tensors="pt")
    tokens = {name: first[name] for name in ("input_ids", "attention_mask")}
    count = len(model.layer_names)

    def loss(*seen):
        mask = torch.tensor([[layer not in seen for layer in range(count)]] * 3)
        with torch.no_grad():
            return model(pooled_features=[one[:, 0].float() for one in data.features], layer_mask=mask, **tokens).loss.item()

    nothing = loss()
    assert metrics["eval_evidence"] == pytest.approx(nothing - loss(*range(count)), abs=1e-4)
    for layer, name in enumerate(model.layer_names):
        assert metrics[f"eval_evidence_{name}"] == pytest.approx(nothing - loss(layer), abs=1e-4)


def test_the_benchmarks_naive_step_has_the_same_loss(model, pixel_values, processor, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark_training import naive_loss

    input_ids = processor(text=["a red dog", "a red cat", "a blue dog"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = naive_loss(model, pixel_values, input_ids, dropout=False)
        torch.testing.assert_close(model(pixel_values, input_ids).loss, expected)
        mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
        expected = naive_loss(model, pixel_values, input_ids, dropout=False, lengths=[3, 1, 2])
        torch.testing.assert_close(model(pixel_values, input_ids, mask).loss, expected)


# ------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("table", {"smallest_crop": 0.5, "lora": {"dropout": 0.2}}),
        ("cache", {"accumulation": 2}),
        ("stream", {"workers": 2}),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(kind, more, fields, shards, tmp_path, monkeypatch):
    fields |= {"max_steps": 4} | more
    if kind == "stream":
        fields["train_data"] = [{"kind": "webdataset", "urls": str(shards / "{00000..00002}.tar")}]
    if kind == "cache":
        fields["cache_features"] = str(tmp_path / "features")
    straight = train(Recipe(**fields))
    stopped = fields | {"output_dir": str(tmp_path / "stopped")}
    kill_at(monkeypatch, 3 * fields.get("accumulation", 1))  # after checkpoint 2
    with pytest.raises(Killed):
        train(Recipe(**stopped))
    # What a kill in the middle of saving leaves behind.
    half = tmp_path / "stopped" / ".unfinished" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="--resume"):
        train(Recipe(**stopped))
    resumed = train(Recipe(**stopped, resume=True))
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=0)
    assert losses(tmp_path / "stopped") == losses(fields["output_dir"])
    # A run that had come to its end is only saved again.
    torch.testing.assert_close(weights(train(Recipe(**stopped, resume=True))), weights(straight), rtol=0, atol=0)


def test_a_run_that_stopped_early_is_only_saved_again_until_its_patience_is_raised(fields, monkeypatch):
    def without_gain(self, *args):
        self.early_stopping_patience_counter += 1

    monkeypatch.setattr(EarlyStoppingCallback, "check_metric_value", without_gain)
    fields["patience"] = 1
    before = weights(train(Recipe(**fields)))
    assert not (Path(fields["output_dir"]) / "checkpoint-4").exists()
    with monkeypatch.context() as patch:
        patch.setattr(DevilTrainer, "training_step", lambda *_, **__: pytest.fail("it was trained on"))
        torch.testing.assert_close(weights(train(Recipe(**fields, resume=True))), before, rtol=0, atol=0)
    train(Recipe(**fields | {"patience": 3, "resume": True}))
    assert (Path(fields["output_dir"]) / "checkpoint-6").exists()


def test_the_best_checkpoint_is_kept_when_the_output_folder_is_called_otherwise(fields, tmp_path, monkeypatch):
    worse, evaluate = iter([1.0, 2.0, 3.0]), DevilTrainer.evaluate
    monkeypatch.setattr(DevilTrainer, "evaluate", lambda *a, **k: evaluate(*a, **k) | {"eval_loss": next(worse)})
    monkeypatch.chdir(tmp_path)
    kill_at(monkeypatch, 3)  # after checkpoint 2
    with pytest.raises(Killed):
        train(Recipe(**fields | {"output_dir": "before"}))
    best = weights("before/checkpoint-2")
    Path("before").rename("after")
    after = weights(train(Recipe(**fields | {"output_dir": str(tmp_path / "after"), "resume": True})))
    assert Path("after/checkpoint-6").is_dir()  # the newest is another
    torch.testing.assert_close({name: after[name] for name in best}, best, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- other ways


def test_the_cc3m_recipe_runs_on_a_miniature_with_a_truncated_shard(sources, images, tmp_path, monkeypatch):
    folder = tmp_path / "cc3m"
    folder.mkdir()
    write_shards(folder, images, samples=24)
    shard = folder / "00001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 2 // 3])
    recipe = parse(
        Recipe,
        [
            *("--config", str(ROOT / "scripts/recipes/cc3m_resnet50_opt125m.yaml")),
            # Where things lie, and their size; streaming, order, dropouts, schedule and the rest are the recipe's.
            *("--output_dir", str(tmp_path / "run"), "--layers", "null", "--model", json.dumps(SMALL_TRANSLATOR)),
            *("--backbone", sources["backbone"], "--language_model", sources["language_model"]),
            *("--train_data", json.dumps([{"kind": "webdataset", "urls": str(folder / "{00000..00002}.tar")}])),
            *("--validation_data", json.dumps([{"kind": "webdataset", "urls": str(folder / "00000.tar")}])),
            *("--max_steps", "6", "--evaluation_steps", "2", "--logging_steps", "1", "--batch_size", "8"),
            *("--workers", "2", "--report_to", "none"),
        ],
    )
    train(recipe)
    history = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "loss" in entry][-1]
    assert 0 < last["bad_samples"] < 0.2
    assert set(last) >= {"images_per_second", "learning_rate", "visible/none"}
    monkeypatch.setattr(run, "BadSamples", partial(BadSamples, minimum=20))  # thousands of samples are read first otherwise
    with pytest.raises(TooManyBadSamples, match=r"limit of 1\.0%"):
        train(dataclasses.replace(recipe, output_dir=str(tmp_path / "strict"), bad_samples=0.01))


def test_training_goes_on_from_a_checkpoint_with_lora_and_ends_merged(fields, finished, tmp_path):
    more = {name: value for name, value in fields.items() if name not in ("backbone", "language_model", "model")}
    more |= {"output_dir": str(tmp_path / "tuned"), "checkpoint": str(finished), "lora": {"rank": 2}, "save": "merged"}
    tuned = train(Recipe(**more))
    model = AutoModel.from_pretrained(tuned)
    assert model.config.lora is None and model.config.frozen_weights == "embedded"
    first = next(value for _, name, value in losses(tmp_path / "tuned") if name == "eval_loss")
    last = [value for _, name, value in losses(finished.parent) if name == "eval_loss"][-1]
    assert abs(first - last) < 0.5  # it did not begin anew


# --------------------------------------------------------------------------------------------------- several processes

WITHOUT_PACKAGE = (
    "import sys, torch\nfrom transformers import AutoModel\nassert 'devil_hf' not in sys.modules\n"
    "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    "print(type(model).__module__, tuple(model.null_prefix().shape))\n"
)


def test_two_processes_train_one_model_that_loads_without_the_package(fields, tmp_path):
    file = tmp_path / "recipe.yaml"
    fields["cache_features"] = str(tmp_path / "features")
    file.write_text(yaml.safe_dump(fields | {"processes": 2, "batch_size": 2, "max_steps": 4}))
    result = subprocess.run(launch(file, 2), env=environment(tmp_path / "home"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "training on 2 processes" in result.stderr
    assert len(CachedFeatures(tmp_path / "features", seed=0)) == 6
    checkpoint = Path(fields["output_dir"]) / "checkpoint"
    bare = {k: v for k, v in environment(tmp_path / "bare").items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(checkpoint)]
    printed = subprocess.run(command, env=bare, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert printed.startswith("transformers_modules.") and printed.strip().endswith("(1, 4, 32)")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(kind, processes, fields, shards, tmp_path):
    fields |= {"max_steps": 12, "batch_size": 2, "processes": processes, "lora": {"dropout": 0.1}, "smallest_crop": 0.6}
    if kind == "stream":
        fields |= {"train_data": [{"kind": "webdataset", "urls": str(shards / "{00000..00002}.tar")}], "workers": 2}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields))
    options = {"env": environment(tmp_path / "home"), "stderr": subprocess.PIPE, "text": True}
    straight = subprocess.run(launch(file, processes), **options)
    assert straight.returncode == 0, straight.stderr[-3000:]
    killed = [*launch(file, processes), "--output_dir", str(tmp_path / "killed"), "--resume"]
    victim = subprocess.Popen(killed, env=options["env"], stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint-4").is_dir():
        assert victim.poll() is None
        time.sleep(0.01)
    for process in (*psutil.Process(victim.pid).children(recursive=True), victim):
        process.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "killed" / "checkpoint").exists()
    resumed = subprocess.run(killed, **options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found, expected = (weights(Path(folder) / "checkpoint") for folder in (tmp_path / "killed", fields["output_dir"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert losses(tmp_path / "killed") == losses(fields["output_dir"])
