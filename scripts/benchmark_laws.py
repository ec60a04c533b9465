"""How cost grows, what questions cost beside a Grad-CAM, what memory is held, how full a batch of images is, and what rows that
end save; `python scripts/benchmark.py laws prices memory backbone leaving` runs it.

Random weights of the shapes of benchmark_training.py, but for `leaving`, which asks the shipped checkpoints. Figures are medians
of CPU seconds, or on a GPU of the clock, after a warm-up; memory is the highest that a process of its own held while it asked,
and what it held before.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from benchmark_training import build, matmul_peak, peak_resident_memory, timed
from torch.utils.flop_counter import FlopCounterMode

from devil_hf import DevilModel
from devil_hf.checkpoints.loading import load
from devil_hf.data.shapes import make_scene
from devil_hf.evaluation.shapes import pixel_values
from devil_hf.model.checkpoint_devil import COMPANIONS

EXAMPLES = Path(__file__).parents[1] / "src" / "devil_hf" / "demo" / "examples"
TOKENS, WORDS = 3, 20  # of a phrase, of a description
SIDES, PHRASES, IMAGES, LAYERS = (4, 7, 14, 28), (1, 5, 20, 100), (1, 4, 16), (1, 2, 4)
CASES = {  # of memory: shape, side of the grid, phrases, and tokens that the longest has
    "paper, 7 x 7, one phrase": ("paper", 7, 1, TOKENS),
    "paper, 7 x 7, five phrases": ("paper", 7, 5, TOKENS),
    "paper, 14 x 14, one phrase": ("paper", 14, 1, TOKENS),
    "small, 28 x 28, 4,000 words and one sentence": ("small", 28, 4000, 50),
}


def features_of(model: DevilModel, images: int, side: int) -> list[torch.Tensor]:
    """Random features of every layer, (images, C_l, side, side)."""
    return [torch.randn(images, channels, side, side) for channels in model.backbone.channels]


def phrases_of(count: int, longest: int = TOKENS) -> dict[str, torch.Tensor]:
    """Random phrases of three tokens; where one is longer, the others are words."""
    ids = torch.randint(5, 4000, (count, longest), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if longest > TOKENS:
        mask[1:, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """After a first call, which warms up."""
    function()
    return statistics.median(timed(function)[0] for _ in range(repeats))


def laws(repeats: int) -> dict:
    """Seconds of maps against places, phrases, images and layers, each alone, at the small shape; and of two sizes of models."""
    model = build("small", "cpu").eval()

    def ask(side: int = 7, phrases: int = 5, images: int = 1, layers: int = 1) -> float:
        features, texts = features_of(model, images, side), phrases_of(phrases)
        names = model.layer_names[-layers:]
        return median_seconds(lambda: model.attribute(phrases=texts, feature_maps=features, layers=names), repeats)

    report: dict = {
        "places": {side * side: ask(side=side) for side in SIDES},
        "phrases": {count: ask(phrases=count) for count in PHRASES},
        "images": {count: ask(images=count) for count in IMAGES},
        "layers": {count: ask(layers=count) for count in LAYERS},
        "model": {},
    }
    for shape in ("small", "paper"):
        model = build(shape, "cpu").eval().requires_grad_(False)  # the counter stumbles over views of what is trained
        features, texts = features_of(model, 1, 7), phrases_of(1)
        with FlopCounterMode(display=False) as counter:
            model.attribute(phrases=texts, feature_maps=features, layers=-1)
        gflop = counter.get_total_flops() / 1e9
        report["model"][f"{shape}, {gflop:.3g} GFLOP"] = ask(phrases=1)
    return {"seconds against": report}


def prices(device: str, repeats: int) -> dict:
    """What questions about one image cost at the paper's shape, backbone included: seconds, and how many Grad-CAMs take as long.

    A Grad-CAM (Selvaraju et al., 2017, by pytorch-grad-cam) is of one class of the same network.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network, model = timm.create_model("resnet50").to(device).eval(), build("paper", device, eos_token_id=None).eval()
    cam, target = GradCAM(model=network, target_layers=[network.layer4[-1]]), [ClassifierOutputTarget(0)]
    pixels = torch.randn(1, 3, 224, 224, device=device)
    one, five = ({name: tensor.to(device) for name, tensor in phrases_of(count).items()} for count in (1, 5))
    questions: dict[str, Callable[[], Any]] = {
        "Grad-CAM of one class": lambda: cam(input_tensor=pixels, targets=target),
        "score of one phrase for the image": lambda: model.score(pixels, **one),
        f"description of the image, {WORDS} words": lambda: model.generate(pixels, max_new_tokens=WORDS),
        "map of one phrase on the deepest layer": lambda: model.attribute(pixels, one, layers=-1),
        "maps of five phrases there": lambda: model.attribute(pixels, five, layers=-1),
        f"descriptions of its 49 places, {WORDS} words each": lambda: model.describe(
            pixels, layers=-1, locations="all", max_new_tokens=WORDS
        ),
    }
    seconds = {name: median_seconds(question, repeats) for name, question in questions.items()}
    unit = next(iter(seconds.values()))
    return {"prices": {name: {"seconds": value, "grad_cams": value / unit} for name, value in seconds.items()}}


def memory() -> dict:
    """GB before and while maps are made, each in a process of its own."""
    report = {}
    for name in CASES:
        command = [sys.executable, str(Path(__file__)), name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        before, highest = map(float, done.stdout.split()[-2:])
        report[name] = {"gb_before": before, "gb_at_most": highest}
    return {"memory": report}


def backbone(device: str, repeats: int, batch: int = 8) -> dict:
    """Share of the peak of a matrix product that ResNet-50 reaches with one image and with a batch."""
    model, peak, report = build("paper", device).eval(), matmul_peak(device, torch.float32), {}
    for images in (1, batch):
        pixels = torch.randn(images, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter:
            model.extract_features(pixels)
        seconds = median_seconds(lambda pixels=pixels: model.extract_features(pixels), repeats)
        share = counter.get_total_flops() / seconds / peak
        report[f"{images} images"] = {"seconds": seconds, "share_of_matmul_peak": share}
    return {"backbone": report}


def leaving(repeats: int) -> dict:
    """Descriptions of every place of the deepest layer but one by the shipped checkpoints, with and without rows that leave."""
    report = {}
    for name in ("photos", "shapes"):
        model, processor = load(name, "cpu")
        files = sorted(map(str, EXAMPLES.glob("*.jpg")))
        scenes = [make_scene(7, index) for index in range(len(files))]
        pixels = processor(images=files)["pixel_values"] if name == "photos" else pixel_values(processor, scenes)
        features = model.extract_features(pixels)

        def describe(model: DevilModel = model, features: list = features) -> torch.Tensor:
            return model.describe(feature_maps=features, layers=-2, locations="all").sequences

        ours, seconds, whole = describe(), [], []
        for _ in range(repeats):
            seconds.append(timed(describe)[0])
            kept = COMPANIONS.pop("decoding")
            taken, theirs = timed(describe)
            COMPANIONS["decoding"] = kept
            whole.append(taken)
        lengths = model.word_mask(ours).sum(dim=1).float()
        report[f"{name}, {len(ours)} places of {len(files)} images"] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(whole) / statistics.median(seconds),
            "same": torch.equal(ours, theirs),
            "tokens_on_average": lengths.mean().item(),
            "tokens_of_the_longest": ours.shape[1],
        }
    return {"leaving": report}


def main():
    parser = argparse.ArgumentParser(description="GB that a process holds before and while it makes maps.")
    parser.add_argument("case", choices=CASES)
    shape, side, phrases, longest = CASES[parser.parse_args().case]
    torch.set_num_threads(1)
    model = build(shape, "cpu").eval()
    features, texts = features_of(model, 1, side), phrases_of(phrases, longest)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = peak_resident_memory()
    model.attribute(phrases=texts, feature_maps=features, layers=-1)
    print(before, peak_resident_memory())


if __name__ == "__main__":
    main()
