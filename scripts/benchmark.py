"""How fast is it? The paper's shape with random weights, beside one location at a time, in one run.

    python scripts/benchmark.py attribution     phrases mapped over the deepest layer's grid (ResNet-50: 7 x 7)
    python scripts/benchmark.py describe        every location of that grid described
    python scripts/benchmark.py training        one training step, see benchmark_training.py
    python scripts/benchmark.py evidence        a sentence explained word by word, see benchmark_evidence.py
    python scripts/benchmark.py cost            what training on CC3M takes, see training_cost.py
    python scripts/benchmark.py start           help, import and first description, see benchmark_start.py
    python scripts/benchmark.py quickstart      whole quickstarts, see benchmark_start.py
    python scripts/benchmark.py                 the first two

The naive loop does what the method's equations say, for one location after another: all the layer tokens computed and the hidden
ones masked, the whole of each phrase behind its prefix, logits at every position. Both sides share the frozen backbone's
features, run in fp32 with the same threads, and are timed alternately; ratios are of medians. "Fast" is bf16 weights where the
device computes faster in bf16 than in fp32, else plain fp32 once more.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from benchmark_evidence import evidence
from benchmark_start import ROOT, quickstart, start
from benchmark_training import bf16_pays, build, timed, training
from training_cost import cost
from transformers.utils import logging

from devil_hf import DevilModel

SUBJECTS = ("attribution", "describe", "training", "evidence", "cost", "start", "quickstart")
PHRASES = torch.tensor([[5, 120, 9], [5, 77, 2201], [8, 19, 31], [40, 1200, 7], [40, 11, 3]])  # five of three tokens


# ------------------------------------------------------------------------------------------------------ the naive loop


def naive_prefixes(model: DevilModel, features: list[torch.Tensor]):
    """Prefixes of the deepest layer's locations, one by one."""
    H, W = features[-1].shape[-2:]
    mask = torch.tensor([[True] * (len(features) - 1) + [False]], device=features[0].device)
    for row in range(H):
        for column in range(W):
            pooled = [maps.mean(dim=(2, 3)) for maps in features[:-1]] + [features[-1][:, :, row, column]]
            yield model.translator(pooled, mask)


def naive_start(model: DevilModel, prefix: torch.Tensor) -> torch.Tensor:
    bos = model.get_input_embeddings()(torch.tensor([[model.config.bos_token_id]], device=prefix.device))
    return torch.cat([bos, prefix], dim=1)


@torch.no_grad()
def naive_attribution(model: DevilModel, pixel_values: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
    """Summed log-probabilities (locations, phrases)."""
    scores = []
    for prefix in naive_prefixes(model, model.backbone(pixel_values)):
        for phrase in phrases:
            start = naive_start(model, prefix)
            words = model.get_input_embeddings()(phrase[None])
            logits = model.language_model(inputs_embeds=torch.cat([start, words], dim=1)).logits
            log_probs = logits[0, start.shape[1] - 1 : -1].log_softmax(dim=-1)
            scores.append(log_probs.gather(-1, phrase[:, None]).sum())
    return torch.stack(scores).view(-1, len(phrases))


@torch.no_grad()
def naive_describe(model: DevilModel, pixel_values: torch.Tensor, words: int) -> torch.Tensor:
    """Greedy descriptions (locations, words)."""
    rows = []
    for prefix in naive_prefixes(model, model.backbone(pixel_values)):
        start = naive_start(model, prefix)
        rows.append(
            model.language_model.generate(
                inputs_embeds=start,
                attention_mask=torch.ones(start.shape[:2], dtype=torch.long, device=start.device),
                max_new_tokens=words,
                do_sample=False,
            )[0]
        )
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------- measuring


def our_attribution(model: DevilModel, pixel_values: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
    maps = model.attribute(pixel_values, {"input_ids": phrases}, layers=-1, measure="sum").maps
    return next(iter(maps.values()))[0].flatten(1).T  # (locations, phrases)


def our_describe(model: DevilModel, pixel_values: torch.Tensor, words: int) -> torch.Tensor:
    return model.describe(pixel_values, layers=-1, locations="all", max_new_tokens=words).sequences


def compare(naive, ours, fast, arguments, repeats: int) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Median seconds of the three, run in turn after a warm-up of each fast one."""
    ours(*arguments)
    fast(*arguments)
    seconds: dict[str, list[float]] = {"naive": [], "ours": [], "fast": []}
    for _ in range(repeats):
        for name, function in (("naive", naive), ("ours", ours), ("fast", fast)):
            elapsed, result = timed(function, *arguments)
            seconds[name].append(elapsed)
            if name == "naive":
                expected = result
            elif name == "ours":
                found = result
            else:
                approximate = result
    return {name: statistics.median(values) for name, values in seconds.items()}, expected, found, approximate


def attribution(model: DevilModel, fast_model: DevilModel, pixel_values: torch.Tensor, repeats: int) -> dict:
    report: dict = {}
    for count in (1, 5):
        phrases = PHRASES[:count].to(pixel_values.device)
        seconds, expected, found, approximate = compare(
            lambda p: naive_attribution(model, pixel_values, p),
            lambda p: our_attribution(model, pixel_values, p),
            lambda p: our_attribution(fast_model, pixel_values, p),
            (phrases,),
            repeats,
        )
        plural = "phrase" if count == 1 else "phrases"
        report[f"seconds_{count}_{plural}"] = seconds
        report[f"ratio_{count}_{plural}"] = seconds["naive"] / seconds["ours"]
        report[f"ratio_{count}_{plural}_fast"] = seconds["naive"] / seconds["fast"]
        for name, result in (("max_abs_diff", found), ("max_abs_diff_fast", approximate)):
            difference = (result - expected).abs().max().item() / phrases.shape[1]
            report[name] = max(report.get(name, 0.0), difference)
        report[f"images_per_second_{count}_{plural}"] = 1 / seconds["ours"]
        report[f"phrases_per_second_{count}_{plural}"] = expected.numel() / seconds["ours"]
        report[f"phrases_per_second_{count}_{plural}_fast"] = expected.numel() / seconds["fast"]
    return report


def describe(model: DevilModel, fast_model: DevilModel, pixel_values: torch.Tensor, repeats: int, words: int) -> dict:
    seconds, expected, found, approximate = compare(
        lambda w: naive_describe(model, pixel_values, w),
        lambda w: our_describe(model, pixel_values, w),
        lambda w: our_describe(fast_model, pixel_values, w),
        (words,),
        repeats,
    )
    return {
        "seconds_49_descriptions": seconds,
        "ratio_49_descriptions": seconds["naive"] / seconds["ours"],
        "ratio_49_descriptions_fast": seconds["naive"] / seconds["fast"],
        "same_descriptions": (found == expected).all(dim=1).float().mean().item(),
        "same_descriptions_fast": (approximate == expected).all(dim=1).float().mean().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"{', '.join(SUBJECTS)} (default: the first two)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--words", type=int, default=12, help="words of each description (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=1, help="of evidence: every N-th question of the loop (default: all)")
    parser.add_argument("--before", type=Path, help="of start and quickstart: a checkout to run in turn with this one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    arguments = parser.parse_args()
    subjects = arguments.what or SUBJECTS[:2]
    if unknown := sorted(set(subjects) - set(SUBJECTS)):
        parser.error(f"unknown subjects {unknown}; there are {', '.join(SUBJECTS)}")
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    report = {"threads": arguments.threads, "device": arguments.device}
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
    if {"attribution", "describe"} & set(subjects):
        # Without an EOS every description has the length asked for.
        model = build("paper", arguments.device, eos_token_id=None).eval()
        pays = bf16_pays(arguments.device)
        fast_model = copy.deepcopy(model).to(torch.bfloat16) if pays else model
        report["fast"] = "bf16 weights" if pays else "plain fp32: bf16 is slower on this device"
        pixel_values = torch.randn(1, 3, 224, 224, device=arguments.device)
    if "attribution" in subjects:
        report |= attribution(model, fast_model, pixel_values, arguments.repeats)
    if "describe" in subjects:
        report |= describe(model, fast_model, pixel_values, arguments.repeats, arguments.words)
    if arguments.json:
        print(json.dumps(report))
        return
    print_report(report)


def print_report(report: dict, within: str = ""):
    """A line for each figure; those of a part behind its name."""
    for name, value in report.items():
        if isinstance(value, dict):
            print_report(value, f"{within}{name} ")
        else:
            print(f"{within + name:44} {value:.4g}" if isinstance(value, float) else f"{within + name:44} {value}")


if __name__ == "__main__":
    main()
