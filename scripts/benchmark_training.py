"""One training step beside the same step written naively; `python scripts/benchmark.py training` runs it.

Naive: pixels through the backbone in every step, a Python loop over images for location dropout, every position through
every block of the translator, logits at every position, everything in fp32, AdamW as it comes. Ours is what the trainer
runs: `DevilModel.forward` in training mode (captions in groups of like length on a CPU, logits where labels are, none returned)
and fused AdamW, on pixels or on cached features, in fp32 or under bf16 autocast. Captions are of 20 tokens, and once more at the
small shape of 5 to 20, which the naive step pads to the longest. All share one model; they are run in turn after a warm-up, and
times are medians of CPU seconds, or on a GPU of the clock. A device that computes slower in bf16 than in fp32 gets one bf16 step
of each kind, without a warm-up. Peak memory is that of a process of its own for each, from its start.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from devil_hf import DevilModel
from devil_hf.build import from_backbone_and_language_model
from devil_hf.training.draws import layer_dropout

CAPTION_TOKENS, SHORTEST = 20, 5
VARIANTS = ("naive", "fp32", "fp32_cached", "bf16", "bf16_cached")
SHAPES = ("paper", "small")
SMALL_TRANSLATOR = {
    "translator_width": 256,
    "translator_depth": 2,
    "translator_heads": 4,
    "translator_feed_forward": 512,
    "prefix_length": 8,
    "normalize_features": True,
}


def build(shape: str, device: str, eos_token_id: int | None = 2) -> DevilModel:
    """The paper's shape (ResNet-50, 12 x 768, OPT-125M) or the small one of the recipe flickr8k_small, with random weights."""
    torch.manual_seed(0)
    if shape == "paper":
        backbone, fields = timm.create_model("resnet50", num_classes=0), {}
        config = OPTConfig(bos_token_id=2, eos_token_id=eos_token_id, pad_token_id=1)  # its defaults are OPT-125M's sizes
    else:
        backbone, fields = timm.create_model("mobilenetv2_100", num_classes=0), SMALL_TRANSLATOR
        config = GPT2Config(vocab_size=4000, n_embd=256, n_layer=4, n_head=4, n_positions=128, bos_token_id=1)
        config.eos_token_id = eos_token_id
    language_model = AutoModelForCausalLM.from_config(config)
    return from_backbone_and_language_model(backbone, language_model, **fields).to(device)


# ------------------------------------------------------------------------------------------------------ the naive step


def naive_loss(
    model: DevilModel, pixel_values: torch.Tensor, input_ids: torch.Tensor, dropout: bool = True, lengths: list[int] | None = None
):
    """Caption loss as the method's equations are written down; captions end after `lengths` tokens where they are given."""
    with torch.no_grad():
        features = model.backbone(pixel_values)
    pooled = []
    for maps in features:
        rows = []
        for image in maps:
            places = image.flatten(1)  # (C, H * W)
            keep = torch.rand(places.shape[1], device=places.device) >= 0.5
            if not dropout:
                keep[:] = True
            elif not keep.any():
                keep[torch.randint(len(keep), ())] = True
            rows.append(places[:, keep].mean(dim=1))
        pooled.append(torch.stack(rows))
    count = len(features)
    mask = layer_dropout(len(input_ids), count, 0.5 if dropout else 0.0, 0.0, device=input_ids.device)
    translator = model.translator
    tokens = [translator.projections[i](translator.feature_norms[i](z)) for i, z in enumerate(pooled)]
    tokens = torch.stack(tokens, dim=1) + translator.layer_embedding
    sequence = torch.cat([tokens, translator.queries.expand(len(input_ids), -1, -1)], dim=1)
    shown = F.pad(~mask, (0, translator.queries.shape[0]), value=True)[:, None, None]
    for block in translator.blocks:
        sequence = block(sequence, shown)
    prefix = translator.output(translator.norm(sequence))[:, count:]
    config = model.config
    start = torch.full((len(input_ids), 1), config.bos_token_id, device=input_ids.device)
    end = torch.full((len(input_ids), 1), config.eos_token_id, device=input_ids.device)
    embed, words = model.get_input_embeddings(), torch.cat([input_ids, end], dim=1)
    wanted, read = words.clone(), torch.ones_like(words)
    for row, length in enumerate(lengths or []):
        words[row, length] = wanted[row, length] = config.eos_token_id
        wanted[row, length + 1 :] = -100
        read[row, length + 1 :] = 0
    embeds = torch.cat([embed(start), prefix, embed(words)], dim=1)
    before = embeds.shape[1] - words.shape[1]
    labels, mask = F.pad(wanted, (before, 0), value=-100), F.pad(read, (before, 0), value=1)
    return model.language_model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss


# ---------------------------------------------------------------------------------------------------------- measuring


def make_steps(
    model: DevilModel, variants: list[str], batch: int, device: str, ragged: bool = False
) -> dict[str, Callable[[], None]]:
    """One function per variant that trains one step; on captions of different lengths where they are to be ragged."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(batch, 3, 224, 224, generator=generator).to(device)
    ours_pixels = pixel_values.to(memory_format=torch.channels_last)
    table = model.get_input_embeddings().weight.shape[0]
    input_ids = torch.randint(3, table, (batch, CAPTION_TOKENS), generator=generator).to(device)
    lengths = torch.randint(SHORTEST if ragged else CAPTION_TOKENS, CAPTION_TOKENS + 1, (batch,), generator=generator)
    mask = (torch.arange(CAPTION_TOKENS) < lengths[:, None]).long().to(device)
    cached = [torch.randn(batch, channels, generator=generator).to(device) for channels in model.backbone.channels]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    naive_optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=1e-6) if "naive" in variants else None
    optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=1e-6, fused=True)

    def naive():
        naive_loss(model, pixel_values, input_ids, lengths=lengths.tolist()).backward()
        naive_optimizer.step()
        naive_optimizer.zero_grad()

    def ours(bf16: bool, inputs: dict):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=input_ids, attention_mask=mask, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    steps: dict[str, Callable[[], None]] = {"naive": naive}
    for name in VARIANTS[1:]:
        inputs = {"pooled_features": cached} if name.endswith("cached") else {"pixel_values": ours_pixels}
        steps[name] = partial(ours, name.startswith("bf16"), inputs)
    return {name: steps[name] for name in variants}


def timed(function: Callable, *arguments) -> tuple[float, Any]:
    """CPU seconds, or on a GPU seconds of the clock, and what the function returns."""
    if not torch.cuda.is_available():
        began = time.process_time()
        result = function(*arguments)
        return time.process_time() - began, result
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = function(*arguments)
    torch.cuda.synchronize()
    return time.perf_counter() - began, result


def bf16_pays(device: str) -> bool:
    """Whether a linear layer of the paper's shape runs faster in bf16: not on CPUs without instructions for it."""
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = torch.randn(512, 768, dtype=dtype, device=device)
        weight = torch.randn(3072, 768, dtype=dtype, device=device)
        fastest[dtype] = min(timed(F.linear, inputs, weight)[0] for _ in range(5))
    return fastest[torch.bfloat16] < fastest[torch.float32]


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product, the best of several."""
    size = 8192 if device != "cpu" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    return 2 * size**3 / min(timed(torch.mm, left, right)[0] for _ in range(5))


def same_loss(model: DevilModel, device: str) -> float:
    """Largest difference between the two losses of ragged captions when nothing is dropped."""
    pixel_values = torch.randn(2, 3, 224, 224, device=device)
    input_ids = torch.randint(3, 1000, (2, CAPTION_TOKENS), device=device)
    mask = torch.ones_like(input_ids)
    mask[1, SHORTEST:] = 0
    with torch.no_grad():
        ours = model.eval()(pixel_values, input_ids, mask).loss
        return (ours - naive_loss(model, pixel_values, input_ids, False, [CAPTION_TOKENS, SHORTEST])).abs().item()


def peak_memory(variant: str, shape: str, batch: int, device: str, threads: int) -> float:
    """GB of a process of its own that trains two steps."""
    command = [sys.executable, str(Path(__file__)), variant, shape, str(batch), device, str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.split()[-1])


def measure(shape: str, device: str, threads: int, repeats: int, batch: int, ragged: bool = False) -> dict:
    """Times, speed-ups over the naive step and peak memory at one shape."""
    model = build(shape, device)
    report: dict = {"loss_difference": same_loss(model, device)}
    steps = make_steps(model.train(), list(VARIANTS), batch, device, ragged)
    peak = matmul_peak(device, torch.bfloat16 if device != "cpu" else torch.float32)
    slow = set() if bf16_pays(device) else {name for name in VARIANTS if name.startswith("bf16")}
    turns = [name for _ in range(repeats + 1) for name in VARIANTS if name not in slow] + sorted(slow)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name in tqdm(turns, desc=f"steps of the {shape} shape", unit="step"):
        times[name].append(timed(steps[name])[0])
    times = {name: values if name in slow else values[1:] for name, values in times.items()}
    seconds = {name: statistics.median(values) for name, values in times.items()}
    report["seconds"] = seconds
    report["bf16_pays"] = not slow
    report["images_per_second"] = {name: batch / value for name, value in seconds.items()}
    report |= {f"speedup_{name}": seconds["naive"] / seconds[name] for name in VARIANTS[1:]}
    with FlopCounterMode(display=False) as counter:
        steps["fp32"]()
    report["share_of_matmul_peak"] = counter.get_total_flops() / seconds["bf16" if device != "cpu" else "fp32"] / peak
    if ragged:
        return report
    del model, steps
    memory = {name: peak_memory(name, shape, batch, device, threads) for name in ("naive", "fp32", "fp32_cached")}
    report["peak_memory_gb"] = memory
    report["memory_ratio"] = memory["fp32"] / memory["naive"]
    report["memory_ratio_cached"] = memory["fp32_cached"] / memory["naive"]
    return report


def training(device: str, threads: int, repeats: int, batch: int = 8, small_batch: int = 64) -> dict:
    """The paper's shape, and under `small` and `ragged` the small one, with captions of one length and of many."""
    return measure("paper", device, threads, repeats, batch) | {
        "small": measure("small", device, threads, repeats, small_batch),
        "ragged": measure("small", device, threads, repeats, small_batch, ragged=True),
        "batch": batch,
        "small_batch": small_batch,
    }


def main():
    parser = argparse.ArgumentParser(description="Peak memory in GB of a process that trains two steps.")
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("batch", type=int)
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = build(arguments.shape, arguments.device).train()
    step = make_steps(model, [arguments.variant], arguments.batch, arguments.device)[arguments.variant]
    step()
    step()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:
        print(peak_resident_memory())


def peak_resident_memory() -> float:
    """GB, on Linux. `getrusage` would give the parent's peak where that is higher: it survives the start of a new program."""
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main()
