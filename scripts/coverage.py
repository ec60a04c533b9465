"""Which networks the package covers, tried one by one.

    python scripts/coverage.py timm [--json PATH]            every timm architecture, shapes only (meta tensors)
    python scripts/coverage.py timm --real                   40 diverse ones, real features of random weights
    python scripts/coverage.py transformers [--json PATH]    every transformers backbone class, random weights

Prints a table, one line per network, and exits with 1 if any fails.
"""

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_BACKBONE_MAPPING, PreTrainedConfig

from devil_hf.build import backbone_from_source
from devil_hf.build.layers import CLASS_SUFFIX
from devil_hf.model.backbone_devil import FeatureBackbone

REAL_TIMM = """
    resnet18 resnet50 seresnet50 resnetv2_50 regnety_002 efficientnet_b0 mobilenetv2_100 mobilenetv3_small_050
    mobilenetv4_conv_small densenet121 vgg11 dla34 hrnet_w18_small inception_v3 dpn48b convnext_atto convnextv2_atto
    focalnet_tiny_srf poolformer_s12 mambaout_femto vit_tiny_patch16_224 deit_tiny_distilled_patch16_224
    vit_small_patch16_dinov3 vit_small_patch14_reg4_dinov2 vit_base_patch32_clip_224 eva02_tiny_patch14_224
    beit_base_patch16_224 vit_base_patch16_siglip_gap_224 naflexvit_base_patch16_gap hiera_tiny_224
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 xcit_nano_12_p16_224 cait_xxs24_224 crossvit_9_240 coat_tiny
    levit_128 mvitv2_small_cls volo_d1_224 efficientformer_l1
"""

# Sizes that let every default configuration of transformers build and run in seconds.
TINY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}

# What a default configuration leaves open.
REQUIRED = {"timm_backbone": {"backbone": "test_resnet"}}


def check_features(backbone: FeatureBackbone) -> dict:
    """Run the chosen layers of a backbone and compare what comes out with what it declares."""
    reference = next(backbone.parameters())
    size = backbone.config["input_size"]
    images = torch.rand(2, *size).to(device=reference.device, dtype=reference.dtype)
    with torch.no_grad():
        maps = backbone(images)
    for name, channels, feature_map in zip(backbone.layers, backbone.channels, maps, strict=True):
        if feature_map.ndim != 4 or feature_map.shape[:2] != (2, channels):
            raise ValueError(f"{name} declares {channels} channels, but has the shape {tuple(feature_map.shape)}")
        if not name.endswith(CLASS_SUFFIX) and not _plausible(size[1:], feature_map.shape[2:]):
            raise ValueError(f"{name} has an implausible grid {tuple(feature_map.shape[2:])} for images of {size[1:]}")
        if not feature_map.is_meta and not feature_map.isfinite().all():
            raise ValueError(f"{name} has features that are not finite")
    grids = [tuple(feature_map.shape[2:]) for feature_map in maps]
    return {"layers": backbone.layers, "channels": backbone.channels, "grids": grids}


def _plausible(size: list[int], grid: torch.Size) -> bool:
    return all(1 <= pixels / cells <= 64 for pixels, cells in zip(size, grid, strict=True))


def check_timm(name: str, real: bool) -> dict:
    """One timm architecture: build, choose layers, read them, with class tokens where the blocks carry one."""
    with torch.device("cpu" if real else "meta"):
        module = timm.create_model(name, num_classes=0)
    smallest = module.pretrained_cfg.get("min_input_size")
    kwargs = {"data_config": {"input_size": list(smallest)}} if real and smallest else {}
    if getattr(module, "num_prefix_tokens", 0):
        backbone = _with_class_tokens(module, kwargs)
    else:
        backbone = backbone_from_source(module, backbone_kwargs=kwargs)
    infos = {backbone.layer_names[index]: info for index, info in enumerate(module.feature_info)}
    found = check_features(backbone)
    for layer, channels, grid in zip(found["layers"], found["channels"], found["grids"], strict=True):
        info = infos[layer.removesuffix(CLASS_SUFFIX)]
        if info["num_chs"] != channels:
            raise ValueError(f"{layer} has {channels} channels, timm declares {info['num_chs']}")
        rows = backbone.config["input_size"][1] / info["reduction"]
        # Convolutions without padding (Inception) lose a few rows at the border.
        if not layer.endswith(CLASS_SUFFIX) and abs(rows - grid[0]) > 1 + rows / 10:
            raise ValueError(f"{layer} has {grid[0]} rows, timm declares a stride of {info['reduction']}")
    return found


def _with_class_tokens(module: nn.Module, kwargs: dict | None = None) -> FeatureBackbone:
    try:
        return backbone_from_source(module, class_tokens=True, backbone_kwargs=kwargs)
    except ValueError as error:  # none, only registers, or a class token that joins after the blocks
        if "class_tokens" not in str(error):
            raise
    return backbone_from_source(module, backbone_kwargs=kwargs)


def check_transformers(config_class: type[PreTrainedConfig]) -> dict:
    """One transformers backbone class from its default configuration, made small where it has the usual fields.

    The configuration takes the way through JSON, as from a checkpoint: some classes fail on the tuples of their defaults.
    """
    required = REQUIRED.get(config_class.model_type, {})
    defaults = config_class(**required)
    fields = required | {name: value for name, value in TINY.items() if isinstance(getattr(defaults, name, None), int)}
    settings = json.loads(config_class(**fields).to_json_string(use_diff=False))
    module = MODEL_FOR_BACKBONE_MAPPING[config_class](config_class.from_dict(settings))
    return check_features(_with_class_tokens(module)) | {"class": type(module).__name__}


def sweep(checks: Iterator[tuple[str, Callable[[], dict]]]) -> list[dict]:
    """Run the checks and print a row per network, with the error of those that fail."""
    rows = []
    for name, check in checks:
        start = time.perf_counter()
        try:
            row = {"name": name, "ok": True} | check()
        except Exception as error:
            row = {"name": name, "ok": False, "error": " ".join(f"{type(error).__name__}: {error}".split())}
        rows.append(row | {"seconds": round(time.perf_counter() - start, 2)})
        print(describe(rows[-1]), flush=True)
    return rows


def timm_rows(options: argparse.Namespace) -> list[dict]:
    def check(name: str) -> dict:
        try:
            return check_timm(name, options.real)
        except RuntimeError as error:  # a few networks look into their tensors
            if "meta tensors" not in str(error):
                raise
            return check_timm(name, real=True)

    names = REAL_TIMM.split() if options.real else timm.list_models(options.filter)
    return sweep((name, functools.partial(check, name)) for name in names)


def transformers_rows(options: argparse.Namespace) -> list[dict]:
    classes = {config.model_type: config for config in CONFIG_MAPPING.values() if config in MODEL_FOR_BACKBONE_MAPPING}
    return sweep((name, functools.partial(check_transformers, c)) for name, c in classes.items())


def describe(row: dict) -> str:
    """One line of the table: the layers of a network as channels x rows x columns, or its error."""
    if not row["ok"]:
        return f"FAIL  {row['name']:40}  {row['error']}"
    columns = zip(row["layers"], row["channels"], row["grids"], strict=True)
    layers = [f"{name} {channels}x{grid[0]}x{grid[1]}" for name, channels, grid in columns]
    return f"ok    {row['name']:40}  {', '.join(layers)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rows, text in (
        ("timm", timm_rows, "every timm architecture"),
        ("transformers", transformers_rows, "every transformers backbone class"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--json", type=Path, help="also write the table to this file")
        command.set_defaults(rows=rows)
        if name == "timm":
            command.add_argument("--real", action="store_true", help="40 diverse ones, real features of random weights")
            command.add_argument("--filter", default="", help="only names that match this pattern, such as 'vit_*'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = options.rows(options)
    failed = [row["name"] for row in rows if not row["ok"]]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} pass" + (f"; failed: {', '.join(failed)}" if failed else ""))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
