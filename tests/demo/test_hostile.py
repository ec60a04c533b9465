"""Repositories of strangers, loaded through the page: refused with a reason, or answered; nothing of this machine gets out."""

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from devil_hf.checkpoints import locate
from tests.demo.conftest import GOOD, SECRET

CONFIG = json.loads(GOOD["config.json"])
RUNS = "from pathlib import Path\nPath({marker!r}).touch()\nraise SystemExit\n"


def changed(*path, **values) -> dict[str, bytes]:
    """A configuration with other values somewhere inside."""
    config = copy.deepcopy(CONFIG)
    inner = config
    for name in path:
        inner = inner[name]
    inner |= values
    return {"config.json": json.dumps(config).encode()}


def slim(backbone: object, language_model: object = "tester/private") -> dict[str, bytes]:
    config = copy.deepcopy(CONFIG)
    config["backbone_config"] |= {"source": backbone, "revision": "main", "sha256": "0" * 64}
    config |= {
        "frozen_weights": "reference",
        "language_model_source": {"source": language_model, "revision": "main", "sha256": "0"},
    }
    return {"config.json": json.dumps(config).encode()}


def weights(change) -> dict[str, bytes]:
    tensors = load(GOOD["model.safetensors"])
    change(tensors)
    return {"model.safetensors": save(tensors, metadata={"format": "pt"})}


def processor(**values) -> dict[str, bytes]:
    settings = json.loads(GOOD["processor_config.json"])
    settings["image_processor"] |= values
    return {"processor_config.json": json.dumps(settings).encode()}


WEIGHT = "translator.output.weight"
HERE = str(Path(__file__).resolve())
HOSTILE = {
    # What a configuration may name
    "file_of_weights": changed("backbone_config", "kwargs", checkpoint_path=HERE),
    "folder_of_cache": changed("backbone_config", "kwargs", cache_dir="/tmp/devil-elsewhere"),
    "private_in_overlay": changed("backbone_config", "kwargs", pretrained_cfg_overlay={"hf_hub_id": "tester/private"}),
    "pretrained": changed("backbone_config", "kwargs", pretrained=True),
    "repository_as_architecture": changed("backbone_config", architecture="hf-hub:tester/private"),
    "folder_as_architecture": changed("backbone_config", architecture=f"local-dir:{locate('shapes')}"),
    "no_architecture": changed("backbone_config", architecture="no_such_network"),
    "any_class": changed("backbone_config", kind="transformers", model_class="transformers.Trainer", model_config={}),
    "any_module": changed("backbone_config", kind="transformers", model_class="os.system", model_config={}),
    "living_module": changed("backbone_config", kind="custom"),
    "kernels": changed("text_config", _attn_implementation="tester/private"),
    "private_source": slim("tester/private"),
    "private_language_model": slim("tester/public", "tester/private"),
    "timm_source": slim("resnet10t.c3_in1k"),
    "folder_source": slim(str(locate("shapes"))),
    "local_source": slim(f"local-dir:{locate('shapes')}"),
    "climbing_source": slim("../../etc"),
    "address_source": slim("http://127.0.0.1:9/x"),
    "source_of_no_kind": slim(["tester/private"], {"a": 1}),
    "other_model": {"config.json": json.dumps({"model_type": "bert"}).encode()},
    # Numbers
    "million_layers": changed("text_config", n_layer=1_000_000),
    "million_blocks": changed("backbone_config", "kwargs", layers=[1, 1, 1_000_000, 1]),
    "deep_translator": changed(translator_depth=1_000_000),
    "deep_and_allowed": changed("text_config", n_layer=9_000),
    "wide": changed("text_config", n_embd=4_000_000),
    "long": changed("text_config", n_positions=10**9),
    "many_words": changed("text_config", vocab_size=10**9),
    "long_prefix": changed(prefix_length=90),
    "negative": changed(prefix_length=-1),
    "text_for_a_number": changed(translator_width="wide"),
    "newer": changed(format_version=10**6),
    "huge_crop": processor(crop_size={"height": 100_000, "width": 100_000}),
    "no_crop": processor(crop_pct=1e-320),
    "processor_of_others": processor(image_processor_type="CLIPImageProcessor"),
    # Weights
    "nan": weights(lambda tensors: tensors[WEIGHT].fill_(torch.nan)),
    "lacking": weights(lambda tensors: tensors.pop(WEIGHT)),
    "misshapen": weights(lambda tensors: tensors.update({WEIGHT: torch.zeros(3, 3, dtype=torch.float16)})),
    "cut": {"model.safetensors": GOOD["model.safetensors"][:100_000]},
    "no_safetensors": {"model.safetensors": b"root:x:0:0:root" * 100},
    "huge_head": {"model.safetensors": (2**62).to_bytes(8, "little") + b"{}"},
    "no_weights": {"model.safetensors": None},
    "pickles_only": {"model.safetensors": None, "pytorch_model.bin": b"\x80\x04cos\nsystem\n."},
    # Files
    "no_config": {"config.json": None},
    "no_json": {"config.json": b"../../../../etc/passwd"},
    "list_config": {"config.json": b"[]"},
    "deep_json": {"config.json": b"[" * 200_000},
    "no_tokenizer": {"tokenizer.json": b"{}"},
    "tokenizer_of_files": {
        "tokenizer_config.json": json.dumps({"tokenizer_class": "BertTokenizer", "vocab_file": HERE}).encode()
    },
    "many_files": {f"f{number}.json": b"{}" for number in range(200)},
}
# What these ask for is not read; they answer as the good one does. All others are refused.
HARMLESS = {"kernels", "tokenizer_of_files"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repository_is_refused_or_answers_and_nothing_gets_out(owner, visitor, kind, tmp_path):
    marker = tmp_path / "ran"
    code = {
        f"{name}.py": RUNS.format(marker=str(marker)).encode() for name in ("configuration_devil", "modeling_devil", "__init__")
    }
    files = GOOD | code | HOSTILE[kind] | {"../../escaped.json": b"{}", "folder/inner.json": b"{}"}
    name = f"tester/{kind}"
    owner.plant(name, {path: data for path, data in files.items() if data is not None})
    assert visitor.ask("start")[0]
    began = time.monotonic()
    succeeded, output = visitor.ask("load", None, "layer3", name)
    said = json.dumps(output)
    assert time.monotonic() - began < 30
    assert succeeded == (kind in HARMLESS), said[:500]
    assert owner.requests and not any(owner.authorizations), "a visitor's load carries no token"
    assert not marker.exists(), "no code of a repository runs"
    assert not list(tmp_path.rglob("escaped.json")) and not list(tmp_path.rglob("inner.json"))
    for inner in ("Traceback", str(tmp_path), HERE, str(locate("shapes")), "root:", SECRET, "hf_tester"):
        assert inner not in said
    if not succeeded:
        assert output["error"] and "log says why" not in output["error"], "a refusal says why"
        assert name in output["error"]
    assert visitor.ask("choose_layer", None, "layer2")[0], "the page goes on with what it had"
