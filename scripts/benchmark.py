"""How fast is it? The paper's shape with random weights, beside one location at a time, in one run.

    python scripts/benchmark.py attribution     phrases mapped over the deepest layer's grid (ResNet-50: 7 x 7)
    python scripts/benchmark.py describe        every location of that grid described
    python scripts/benchmark.py coarse          maps from coarse to fine beside exact ones, at 56 x 56, see benchmark_coarse.py
    python scripts/benchmark.py laws            cost of maps against places, phrases, images, layers, see benchmark_laws.py
    python scripts/benchmark.py prices          questions beside a Grad-CAM, see there
    python scripts/benchmark.py memory          what processes hold while they make maps, see there
    python scripts/benchmark.py backbone        one image and a batch of them through ResNet-50, see there
    python scripts/benchmark.py leaving         descriptions of places that end early, see there
    python scripts/benchmark.py training        one training step, see benchmark_training.py
    python scripts/benchmark.py evidence        a sentence explained word by word, see benchmark_evidence.py
    python scripts/benchmark.py cost            what training on CC3M takes, see training_cost.py
    python scripts/benchmark.py start           help, import and first description, see benchmark_start.py
    python scripts/benchmark.py quickstart      whole quickstarts, see benchmark_start.py
    python scripts/benchmark.py                 the first two

The naive loop does what the method's equations say, for one location after another: all the layer tokens computed and the hidden
ones masked, the whole of each phrase behind its prefix, logits at every position. Both sides share the frozen backbone's
features, run in fp32 with the same threads, and are timed alternately; ratios are of medians, on CPUs of CPU seconds, which other
processes disturb least. With `--sample N` the loop asks every N-th location, and its seconds are counted for all. Beside our fp32
stand bf16 weights, where the device computes faster with them, and on CPUs `quantize="int8"`. FLOPs are counted by torch in our
fp32 run, the peak is that of one large matrix product, in the same seconds.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmark_coarse import coarse
from benchmark_evidence import evidence
from benchmark_laws import backbone, laws, leaving, memory, prices
from benchmark_start import ROOT, quickstart, start
from benchmark_training import bf16_pays, build, training
from torch.utils.flop_counter import FlopCounterMode
from training_cost import cost
from transformers.utils import logging

from devil_hf import DevilModel
from devil_hf.checkpoints.quantised import quantise

PHRASES = [[5, 120, 9], [5, 77, 2201], [8, 19, 31], [40, 1200, 7], [40, 11, 3]]  # five of three tokens
SUBJECTS = (
    *("attribution", "describe", "coarse", "laws", "prices", "memory", "backbone", "leaving", "training"),
    *("evidence", "cost", "start", "quickstart"),
)
LENGTHS = (4, 1, 6, 2, 3, 5, 2, 4, 1, 3, 6, 2, 5, 3, 1, 4, 2, 6, 3, 5)  # twenty that begin with one of four words
RAGGED = [[(7, 90, 411, 1300)[k % 4], *range(50 + 20 * k, 49 + 20 * k + length)] for k, length in enumerate(LENGTHS)]


# ------------------------------------------------------------------------------------------------------ the naive loop


def naive_prefixes(model: DevilModel, features: list[torch.Tensor], sample: int) -> Iterable[torch.Tensor]:
    """Prefixes of the deepest layer's locations, one by one, every `sample`-th of them."""
    H, W = features[-1].shape[-2:]
    mask = torch.tensor([[True] * (len(features) - 1) + [False]], device=features[0].device)
    for row, column in islice(((row, column) for row in range(H) for column in range(W)), 0, None, sample):
        pooled = [maps.mean(dim=(2, 3)) for maps in features[:-1]] + [features[-1][:, :, row, column]]
        yield model.translator(pooled, mask)


def naive_start(model: DevilModel, prefix: torch.Tensor) -> torch.Tensor:
    bos = model.get_input_embeddings()(torch.tensor([[model.config.bos_token_id]], device=prefix.device))
    return torch.cat([bos, prefix], dim=1)


@torch.no_grad()
def naive_attribution(model: DevilModel, features: list[torch.Tensor], phrases: list[list[int]], sample: int) -> torch.Tensor:
    """Summed log-probabilities (locations, phrases)."""
    scores = []
    for prefix in naive_prefixes(model, features, sample):
        start = naive_start(model, prefix)
        for phrase in phrases:
            tokens = torch.tensor(phrase, device=prefix.device)
            embeds = torch.cat([start, model.get_input_embeddings()(tokens[None])], dim=1)
            log_probs = model.language_model(inputs_embeds=embeds).logits[0, start.shape[1] - 1 : -1].log_softmax(dim=-1)
            scores.append(log_probs.gather(-1, tokens[:, None]).sum())
    return torch.stack(scores).view(-1, len(phrases))


@torch.no_grad()
def naive_describe(model: DevilModel, features: list[torch.Tensor], words: int, sample: int) -> torch.Tensor:
    """Greedy descriptions (locations, words)."""
    rows = []
    for prefix in naive_prefixes(model, features, sample):
        start = naive_start(model, prefix)
        mask = torch.ones(start.shape[:2], dtype=torch.long, device=start.device)
        options = {"attention_mask": mask, "max_new_tokens": words, "do_sample": False}
        rows.append(model.language_model.generate(inputs_embeds=start, **options)[0])
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------- measuring


def our_attribution(model: DevilModel, features: list[torch.Tensor], phrases: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, phrases))
    ids = torch.tensor([[*phrase, *[0] * (longest - len(phrase))] for phrase in phrases])
    mask = torch.tensor([[1] * len(phrase) + [0] * (longest - len(phrase)) for phrase in phrases])
    text = {"input_ids": ids, "attention_mask": mask}
    maps = model.attribute(phrases=text, feature_maps=features, layers=-1, measure="sum").maps
    return next(iter(maps.values()))[0].flatten(1).T  # (locations, phrases)


def our_describe(model: DevilModel, features: list[torch.Tensor], words: int) -> torch.Tensor:
    return model.describe(feature_maps=features, layers=-1, locations="all", max_new_tokens=words).sequences


def seconds_of(function: Callable, *arguments) -> tuple[float, float, Any]:
    """CPU seconds of this process, seconds of the clock, and what the function returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def peak(device: str) -> float:
    """FLOP of a large fp32 matrix product in a CPU second (on a GPU: a second), the best of several."""
    size, clock = (1024, 0) if device == "cpu" else (8192, 1)
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / min(seconds_of(torch.mm, left, right)[clock] for _ in range(9))


def compare(naive: Callable, ours: dict[str, Callable], device: str, repeats: int, sample: int, places: int) -> dict:
    """Median seconds of the loop and of ours, by the kind of weights, run in turn after a warm-up that counts FLOPs; ratios; and
    what they answered."""
    with FlopCounterMode(display=False) as counter:
        ours["fp32"]()
    for name in ours.keys() - {"fp32"}:
        ours[name]()
    sides = {"naive": naive} | ours
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    answers = {}
    peaks = []
    for _ in range(repeats):
        peaks.append(peak(device))
        for name, function in sides.items():
            *seconds, answers[name] = seconds_of(function)
            share = places / len(answers[name]) if name == "naive" else 1.0
            taken[name].append((seconds[0] * share, seconds[1] * share))
    cpu, wall = ({name: statistics.median(one[i] for one in runs) for name, runs in taken.items()} for i in (0, 1))
    counted = cpu if device == "cpu" else wall
    flops = counter.get_total_flops()
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "ratio": {name: counted["naive"] / counted[name] for name in ours},
        "gflop": flops / 1e9,
        "share_of_matmul_peak": flops / counted["fp32"] / max(peaks),
        "answers": {name: answer if name == "naive" else answer[::sample] for name, answer in answers.items()},
    }


def attribution(models: dict[str, DevilModel], features: list[torch.Tensor], repeats: int, sample: int) -> dict:
    """Maps of one phrase, of five, and of twenty of one to six tokens, over the deepest layer's grid."""
    report: dict = {}
    places = features[-1][0, 0].numel()
    device = features[0].device.type
    for name, phrases in (("1 phrase", PHRASES[:1]), ("5 phrases", PHRASES), ("20 ragged phrases", RAGGED)):
        found = compare(
            partial(naive_attribution, models["fp32"], features, phrases, sample),
            {kind: partial(our_attribution, model, features, phrases) for kind, model in models.items()},
            device,
            repeats,
            sample,
            places,
        )
        answers, lengths = found.pop("answers"), torch.tensor([len(phrase) for phrase in phrases], device=features[0].device)
        differences = {kind: (answers[kind] - answers["naive"]).abs() / lengths for kind in models}
        found["nats_per_token_at_most"] = {kind: one.max().item() for kind, one in differences.items()}
        found["nats_per_token_on_average"] = {kind: one.mean().item() for kind, one in differences.items()}
        report[name] = found
    return {"attribution": report}


def describe(models: dict[str, DevilModel], features: list[torch.Tensor], repeats: int, sample: int, words: int) -> dict:
    """Every location of the deepest layer's grid described in so many words."""
    places = features[-1][0, 0].numel()
    found = compare(
        partial(naive_describe, models["fp32"], features, words, sample),
        {kind: partial(our_describe, model, features, words) for kind, model in models.items()},
        features[0].device.type,
        repeats,
        sample,
        places,
    )
    answers = found.pop("answers")
    same = {kind: (answers[kind] == answers["naive"]).float() for kind in models}
    found["same_descriptions"] = {kind: one.amin(dim=1).mean().item() for kind, one in same.items()}
    return {f"{places} descriptions of {words} words": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"{', '.join(SUBJECTS)} (default: the first two)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--words", type=int, default=12, help="words of each description (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=1, help="every N-th question of the loop (default: all)")
    parser.add_argument("--before", type=Path, help="of start and quickstart: a checkout to run in turn with this one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    arguments = parser.parse_args()
    subjects = arguments.what or SUBJECTS[:2]
    if unknown := sorted(set(subjects) - set(SUBJECTS)):
        parser.error(f"unknown subjects {unknown}; there are {', '.join(SUBJECTS)}")
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    report = {"threads": arguments.threads, "device": arguments.device, "instructions": torch.backends.cpu.get_cpu_capability()}
    checkouts = {"now": ROOT} | ({"before": arguments.before} if arguments.before else {})
    for name, measure in (("start", start), ("quickstart", quickstart)):
        if name in subjects:
            report[name] = measure(checkouts, arguments.threads, arguments.repeats)
    if "training" in subjects:
        report |= training(arguments.device, arguments.threads, arguments.repeats)
    if "evidence" in subjects:
        report |= evidence(arguments.repeats, arguments.sample)
    if "cost" in subjects:
        report |= cost(arguments.device, arguments.repeats)
    if "coarse" in subjects:
        report |= coarse(arguments.repeats)
    if "laws" in subjects:
        report |= laws(arguments.repeats)
    if "prices" in subjects:
        report |= prices(arguments.device, arguments.repeats)
    if "memory" in subjects:
        report |= memory()
    if "backbone" in subjects:
        report |= backbone(arguments.device, arguments.repeats)
    if "leaving" in subjects:
        report |= leaving(arguments.repeats)
    if {"attribution", "describe"} & set(subjects):
        # Without an EOS every description has the length asked for.
        model = build("paper", arguments.device, eos_token_id=None).eval()
        models = {"fp32": model}
        if bf16_pays(arguments.device):
            models["bf16"] = copy.deepcopy(model).to(torch.bfloat16)
        if arguments.device == "cpu":
            models["int8"] = quantise(copy.deepcopy(model))
        with torch.no_grad():
            features = model.extract_features(torch.randn(1, 3, 224, 224, device=arguments.device))
    if "attribution" in subjects:
        report |= attribution(models, features, arguments.repeats, arguments.sample)
    if "describe" in subjects:
        report |= describe(models, features, arguments.repeats, arguments.sample, arguments.words)
    if arguments.json:
        print(json.dumps(report))
        return
    print_report(report)


def print_report(report: dict, within: str = ""):
    """A line for each figure; those of a part behind its name."""
    for name, value in report.items():
        whole = f"{within}{name}"  # the name may be a number
        if isinstance(value, dict):
            print_report(value, f"{whole} ")
        else:
            print(f"{whole:44} {value:.4g}" if isinstance(value, float) else f"{whole:44} {value}")


if __name__ == "__main__":
    main()
