"""What a checkpoint may do to whoever loads it: nothing but load, or a short error that names what is wrong."""

import copy
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import time

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from devil_hf import DevilConfig, DevilModel
from devil_hf.build.timm_devil import create_network
from devil_hf.build.transformers_devil import model_class_of
from devil_hf.model.backbone_devil import build_module
from devil_hf.model.checkpoint_devil import building_within, read_weights, weights_hash
from devil_hf.model.configuration_devil import check_setting, config_class_of, settings_of
from tests.conftest import SMALL_TRANSLATOR
from tests.model.test_checkpoints import change_config


@pytest.fixture(scope="module")
def saved(model, processor, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name, slim in (("slim", True), ("full", False)):
        model.save_pretrained(root / name, slim=slim)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved / "full", tmp_path / "checkpoint")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    "name", ["checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "features_only", "pretrained_model_args", "device"]
)
def test_arguments_of_timm_itself_are_refused(name, checkpoint, tmp_path):
    config = config_of(checkpoint)
    config["backbone_config"]["kwargs"][name] = str(tmp_path / "secret.pth")
    change_config(checkpoint, backbone_config=config["backbone_config"])
    with pytest.raises(ValueError, match=name):
        AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"pretrained_cfg_overlay": {"file": "weights.pth"}}, "file"),
        ({"pretrained_cfg_overlay": {"url": "http://127.0.0.1/x"}}, "url"),
        ({"pad_type": "/etc/passwd"}, "pad_type"),
        ({"layers": [10**9, 1, 1, 1]}, "layers"),
        ({"block_args": {"deep": ["hf-hub:owner/private"]}}, "deep"),
    ],
)
def test_values_that_lead_out_of_a_checkpoint_are_refused(kwargs, named):
    with pytest.raises(ValueError, match=named):
        build_module({"kind": "timm", "architecture": "test_resnet", "kwargs": kwargs})


@pytest.mark.parametrize("name", ["hf-hub:owner/private", "local-dir:/etc", "../secret", "no_such_architecture", 3])
def test_architectures_are_names_that_timm_has_registered(name):
    with pytest.raises(ValueError, match="registered"):
        create_network(name, {})


@pytest.mark.parametrize(
    "name",
    [
        "transformers.models.auto.modeling_auto.AutoModel",
        "transformers.pipelines.pipeline",
        "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperModel",
        "transformers.models.x.modeling_x.TimmWrapperModel",
        "transformers.models.x.modeling_x.TimmBackbone",
        "transformers.models.resnet.modeling_resnet.PreTrainedModel",
        "transformers.models.auto.modeling_auto.AutoBackbone",
        "transformers.models.resnet.configuration_resnet.ResNetConfig",
        "transformers.models.nothing.modeling_nothing.Nothing",
        "os.path.join",
        "subprocess.Popen",
        None,
    ],
)
def test_backbone_classes_are_models_of_transformers(name):
    with pytest.raises(ValueError, match="is not one of transformers"):
        model_class_of(name)


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_a_configuration_chooses_no_kernels(name, checkpoint):
    """`owner/repository` there is a repository of kernels, which is code."""
    config = config_of(checkpoint)
    config["text_config"][name] = config["owner"] = "owner/kernels"
    change_config(checkpoint, text_config=config["text_config"], **{name: "owner/kernels"})
    model = AutoModel.from_pretrained(checkpoint)
    assert "kernels" not in str(model.config.to_dict()) + str(model.language_model.config._attn_implementation)


def test_only_declared_fields_are_handed_on(checkpoint):
    config = config_of(checkpoint)
    strange = {"auto_map": {"AutoModelForCausalLM": "owner/code--file.Class"}, "quantization_config": {"quant_method": "awq"}}
    strange |= {
        "transformers_weights": "../other.safetensors",
        "fusion_config": {"x": True},
        "to_dict": "text",
        "num_labels": 10**9,
    }
    change_config(
        checkpoint, text_config=config["text_config"] | strange, **{k: v for k, v in strange.items() if k != "auto_map"}
    )
    model = AutoModel.from_pretrained(checkpoint)
    for config in (model.config, model.config.text_config):
        assert not {"quantization_config", "transformers_weights", "fusion_config"} & vars(config).keys()
    assert not hasattr(model.config.text_config, "auto_map")


def test_nothing_is_handed_on_to_timm_by_a_configuration_that_wraps_it():
    """`gemma3n_vision` wraps timm without saying so, and is what parts of it are where they do not say."""
    evil = {"architecture": "resnet18", "model_args": {"checkpoint_path": "weights.pth"}}
    for model_type, fields in (
        ("gemma3n_vision", evil),
        ("gemma3n", {"vision_config": evil}),
        ("fast_vlm", {"vision_config": evil}),
    ):
        with pytest.raises(ValueError, match="model_args"):
            settings_of(config_class_of(model_type), fields)
    assert check_setting("model_args", None) is None


@pytest.mark.parametrize("text", ["a/b", "C:\\x", "http:x", "x" * 300, "a\nb"])
def test_words_of_a_description_are_no_paths(text):
    with pytest.raises(ValueError, match="refused"):
        check_setting("name", text)


def test_a_language_model_that_wraps_timm_is_refused(checkpoint):
    text = config_of(checkpoint)["text_config"]
    nested = {"model_type": "timm_wrapper", "architecture": "hf-hub:owner/private"}
    for changed in (nested, text | {"activation_function": nested}):
        change_config(checkpoint, text_config=changed)
        with pytest.raises(ValueError, match=r"timm_wrapper' wraps .* name timm's own"):
            AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_config", {"n_layer": 1_000_000}),
        ("text_config", {"n_layer": 100_000}),
        ("text_config", {"n_embd": 2**24, "n_head": 2}),
        ("text_config", {"vocab_size": 2**31 - 1}),
        ("text_config", {"n_positions": 2**24}),
        ("kwargs", {"layers": [300_000, 1, 1, 1]}),
        ("kwargs", {"channels": [2**24] * 4}),
        ("config", {"translator_depth": 400_000}),
        ("config", {"translator_width": 2**28, "translator_heads": 1}),
        ("config", {"translator_feed_forward": 2**30}),
    ],
)
def test_absurd_sizes_are_refused_before_anything_of_them_is_made(part, changes, checkpoint):
    config = config_of(checkpoint)
    place = {"config": config, "text_config": config["text_config"], "kwargs": config["backbone_config"]["kwargs"]}[part]
    place.update(changes)
    change_config(checkpoint, **config)
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"refused|asks for far more|cannot be loaded|context"):
        AutoModel.from_pretrained(checkpoint)
    assert time.process_time() - begin < 20


def test_pairs_of_places_are_not_listed_one_by_one_for_images_that_no_network_reads():
    begin = time.process_time()
    config = {"image_size": 4096}
    levit = {"kind": "transformers", "model_class": "transformers.models.levit.modeling_levit.LevitModel", "model_config": config}
    with pytest.raises(ValueError, match="image_size=4096"), torch.device("meta"):
        build_module(levit)
    for name, kwargs in (("tiny_vit_5m_224", {"window_sizes": [7, 7, 256, 7]}), ("efficientvit_m0", {"window_size": [256] * 3})):
        with pytest.raises(ValueError, match=r"=256.* is more than 64"), torch.device("meta"):
            build_module({"kind": "timm", "architecture": name, "kwargs": kwargs})
    assert time.process_time() - begin < 10
    with torch.device("meta"):
        build_module(levit | {"model_config": {}})


def test_building_is_bounded_in_this_thread_alone_and_only_meanwhile():
    with pytest.raises(ValueError, match="far more"), building_within(1000), torch.device("meta"):
        nn.Linear(2**15, 2**15)
    with torch.device("meta"):
        nn.Linear(2**15, 2**15)
    made = []
    with pytest.raises(ValueError, match="far more"), building_within(1000):
        nn.ModuleList(made.append(0) or nn.Identity() for _ in range(10**6))
    assert len(made) < 50_000, "layers without tensors count, too"
    with building_within(1000):
        nn.ModuleList(nn.Identity() for _ in range(10_000))  # more than any network has


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", '{"model_type": "devil"', "", "[" * 100_000, '{"model_type": "devil", "text_config": [1]}', "\x00"],
)
def test_a_configuration_that_is_none_is_an_error_of_a_line(text, checkpoint):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=r"config\.json|no configuration|attribute"):
        DevilConfig.from_pretrained(checkpoint)
    with pytest.raises((ValueError, OSError), match=r".+"):
        DevilModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "change",
    [{"translator_width": "wide"}, {"prefix_length": 1.5}, {"layer_dropout": None}, {"dtype": "load"}, {"format_version": "x"}],
)
def test_fields_of_a_wrong_type_are_named(change, checkpoint):
    change_config(checkpoint, **change)
    (name,) = change
    with pytest.raises(ValueError, match=name):
        AutoModel.from_pretrained(checkpoint)


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", ["full", "slim"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(kind, value, saved, tmp_path):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    change_config(folder, weights_sha256=None)
    weights = load_file(folder / "model.safetensors")
    weights["translator.output.bias"][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"translator\.output\.bias that are not finite"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("full", "translator.queries"),
        ("full", "backbone.module.stem.conv1.weight"),
        ("full", "language_model.transformer.wpe.weight"),
        ("slim", "translator.queries"),
    ],
)
def test_a_flipped_bit_of_any_part_is_noticed(kind, name, saved, tmp_path):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    weights = load_file(folder / "model.safetensors")
    name = name if name in weights else next(key for key in weights if key.startswith(name.split(".")[0]))
    weights[name].view(-1).view(torch.int32)[0] ^= 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"SHA-256 \w+, not \w+ as in its config\.json"):
        AutoModel.from_pretrained(folder)


def test_the_hash_is_that_of_the_files(saved):
    for kind in ("full", "slim"):
        assert config_of(saved / kind)["weights_sha256"] == {"": weights_hash(load_file(saved / kind / "model.safetensors"))}


@pytest.mark.parametrize("kind", ["full", "slim"])
@pytest.mark.parametrize("length", [0, 7, 8, 100, 0.5, 0.999])
def test_cut_weights_are_an_error_that_names_the_file_and_shows_nothing_of_it(kind, length, saved, tmp_path):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, int(length * size) if isinstance(length, float) else length)
    with pytest.raises(OSError, match=r"model\.safetensors is cut or damaged .*copy the checkpoint again") as raised:
        AutoModel.from_pretrained(folder)
    assert "translator" not in str(raised.value)


def test_a_header_that_is_text_of_the_user_is_not_shown(checkpoint):
    secret = b'{"private key": "hunter2"'
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(secret)) + secret)
    with pytest.raises(OSError, match=r"model\.safetensors") as raised:
        AutoModel.from_pretrained(checkpoint)
    assert "hunter2" not in str(raised.value)


def test_pickled_weights_and_adapters_beside_a_checkpoint_are_not_read(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else", "peft_type": "LORA"}')
    AutoModel.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"neither model\.safetensors nor an index"):
        DevilModel.from_pretrained(checkpoint)


@pytest.mark.parametrize("slim", [True, False])
@pytest.mark.parametrize(("saving", "loading"), [({"max_shard_size": "20KB"}, {}), ({"variant": "fp16"}, {"variant": "fp16"})])
def test_shards_and_variants_load_again(slim, saving, loading, model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path, slim=slim, **saving)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or loading
    loaded = AutoModel.from_pretrained(tmp_path, **loading)
    assert torch.equal(loaded.ask(pixel_values), model.ask(pixel_values))


def test_variants_in_one_folder_are_each_verified(model, checkpoint):
    hashes = config_of(checkpoint)["weights_sha256"]
    model.save_pretrained(checkpoint, variant="fp16")
    both = config_of(checkpoint)["weights_sha256"]
    assert both.keys() == {"", "fp16"}
    assert both[""] == hashes[""]
    weights = load_file(checkpoint / "model.safetensors")
    weights["translator.queries"].view(-1)[0] += 1
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="SHA-256"):
        AutoModel.from_pretrained(checkpoint)
    AutoModel.from_pretrained(checkpoint, variant="fp16")
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, variant="bf16")
    assert config_of(checkpoint)["weights_sha256"].keys() == {"fp16", "bf16"}


@pytest.mark.parametrize(
    "weight_map", [{"a": "../other.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, {}, [], None, {"a": "model.bin"}, {"a": ["x"]}]
)
def test_a_list_of_shards_names_files_beside_it(weight_map, checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(OSError, match=r"index\.json is no list"):
        AutoModel.from_pretrained(checkpoint)


def test_a_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda one: one[..., :-1].contiguous(), lambda one: one[None], lambda one: one.new_zeros(1), lambda one: one.bool()],
    ids=["shorter", "deeper", "one", "bool"],
)
def test_weights_of_other_shapes_are_refused(change, checkpoint):
    change_config(checkpoint, weights_sha256=None)
    weights = load_file(checkpoint / "model.safetensors")
    weights["translator.layer_embedding"] = change(weights["translator.layer_embedding"])
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    if weights["translator.layer_embedding"].dtype == torch.bool:
        AutoModel.from_pretrained(checkpoint)  # numbers all the same
    else:
        with pytest.raises(ValueError, match="cannot be loaded"):
            AutoModel.from_pretrained(checkpoint)


def test_a_checkpoint_is_saved_over_itself(checkpoint, pixel_values):
    """Its weights are mapped into memory from the file that is written."""
    model = AutoModel.from_pretrained(checkpoint)
    expected, weights = model.ask(pixel_values), copy.deepcopy(model.state_dict())
    model.save_pretrained(checkpoint)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.ask(pixel_values), expected)
    assert torch.equal(AutoModel.from_pretrained(checkpoint).ask(pixel_values), expected)


# ------------------------------------------------------------------------------------------- the user's own modules


class Doubled(nn.Module):
    """Holds its layers under two names, a slice of a weight beside it, and a buffer that no checkpoint has."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 1)
        self.both = nn.Sequential(self.first, nn.ReLU(), self.second)
        self.part = nn.Parameter(self.first.weight.data[:4])
        self.pool, self.head = nn.AdaptiveAvgPool2d(4), nn.Linear(128, 16)
        self.register_buffer("scale", torch.full((1, 8, 1, 1), 3.0), persistent=False)
        self.register_buffer("nothing", None, persistent=False)

    def forward(self, x):
        x = self.pool(self.both(x) * self.scale + self.part.sum())
        return self.head(x.view(x.size(0), -1))


@pytest.fixture
def doubled(language_model, tokenizer):
    torch.manual_seed(5)
    return DevilModel.from_backbone_and_language_model(
        Doubled(), language_model, ["second", "pool", "head"], tokenizer=tokenizer, **SMALL_TRANSLATOR
    )


def test_shared_tensors_and_buffers_of_an_own_module_come_back(doubled, tmp_path):
    pixels = torch.randn(2, 3, 64, 64)
    doubled.save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        loaded = DevilModel.from_pretrained(tmp_path, backbone=Doubled())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loaded.ask(pixels), doubled.ask(pixels))
    assert loaded.backbone.module.nothing is None


def test_a_module_that_flattens_by_view_reads_images_of_any_memory_format(doubled):
    pixels = torch.randn(2, 3, 64, 64)
    last = pixels.to(memory_format=torch.channels_last)
    assert torch.equal(doubled.ask(last), doubled.ask(pixels))


def test_a_network_of_timm_with_shared_weights_is_saved(language_model, tokenizer, tmp_path):
    backbone = timm.create_model("coat_tiny", num_classes=0, img_size=64, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1))
    model = DevilModel.from_backbone_and_language_model(backbone, language_model, tokenizer=tokenizer, **SMALL_TRANSLATOR)
    pixels = torch.randn(1, 3, 64, 64)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for found, expected in zip(loaded.extract_features(pixels), model.extract_features(pixels), strict=True):
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------- code that travels

FRESH = """
    import io, sys
    sys.modules["devil_hf"] = None
    import torch
    from transformers import AutoConfig, AutoModel
    first, second, out = sys.argv[1:]
    old = AutoModel.from_pretrained(first, trust_remote_code=True)
    new = AutoModel.from_pretrained(second, trust_remote_code=True)
    same = AutoModel.from_pretrained(first, trust_remote_code=True)
    assert hasattr(sys.modules[type(new).__module__], "NEWER") and not hasattr(sys.modules[type(old).__module__], "NEWER")
    assert type(old) is type(same) and type(old.config) is type(old).config_class
    assert type(AutoConfig.from_pretrained(second, trust_remote_code=True)) is type(new.config)
    new.save_pretrained(out)
    stream = io.BytesIO()
    torch.save(old, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    pixels = torch.zeros(1, 3, 160, 160)
    assert torch.equal(again.ask(pixels), same.ask(pixels))
"""


def run_without_the_package(tmp_path, *arguments):
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(FRESH), *map(str, arguments)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_two_checkpoints_of_one_process_each_run_and_keep_their_own_code(saved, tmp_path):
    old = shutil.copytree(saved / "full", tmp_path / "old" / "checkpoint")
    new = shutil.copytree(saved / "full", tmp_path / "new" / "checkpoint")
    code = new / "modeling_devil.py"
    code.write_text(code.read_text() + "\nNEWER = True\n")
    run_without_the_package(tmp_path, old, new, tmp_path / "again")
    assert "NEWER" in (tmp_path / "again" / "modeling_devil.py").read_text()


def test_a_slim_checkpoint_loads_after_a_self_contained_one_in_one_process(saved, tmp_path):
    """Their code differs by a companion only."""
    slim = shutil.copytree(saved / "slim", tmp_path / "slim")
    code = slim / "modeling_devil.py"
    code.write_text(code.read_text() + "\nNEWER = True\n")
    run_without_the_package(tmp_path, saved / "full", slim, tmp_path / "again")
    assert (tmp_path / "again" / "companions_devil.py").is_file()


def test_a_pickled_model_of_the_package_is_the_same(model, pixel_values):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False).ask(pixel_values), model.ask(pixel_values))


def test_what_is_read_is_every_tensor_of_the_files(saved):
    assert read_weights(saved / "full").keys() == load_file(saved / "full" / "model.safetensors").keys()
