"""What tests of training share: shards as CC3M has them, what a run leaves behind, runs that are killed or launched."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from devil_hf.training.trainer import DevilTrainer

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red dog", "the cat on grass", "a square", "a blue circle left of the cat"]


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


def weights(checkpoint) -> dict[str, torch.Tensor]:
    return load_file(Path(checkpoint) / "model.safetensors")


def losses(output_dir) -> list[tuple]:
    """The loss curve of a run, training and validation."""
    newest = max(Path(output_dir).glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], name, entry[name]) for entry in history for name in ("loss", "eval_loss") if name in entry]


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


def launch(file: Path, processes: int, *options: str) -> list[str]:
    several = ["--multi_gpu"] if processes > 1 else []
    port = str(20_000 + os.getpid() % 20_000)
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    return [*command, str(ROOT / "scripts/train.py"), "--config", str(file), *options]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
