"""Configurations and folders of strangers: a checkpoint loads as it was, or is refused by a documented error."""

import copy
import functools
import json
import os
import shutil
import site
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from devil_hf import DevilModel

DOCUMENTED = (OSError, ValueError, TypeError, ImportError)
STRANGE = [
    None,
    True,
    -1,
    0,
    1,
    2**20,
    2**40,
    10**400,
    1e308,
    float("nan"),
    "",
    "x",
    "hf-hub:owner/private",
    "local-dir:/etc",
    "/etc/passwd",
    "../../secret",
    "owner/kernels",
    "timm_wrapper",
    "float8_e4m3fn",
    "load",
    "\x00",
    "é" * 300,
    [],
    {},
    [[]],
    [None],
    {"model_type": "gpt2"},
    {"model_type": "timm_wrapper"},
    {"": 1},
    [2**40] * 3,
]
NAMES = [
    "checkpoint_path",
    "cache_dir",
    "pretrained",
    "pretrained_cfg",
    "_attn_implementation",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "quantization_config",
    "transformers_weights",
    "trust_remote_code",
    "to_dict",
    "__class__",
    "dtype",
    "_name_or_path",
    "num_labels",
    "per_layer_config",
    "model_type",
    "source",
    "kind",
    "by",
    "backbone",
    "file",
    "lora",
    "frozen_weights",
]
values = st.sampled_from(STRANGE) | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.integers(), max_size=3)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    model.save_pretrained(root / "full")
    model.save_pretrained(root / "slim", slim=True)
    model.save_pretrained(root / "shards", max_shard_size="100KB")
    pixels = torch.zeros(1, 3, 64, 64)
    return root, pixels, model.ask(pixels), model


WATCH: dict[str, list[str] | None] = {"events": None}
KNOWN = tuple(
    str(Path(place).resolve()) for place in (*site.getsitepackages(), sys.prefix, sys.base_prefix, Path(__file__).parents[2])
)
HARMLESS = ("/proc/", "/sys/", "/dev/null", "/etc/localtime", "/usr/lib", "/lib")


@functools.cache
def listen():
    """Note, once and for all, what Python opens and whom it calls; nothing is noted unless somebody watches."""

    def hook(name, arguments):
        if WATCH["events"] is not None and name in (
            "open",
            "socket.connect",
            "socket.getaddrinfo",
            "subprocess.Popen",
            "os.exec",
        ):
            WATCH["events"].append(f"{name} {arguments[0]!s}" if name == "open" else name)

    sys.addaudithook(hook)


def load(folder, own):
    """A checkpoint, or the error that it is refused with; a failure where it touched what it must not."""
    listen()
    WATCH["events"] = []
    try:
        return DevilModel.from_pretrained(folder)
    except DOCUMENTED as error:
        event(f"{type(error).__name__}")
        return error
    finally:
        events, WATCH["events"] = WATCH["events"], None
        for one in events:
            what, _, path = one.partition(" ")
            assert what == "open", one
            inside = (*own, *KNOWN, *HARMLESS, str(Path(os.environ.get("HF_HOME", "~/.cache")).expanduser()))
            assert path.isdigit() or path.startswith(inside) or not path.startswith("/"), one


def check(folder, folders, own):
    _, pixels, _, model = folders
    found = load(folder, own)
    if not isinstance(found, Exception):
        answer = found.ask(pixels)
        same = all(
            torch.equal(one, found.state_dict()[name]) for name, one in model.state_dict().items() if name in found.state_dict()
        )
        assert same and answer.isfinite().all()
        event("loaded")
    return found


def places(tree, path=()):
    """Paths of everything in a tree of JSON."""
    yield path
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, branch in branches:
        yield from places(branch, (*path, key))


@given(data=st.data(), kind=st.sampled_from(["full", "slim"]))
def test_a_changed_configuration_loads_the_same_weights_or_is_refused(data, kind, folders):
    root = folders[0]
    config = json.loads((root / kind / "config.json").read_text())
    own = [str(root), *(str(part["source"]) for part in (config["backbone_config"], config["language_model_source"]))]
    changed = copy.deepcopy(config)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from([path for path in places(changed) if path] or [("model_type",)]))
        part = functools.reduce(lambda tree, key: tree[key], way, changed)
        if isinstance(part, dict) and data.draw(st.booleans()):
            last = data.draw(st.sampled_from(NAMES))
        if isinstance(part, dict) and data.draw(st.integers(0, 4)) == 0:
            part.pop(last, None)
        else:
            part[last] = data.draw(values)
    with tempfile.TemporaryDirectory(dir=root) as place:
        for file in (root / kind).glob("*.safetensors"):
            os.link(file, f"{place}/{file.name}")
        Path(place, "config.json").write_text(json.dumps(changed))
        found = load(place, own)
        if not isinstance(found, Exception):
            event("loaded")
            expected = folders[3].state_dict()
            assert all(torch.equal(one, expected[name]) for name, one in found.state_dict().items() if name in expected)


@given(data=st.data(), kind=st.sampled_from(["full", "slim", "shards"]))
def test_a_damaged_folder_is_refused_or_whole(data, kind, folders):
    root = folders[0]
    sources = json.loads((root / kind / "config.json").read_text())
    own = [str(root), *(str(part["source"]) for part in (sources["backbone_config"], sources["language_model_source"]))]
    with tempfile.TemporaryDirectory(dir=root) as place:
        folder = Path(shutil.copytree(root / kind, f"{place}/checkpoint", ignore=shutil.ignore_patterns("*.py")))
        file = data.draw(st.sampled_from(sorted(folder.iterdir())))
        how = data.draw(st.sampled_from(["cut", "flip", "missing", "extra", "text", "empty", "folder", "swap"]))
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 200))
        if how == "cut":
            file.write_bytes(content[:at])
        elif how == "flip":
            content[at % len(content)] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
        elif how == "missing":
            file.unlink()
        elif how == "extra":
            name = data.draw(
                st.sampled_from(["pytorch_model.bin", "adapter_config.json", "model-9.safetensors", "generation_config.json"])
            )
            (folder / name).write_bytes(data.draw(st.binary(max_size=50)))
        elif how == "text":
            file.write_bytes(data.draw(st.binary(max_size=100)))
        elif how == "empty":
            file.write_bytes(b"")
        elif how == "folder":
            file.unlink()
            file.mkdir()
        else:
            other = data.draw(st.sampled_from(sorted(folder.iterdir())))
            file.write_bytes(other.read_bytes())
        readable = file.name == "config.json" and how == "flip"  # another number is another configuration
        found = load(folder, own) if readable else check(folder, folders, own)
        assert isinstance(found, Exception) or how in ("extra", "flip", "swap", "cut", "missing")
