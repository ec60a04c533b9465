"""Training by recipe: frozen parts stay frozen, runs go on exactly, checkpoints are whole, what is wrong is found first."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator
from transformers import AutoModel, AutoProcessor, EarlyStoppingCallback, TrainingArguments

from devil_hf import DevilModel
from devil_hf.data.decoding import BadSamples, TooManyBadSamples
from devil_hf.model.pooling_devil import pool
from devil_hf.settings import parse
from devil_hf.training import run
from devil_hf.training.feature_cache import CachedFeatures, StaleCache
from devil_hf.training.features import PooledCaptions, pool_draws, pooled_feature_draws
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from devil_hf.training.trainer import DevilTrainer
from tests.conftest import SMALL_TRANSLATOR

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red dog", "the cat on grass", "a square", "a blue circle left of the cat"]


@pytest.fixture(scope="module")
def caption_folder(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    lines = []
    for index in range(9):
        images[index % 3].rotate(10 * index).save(folder / f"{index}.png")
        record = {"image": f"{index}.png", "captions": CAPTIONS[index % 3 : index % 3 + 2]}
        lines.append(json.dumps(record | {"split": "train" if index < 6 else "val"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return str(folder)


def write_shards(folder, images, shards: int = 3, samples: int = 8):
    """CC3M as img2dataset leaves it: 00000.tar, ... with NAME.jpg, NAME.txt and NAME.json of each pair."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for index in range(samples):
                name = f"{shard:05d}{index:04d}"
                picture = io.BytesIO()
                images[index % 3].rotate(7 * (index + 11 * shard)).save(picture, "JPEG")
                caption = CAPTIONS[(index + shard) % len(CAPTIONS)]
                fields = {"jpg": picture.getvalue(), "txt": caption.encode(), "json": b'{"status": "success"}'}
                for ending, content in fields.items():
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cc3m")
    write_shards(folder, images)
    return folder


@pytest.fixture
def fields(sources, caption_folder, tmp_path):
    """A tiny run on files."""
    return {
        "output_dir": str(tmp_path / "run"),
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


# ----------------------------------------------------------------------------------------------------------- features


def test_cached_features_equal_those_of_the_model(model, pixel_values):
    cached = pooled_feature_draws(model, [pixel_values[:2], pixel_values[2:]])
    expected = [pool(maps, None) for maps in model.extract_features(pixel_values)]
    for found, fresh in zip(cached, expected, strict=True):
        torch.testing.assert_close(found[:, 0].float(), fresh, atol=1e-2, rtol=1e-3)


def test_draws_of_one_image_differ_and_come_from_its_locations(model, pixel_values):
    torch.manual_seed(0)
    cached = pooled_feature_draws(model, [pixel_values], draws=6)
    assert cached[0].shape[:2] == (3, 6)
    assert not torch.equal(cached[0][0, 0], cached[0][0, 1])
    maps = model.extract_features(pixel_values)[0]
    low, high = maps.amin(dim=(2, 3)), maps.amax(dim=(2, 3))
    tolerance = 1e-2 * maps.abs().max()
    assert (cached[0] >= low[:, None] - tolerance).all() and (cached[0] <= high[:, None] + tolerance).all()


def test_samples_pair_an_images_draw_with_one_of_its_captions():
    features = [torch.arange(6.0).view(3, 2, 1)]
    captions = [["a", "b"], ["c"], ["d", "e", "f"]]
    dataset = PooledCaptions(features, captions)
    items = [dataset.sample(2, epoch) for epoch in range(60)]
    assert {(i["pooled_features"][0].item(), i["caption"]) for i in items} == {
        (v, t) for v in (4.0, 5.0) for t in "def"
    }
    assert dataset.sample(2, 7) == items[7]
    assert [text for _, text in dataset.every_caption()] == ["a", "c", "d", "b", "e", "f"]
    with pytest.raises(ValueError, match="no caption"):
        PooledCaptions(features, [["a"], [], ["b"]])


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_ends_in_a_checkpoint_that_loads_and_trains_again(fields, images, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields))
    options = ["--batch-size", "3", "--learning_rate", "2e-3", "--report_to", "tensorboard"]
    recipe = parse(Recipe, ["--config", str(file), *options])
    assert (recipe.batch_size, recipe.learning_rate) == (3, 2e-3)
    checkpoint = train(recipe)
    check_records(Path(recipe.output_dir), AutoModel.from_pretrained(checkpoint).layer_names)
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert model.config.frozen_weights == "reference"
    assert model.generate(**processor(images=images, return_tensors="pt"), max_new_tokens=3).shape[0] == 3
    again = parse(Recipe, ["--config", str(checkpoint)])
    assert again == recipe
    again.output_dir = str(tmp_path / "again")
    torch.testing.assert_close(weights(train(again)), weights(checkpoint), rtol=0, atol=0)


def check_records(output_dir: Path, layers: list[str]) -> None:
    """Trackers got loss, learning rate, throughput, how often each layer was visible, and sample descriptions."""
    accumulator = event_accumulator.EventAccumulator(str(next(output_dir.glob("runs/*"))))
    accumulator.Reload()
    tags = accumulator.Tags()
    expected = {"train/loss", "train/learning_rate", "train/images_per_second", "eval/loss", "eval/evidence"}
    expected |= {f"train/visible/{name}" for name in layers} | {f"eval/loss_{name}" for name in layers}
    assert expected <= set(tags["scalars"])
    assert any("descriptions" in tag for tag in tags["tensors"])
    lines = [json.loads(line) for line in (output_dir / "descriptions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert set(lines[0]["descriptions"]) == {"all", *layers} and len(lines[0]["descriptions"]["all"]) == 3


def weights(checkpoint) -> dict[str, torch.Tensor]:
    return load_file(Path(checkpoint) / "model.safetensors")


def losses(output_dir) -> list[tuple]:
    """The loss curve of a run, training and validation."""
    newest = max(Path(output_dir).glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], name, entry[name]) for entry in history for name in ("loss", "eval_loss") if name in entry]


def test_frozen_means_frozen(fields, monkeypatch):
    kept = {}

    def build(recipe):
        kept["model"], kept["processor"] = original(recipe)
        kept["before"] = {name: tensor.clone() for name, tensor in kept["model"].state_dict().items()}
        return kept["model"], kept["processor"]

    original = run.build
    monkeypatch.setattr(run, "build", build)
    train(Recipe(**fields, lora={"rank": 2, "dropout": 0.1}))
    model, before = kept["model"], kept["before"]
    trained = set(model.trainable_state_dict())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trained
    assert any(name.startswith("translator.") for name in changed) and any(".lora_B" in name for name in changed)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)
    folder = Path(fields["output_dir"]) / "checkpoint-6"
    assert set(weights(folder)) == trained
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(trained)


def test_validation_loss_is_that_of_every_caption_in_nats_per_token(fields, caption_folder):
    checkpoint = train(Recipe(**fields))
    model, processor = DevilModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    rows = [json.loads(line) for line in (Path(caption_folder) / "captions.jsonl").read_text().splitlines()]
    total = tokens = 0.0
    for row in rows[6:]:
        pixels = processor(images=str(Path(caption_folder) / row["image"]), return_tensors="pt")["pixel_values"]
        for caption in row["captions"]:
            text = processor(text=[caption], return_tensors="pt")
            with torch.no_grad():
                loss = model(pixels, text["input_ids"], text["attention_mask"]).loss.item()
            total, tokens = total + loss * (text["input_ids"].numel() + 1), tokens + text["input_ids"].numel() + 1
    best = min(value for _, name, value in losses(fields["output_dir"]) if name == "eval_loss")
    assert best == pytest.approx(total / tokens, abs=2e-3)  # features are kept in fp16


def test_losses_do_not_depend_on_the_batch_size(model, processor, pixel_values, tmp_path):
    data = PooledCaptions(pooled_feature_draws(model, [pixel_values]), [CAPTIONS[:2], CAPTIONS[1:3], CAPTIONS[2:]])
    metrics = []
    for size in (1, 2, 4):  # 4: more than the first captions
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_eval_batch_size=size, report_to="none", use_cpu=True
        )
        metrics.append(DevilTrainer(model, arguments, processor, data, data).evaluate())
    names = [name for name in metrics[0] if name == "eval_evidence" or name.startswith("eval_loss")]
    assert len(names) == 2 + len(model.layer_names)
    for other in metrics[1:]:
        assert [other[name] for name in names] == pytest.approx([metrics[0][name] for name in names], abs=1e-4)


def test_the_benchmarks_naive_step_has_the_same_loss(model, pixel_values, processor, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark_training import naive_loss

    input_ids = processor(text=["a red dog", "a red cat", "a blue dog"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = naive_loss(model, pixel_values, input_ids, dropout=False)
        torch.testing.assert_close(model(pixel_values, input_ids).loss, expected)


# ------------------------------------------------------------------------------------------------------- exact resume


class Killed(Exception):
    pass


def kill_at(monkeypatch, step: int) -> None:
    """Let the next run end in the middle of a step."""
    original, steps = DevilTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == step:
            monkeypatch.setattr(DevilTrainer, "training_step", original)
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DevilTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("table", {"smallest_crop": 0.5, "lora": {"dropout": 0.2}}),
        ("cache", {"accumulation": 2}),
        ("stream", {"workers": 2}),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(kind, more, fields, shards, tmp_path, monkeypatch):
    fields |= more
    if kind == "stream":
        fields["train_data"] = [{"kind": "webdataset", "urls": str(shards / "{00000..00002}.tar")}]
    if kind == "cache":
        fields["cache_features"] = str(tmp_path / "features")
    straight = train(Recipe(**fields))
    stopped = fields | {"output_dir": str(tmp_path / "stopped")}
    kill_at(monkeypatch, 5 * fields.get("accumulation", 1))  # after checkpoint 4
    with pytest.raises(Killed):
        train(Recipe(**stopped))
    # What a kill in the middle of saving leaves behind.
    half = tmp_path / "stopped" / ".unfinished" / "checkpoint-6"
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


# ------------------------------------------------------------------------------------------------------ feature cache


def test_training_from_a_cache_reads_no_pixels_and_refuses_a_stale_one(fields, caption_folder, tmp_path, monkeypatch):
    fields |= {"cache_features": str(tmp_path / "features"), "views": 2, "draws": 3, "smallest_crop": 0.5}
    first = train(Recipe(**fields))
    cache = CachedFeatures(tmp_path / "features", seed=0)
    assert len(cache) == 6 and load_file(cache.shards[0])["layer.0"].shape[:2] == (6, 6)
    assert load_file(cache.shards[0])["layer.0"].dtype == torch.float16

    def fail(*args, **kwargs):
        raise AssertionError("a pixel was touched")

    monkeypatch.setattr("devil_hf.data.decoding._decode", fail)
    fields |= {"output_dir": str(tmp_path / "second"), "validation_data": []}
    second = train(Recipe(**fields))
    assert set(weights(second)) == set(weights(first))
    monkeypatch.undo()
    for change, text in (
        ({"layers": [0, 1]}, "layers"),
        ({"resize": "paper"}, "image_transform"),
        ({"draws": 4}, "draws"),
        ({"train_data": [{"kind": "folder", "path": caption_folder}]}, "data"),
    ):
        with pytest.raises(StaleCache, match=text):
            train(Recipe(**(fields | change | {"output_dir": str(tmp_path / "third")})))


def test_an_interrupted_cache_is_finished_and_equal(fields, tmp_path, monkeypatch):
    monkeypatch.setattr("devil_hf.training.feature_cache.SHARD_IMAGES", 2)
    fields |= {"cache_features": str(tmp_path / "whole"), "max_steps": 2, "validation_data": []}
    train(Recipe(**fields))
    original, calls = pool_draws, []

    def draw(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return original(*args, **kwargs)

    fields |= {"cache_features": str(tmp_path / "parts"), "output_dir": str(tmp_path / "other")}
    monkeypatch.setattr("devil_hf.training.feature_cache.pool_draws", draw)
    with pytest.raises(Killed):
        train(Recipe(**fields))
    train(Recipe(**fields))
    assert len(calls) == 4  # one shard, the one that failed, and the two that were left
    whole, parts = (CachedFeatures(tmp_path / name, seed=0) for name in ("whole", "parts"))
    assert len(whole.shards) == 3 and whole.captions == parts.captions
    for one, other in zip(whole.shards, parts.shards, strict=True):
        torch.testing.assert_close(load_file(one), load_file(other), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- recipes


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
    monkeypatch.setattr(
        run, "BadSamples", partial(BadSamples, minimum=20)
    )  # thousands of samples are read first otherwise
    with pytest.raises(TooManyBadSamples, match=r"limit of 1\.0%"):
        train(parse_recipe_again(recipe, tmp_path / "strict", bad_samples=0.01))


def parse_recipe_again(recipe: Recipe, output_dir, **changes) -> Recipe:
    fields = yaml.safe_load(recipe.to_yaml()) | {"output_dir": str(output_dir)} | changes
    return Recipe(**fields)


RECIPES = [*sorted((ROOT / "scripts/recipes").glob("*.yaml")), Path("quickstart")]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_valid(file):
    recipe = parse(Recipe, ["--config", str(file), "--report_to", "none"])
    assert recipe.output_dir == f"runs/{file.stem}"
    if file.stem.startswith("cc3m"):  # the paper's settings
        assert (recipe.learning_rate, recipe.final_learning_rate, recipe.batch_size) == (1e-4, 1e-6, 64)
        assert (recipe.warmup_steps, recipe.schedule, recipe.max_steps) == (5000, "linear", 1_000_000)
        assert (recipe.weight_decay, recipe.resize) == (1e-6, "paper")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backbone": ""}, "backbone"),
        ({"draws": 0}, "draws=0"),
        ({"model": {"widht": 3}}, "widht"),
        ({"lora": {"r": 3}}, "'r'"),
        ({"precision": "half"}, "half"),
        ({"save_steps": 3}, "save_steps=3"),
        ({"save_steps": 4}, "save_steps=4 must equal evaluation_steps=2"),
        ({"keep_checkpoints": 1}, "keep_checkpoints=1"),
        ({"validation_data": [{"kind": "shapes", "split": "test"}]}, "no longer be held out"),
        ({"validation_data": [{"kind": "hub", "path": "a/b", "split": "test[:100]"}]}, "no longer be held out"),
        ({"cache_features": "features", "smallest_crop": 0.5}, "smallest_crop=0.5"),
        ({"push_to_hub": "devil"}, "USER/REPO"),
        ({"logging_steps": 4}, "logging_steps=4"),
        ({"report_to": "tensorbored"}, "tensorbored"),
        ({"layers": ["layer9"]}, "layer9"),
        ({"model": SMALL_TRANSLATOR | {"prefix_length": 80}}, "prefix_length=80"),
        ({"train_data": [{"kind": "folder", "path": "nowhere"}]}, "nowhere"),
        ({"processes": 3}, "3"),
        ({"save": "merged"}, "lora"),
        ({"checkpoint": "shapes"}, "leave backbone"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_step(change, text, fields, monkeypatch):
    monkeypatch.setattr(DevilTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(Exception, match=text):
        train(Recipe(**(fields | change)))


def test_a_slim_checkpoint_of_local_parts_is_not_to_be_pushed(fields, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {})
    monkeypatch.setattr(DevilTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(ValueError, match=r"directory of this machine.*save='full'"):
        train(Recipe(**fields, push_to_hub="tester/devil"))


def test_sharded_weights_are_refused_with_validation(fields, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--multi_gpu"):
        train(Recipe(**fields))


def test_a_full_disk_is_found_before_the_first_step(fields, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="GB free"):
        train(Recipe(**fields))
    # Where every checkpoint is kept, all of them need room.
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10**9}))
    monkeypatch.setattr(DevilTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(OSError, match="GB free"):
        train(Recipe(**fields | {"keep_checkpoints": 0, "max_steps": 10**6, "evaluation_steps": 10}))


def test_an_unknown_field_of_a_recipe_file_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match="batchsize"):
        parse(Recipe, ["--config", str(tmp_path / "r.yaml")])


def test_half_a_step_is_no_number_of_steps(tmp_path):
    (tmp_path / "r.yaml").write_text("max_steps: 2.5\n")
    with pytest.raises(ValueError, match=r"max_steps=2\.5 must be a whole number"):
        parse(Recipe, ["--config", str(tmp_path / "r.yaml")])


def test_training_goes_on_from_a_checkpoint_with_lora_and_ends_merged(fields, tmp_path):
    base = train(Recipe(**fields))
    more = {name: value for name, value in fields.items() if name not in ("backbone", "language_model", "model")}
    more |= {"output_dir": str(tmp_path / "tuned"), "checkpoint": str(base), "lora": {"rank": 2}, "save": "merged"}
    tuned = train(Recipe(**more))
    model = AutoModel.from_pretrained(tuned)
    assert model.config.lora is None and model.config.frozen_weights == "embedded"
    first = next(value for _, name, value in losses(tmp_path / "tuned") if name == "eval_loss")
    last = [value for _, name, value in losses(fields["output_dir"]) if name == "eval_loss"][-1]
    assert abs(first - last) < 0.5  # it did not begin anew


# --------------------------------------------------------------------------------------------------- several processes

WITHOUT_PACKAGE = (
    "import sys, torch\nfrom transformers import AutoModel\nassert 'devil_hf' not in sys.modules\n"
    "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    "print(type(model).__module__, tuple(model.null_prefix().shape))\n"
)


def launch(file: Path, processes: int, *options: str) -> list[str]:
    several = ["--multi_gpu"] if processes > 1 else []
    port = str(20_000 + os.getpid() % 20_000)
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    return [*command, str(ROOT / "scripts/train.py"), "--config", str(file), *options]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}


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
