"""What a run of a CC3M recipe costs; `python scripts/benchmark.py cost` prints it.

Measured: one training step at the paper's shape (random weights and pixels, captions of `CAPTION_TOKENS` tokens) on the device at
hand. On a GPU that is the recipe's batch under bf16 autocast; on a CPU a few images in fp32 on one core, in CPU seconds, so that
other work on the machine does not count. Counted: the floating-point operations of that step, forward and backward, by torch.
Assumed: how much of a GPU's stated peak a run reaches (`UTILISATIONS`). The measured step reads no images. The rate that it needs
is printed beside, and what one core decodes and resizes (`decoded_per_second`, a JPEG of the size of CC3M's), which bounds what
the recipe's workers deliver.
"""

import statistics
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from benchmark_training import CAPTION_TOKENS, build, make_steps, timed
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from devil_hf.data.decoding import BadSamples, PairDecoder
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.settings import read_yaml
from devil_hf.training.recipe import Recipe

RECIPE = Path(__file__).parent / "recipes" / "cc3m_resnet50_opt125m.yaml"
PAIRS = 2_905_954  # of CC3M that pixparse/cc3m-wds still has
SHARDS, SHARD_BYTES = 576, 467e6  # the latter of ten shards of that name
PEAKS = {"A100": 312e12, "H100": 989e12}  # FLOP per second in dense bf16 that NVIDIA states (SXM)
UTILISATIONS = (0.2, 0.4)  # of that peak: assumed
CPU_BATCH = 4
SIDES = (683, 512)  # pixels: its images were resized to a short side of 512
HOUR, DAY = 3600, 24


def cost(device: str, repeats: int) -> dict:
    """Seconds and FLOP per image, and hours for one epoch and for the whole recipe."""
    fields = read_yaml(Recipe, RECIPE)
    on_gpu = device != "cpu"
    batch = fields["batch_size"] if on_gpu else CPU_BATCH
    name = "bf16" if on_gpu else "fp32"
    if not on_gpu:
        torch.set_num_threads(1)
    step = make_steps(build("paper", device).train(), [name], batch, device)[name]
    with FlopCounterMode(display=False) as counter:
        step()  # and warms up
    flops = counter.get_total_flops() / batch
    seconds = statistics.median(timed(step)[0] if on_gpu else _cpu_seconds(step) for _ in range(repeats)) / batch
    images = fields["max_steps"] * fields["batch_size"]
    report = {
        "measured_on": torch.cuda.get_device_name(device) if on_gpu else "one CPU core, fp32, in CPU seconds",
        "images_of_a_measured_step": batch,
        "caption_tokens": CAPTION_TOKENS,
        "gflop_per_image": flops / 1e9,
        "images_per_second": 1 / seconds,
        "gflop_per_second": flops / seconds / 1e9,
        "decoded_per_second": (rate := decoded_per_second(repeats)),
        "days_of_the_recipe_with_its_workers": images / (rate * fields["workers"]) / HOUR / DAY,
        "epochs_of_the_recipe": images / PAIRS,
        "gb_of_an_epoch": SHARDS * SHARD_BYTES / 1e9,
        "here": _hours(seconds, images),
    }
    for gpu, peak in PEAKS.items():
        for share in UTILISATIONS:
            report[f"{gpu} at {share:.0%} of its peak (assumed)"] = _hours(flops / (share * peak), images)
    return report


def decoded_per_second(repeats: int, images: int = 30) -> float:
    """Images that one core decodes and preprocesses in a CPU second, as a worker of the recipe does."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDES[1] // 8, SIDES[0] // 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).resize(SIDES, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    row = {"key": "", "image": {"bytes": file.getvalue(), "path": None}, "captions": ["a"], "region": None, "problem": None}
    decoder, processor = PairDecoder(BadSamples()), DevilImageProcessor(crop_pct=1.0)

    def read() -> None:
        for _ in range(images):
            processor(decoder(row)["image"])

    return images / min(_cpu_seconds(read) for _ in range(repeats))


def _cpu_seconds(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def _hours(seconds: float, images: int) -> dict[str, float]:
    """Hours of an epoch, days of the recipe, and megabytes that have to be read every second."""
    hours = PAIRS * seconds / HOUR
    return {
        "hours_of_an_epoch": hours,
        "days_of_the_recipe": images * seconds / HOUR / DAY,
        "images_per_second_to_decode": 1 / seconds,
        "mb_per_second_to_read": SHARDS * SHARD_BYTES / 1e6 / (PAIRS * seconds),
    }
