"""Promises of the frozen backbone: layers of any network as maps (B, C, H, W), sources that are verified."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SwinBackbone,
    SwinConfig,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from devil_hf.build import backbone_from_source
from devil_hf.build.hooks_devil import capture, to_map, token_grid
from devil_hf.build.layouts import infer_layout
from devil_hf.build.slim_devil import source_state_dict
from devil_hf.model.backbone_devil import FeatureBackbone, build_module
from devil_hf.model.checkpoint_devil import weights_hash
from devil_hf.model.pooling_devil import resolve_layers

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
SMALL_SWIN = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
SMALL_IMAGES = {"image_size": 64, "patch_size": 16}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def build(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, num_classes=0, **kwargs).eval()


def images_for(backbone: FeatureBackbone, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *backbone.config["input_size"])


class UserNetwork(nn.Module):
    """Channels-last inside, with in-place activations, a shared activation and a vector at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Linear(8, 12)
        self.norm = nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 16, 2, stride=2)
        self.head = nn.Linear(16, 5)
        self.calls = 0

    def forward(self, images):
        x = self.act(self.stem(images))
        x = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.act(self.norm(x))
        x = self.deep(x)
        self.calls += 1
        return self.head(x.mean((2, 3)))


# --------------------------------------------------------------------------------- one rule for layers


def test_layers_are_found_by_name_and_by_index_alike():
    names = ["layer1", "layer2", "layer3"]
    assert resolve_layers(None, names) == [0, 1, 2]
    assert resolve_layers("layer2", names) == resolve_layers(1, names) == resolve_layers([-2], names) == [1]
    assert resolve_layers([-1, "layer1"], names) == [2, 0]


@pytest.mark.parametrize("requested", ["layer9", 3, -4, ["layer1", 0], [], True, 1.5])
def test_an_unknown_layer_is_named_with_the_layers_there_are(requested):
    with pytest.raises((ValueError, TypeError), match=r"layer1|float"):
        resolve_layers(requested, ["layer1", "layer2", "layer3"])


def test_default_layers_are_the_stages_of_the_paper_or_four_blocks():
    with torch.device("meta"):
        resnet, vit = build("resnet50"), build("vit_tiny_patch16_224")
    assert backbone_from_source(resnet).layers == ["layer1", "layer2", "layer3", "layer4"]
    blocks = backbone_from_source(vit)
    assert blocks.layers == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    assert blocks.layer_names == [f"blocks.{index}" for index in range(12)]


def test_errors_about_layers_name_the_value_and_the_layers():
    network = build("test_resnet")
    with pytest.raises(ValueError, match=r"'layer5'.*layer4"):
        backbone_from_source(network, "layer5")
    with pytest.raises(ValueError, match=r"7 is out of range.*layer4"):
        backbone_from_source(network, 7)
    with pytest.raises(ValueError, match=r"'layer4' has no class token"):
        backbone_from_source(network, "layer4:class")
    with pytest.raises(ValueError, match="twice"):
        backbone_from_source(network, ["layer4", -1])
    with pytest.raises(ValueError, match="class_tokens=True"):
        backbone_from_source(network, class_tokens=True)


# ------------------------------------------------------------------------------------------------ timm


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(f"test_{family}", {}) for family in ("resnet", "efficientnet", "convnext", "byobnet")]
    + [("swin_tiny_patch4_window7_224", SMALL_SWIN)],
)
def test_stages_equal_timms_own_features(name, kwargs):
    network = build(name, **kwargs)
    backbone = backbone_from_source(network)
    own = timm.create_model(name, features_only=True, **kwargs).eval()
    weights = {key.replace(".", "_"): tensor for key, tensor in network.state_dict().items()}
    own.load_state_dict({key: weights[key.replace(".", "_")] for key in own.state_dict()})
    images = images_for(backbone)
    with torch.no_grad():
        expected = dict(zip(own.feature_info.module_name(), own(images), strict=True))
        found = backbone(images)
    for layer, channels, feature_map in zip(backbone.layers, backbone.channels, found, strict=True):
        wanted = expected[layer]
        wanted = wanted.permute(0, 3, 1, 2) if wanted.shape[-1] == channels != wanted.shape[1] else wanted
        torch.testing.assert_close(feature_map, wanted)


def test_grid_class_token_and_registers_of_a_vit_come_apart():
    network = build("vit_small_patch16_dinov3", depth=3, embed_dim=48, num_heads=3)
    backbone = backbone_from_source(network, ["blocks.1", "blocks.1:class", "blocks.2:class"])
    images = images_for(backbone)
    with torch.no_grad():
        patches, token, _ = backbone(images)
        raw = []
        handle = network.blocks[1].register_forward_hook(lambda *call: raw.append(call[-1]))
        network(images)
        handle.remove()
    assert patches.shape == (2, 48, 16, 16)
    assert token.shape == (2, 48, 1, 1)
    torch.testing.assert_close(token[:, :, 0, 0], raw[0][:, 0])
    torch.testing.assert_close(patches[:, :, 2, 3], raw[0][:, 5 + 2 * 16 + 3])


def test_class_tokens_accompany_every_layer_that_has_one():
    backbone = backbone_from_source(build("test_vit"), [0, -1], class_tokens=True)
    first, last = backbone.layer_names[0], backbone.layer_names[-1]
    assert backbone.layers == [first, f"{first}:class", last, f"{last}:class"]


def test_registers_without_a_class_token_are_no_class_token():
    with pytest.raises(ValueError, match="no class token"):
        backbone_from_source(build("test_vit4"), class_tokens=True, backbone_kwargs={"class_token": False})


def test_a_vit_keeps_an_oblong_grid():
    backbone = backbone_from_source(build("vit_tiny_patch16_224", img_size=(64, 96), depth=4))
    assert backbone.config["input_size"] == [3, 64, 96]
    assert [tuple(feature_map.shape) for feature_map in backbone(images_for(backbone))] == [(2, 192, 4, 6)] * 4
    hooked = backbone_from_source(backbone.module, "blocks.1.mlp")
    assert hooked(images_for(hooked))[0].shape == (2, 192, 4, 6)


def test_hooks_read_the_same_features_as_the_networks_own_way():
    network = build("test_resnet")
    names = list(backbone_from_source(network).layers)
    own = backbone_from_source(network, names)
    hooked = backbone_from_source(nn.Sequential(network), [f"0.{name}" for name in names])
    images = images_for(own)
    for mine, theirs in zip(hooked(images), own(images), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_any_submodule_is_a_layer_and_is_read_before_in_place_changes():
    network = build("resnet18", channels=(8, 16, 24, 32))
    backbone = backbone_from_source(network, ["layer2.0.bn1", "layer2.1.conv2", "layer3"])
    images = images_for(backbone)
    with torch.no_grad():
        bn1, _, stage = backbone(images)
        x = network.layer1(network.maxpool(network.act1(network.bn1(network.conv1(images)))))
        torch.testing.assert_close(bn1, network.layer2[0].bn1(network.layer2[0].conv1(x)))
        torch.testing.assert_close(stage, network.layer3(network.layer2(x)))
    assert backbone.channels == [16, 16, 24]


def test_channels_last_layers_come_out_channels_first():
    network = build("swin_tiny_patch4_window7_224", **SMALL_SWIN)
    backbone = backbone_from_source(network, ["layers.1", "layers.2.blocks.0"])
    assert [tuple(m.shape) for m in backbone(images_for(backbone))] == [(2, 48, 28, 28), (2, 96, 14, 14)]


def test_nothing_deeper_than_the_deepest_layer_asked_for_is_computed():
    network = build("test_vit", depth=6)
    backbone = backbone_from_source(network, [0, 2, 5])
    calls = []
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *call, index=index: calls.append(index))
    maps = backbone(images_for(backbone), layers=[1])
    assert calls == [0, 1, 2]
    assert [feature_map is None for feature_map in maps] == [True, False, True]


def test_features_stay_frozen_and_in_evaluation_mode():
    backbone = backbone_from_source(build("test_resnet"))
    outer = nn.ModuleDict({"backbone": backbone}).train()
    assert not any(module.training for module in outer["backbone"].modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images, before = images_for(backbone), weights_hash(backbone)
    outer["backbone"](images)
    assert weights_hash(backbone) == before == weights_hash(backbone.state_dict())


def test_pixel_values_of_the_wrong_shape_are_named():
    backbone = backbone_from_source(build("test_resnet"))
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\)"):
        backbone(torch.zeros(1, 1, 32, 32))


# --------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_configuration_builds_the_same_network_without_a_forward_pass(name):
    backbone = backbone_from_source(build(name), class_tokens=name == "test_vit")
    config = json.loads(json.dumps(backbone.config))
    with torch.device("meta"):
        again = FeatureBackbone.from_config(config)
    assert (again.layers, again.channels, again.layer_names) == (
        backbone.layers,
        backbone.channels,
        backbone.layer_names,
    )
    again.load_state_dict(backbone.state_dict(), assign=True)
    images = images_for(backbone)
    for mine, theirs in zip(again(images), backbone(images), strict=True):
        assert torch.equal(mine, theirs)


class OuterConfig(PreTrainedConfig):
    model_type = "outer"
    backbone_config: dict | None = None


class Outer(PreTrainedModel):
    config_class = OuterConfig

    def __init__(self, config, backbone=None):
        super().__init__(config)
        self.backbone = backbone or FeatureBackbone.from_config(config.backbone_config)
        self.post_init()

    def _init_weights(self, module):
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("swin_tiny_patch4_window7_224", SMALL_SWIN),
        ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 56}),
        ("vit_small_patch16_dinov3", {"depth": 2}),
    ],
)
def test_buffers_that_are_not_saved_survive_loading(name, kwargs, tmp_path):
    backbone = backbone_from_source(build(name, **kwargs))
    images = images_for(backbone, 1)
    expected = backbone(images)
    Outer(OuterConfig(backbone_config=backbone.config), backbone).save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        loaded = Outer.from_pretrained(tmp_path).eval()
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(loaded.backbone(images), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_given_module_that_its_arguments_do_not_explain_is_refused():
    network = build("mobilenetv2_050", pad_type="same")
    del network._model_args  # timm before 1.0.31 did not keep them
    with pytest.raises(ValueError, match=r"features differ.*backbone_kwargs=\{'pad_type': 'same'\}"):
        backbone_from_source(network)
    assert backbone_from_source(network, backbone_kwargs={"pad_type": "same"}).layers[-1] == "blocks.6"

    wide = build("test_vit", embed_dim=96)
    del wide._model_args
    with pytest.raises(ValueError, match=r"weights differ in name or shape.*backbone_kwargs"):
        backbone_from_source(wide)


def test_the_check_of_a_given_module_leaves_the_random_state_alone():
    network = build("test_resnet")
    state = torch.get_rng_state()
    backbone_from_source(network)
    assert torch.equal(state, torch.get_rng_state())


def test_preprocessing_is_timms_and_can_be_overridden():
    network = build("test_resnet")
    own = backbone_from_source(network).config["data_config"]
    expected = timm.data.resolve_model_data_config(network)
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in own.items()} == expected
    changed = backbone_from_source(network, backbone_kwargs={"data_config": {"mean": [0.5] * 3}})
    assert changed.config["data_config"] == own | {"mean": [0.5] * 3}


# -------------------------------------------------------------------------------------- users' modules


def test_a_users_module_is_read_in_any_layout_and_left_early():
    network = UserNetwork().eval()
    backbone = backbone_from_source(network, ["stem", "mix", "norm", "deep"])
    assert backbone.config["kind"] == "custom"
    images = images_for(backbone)
    calls = network.calls
    stem, mix, norm, deep = backbone(images)
    assert network.calls == calls, "the pass goes on behind the deepest layer"
    torch.testing.assert_close(stem, network.stem(images))
    torch.testing.assert_close(mix, network.mix(stem.relu().permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    torch.testing.assert_close(norm, network.norm(mix))
    torch.testing.assert_close(deep, network.deep(norm.relu()))
    assert backbone_from_source(network, "head")(images)[0].shape == (2, 5, 1, 1)


def test_a_users_module_offers_its_own_layers():
    blocks = [nn.Sequential(nn.Conv2d(8 if i else 3, 8, 3, 2, 1), nn.ReLU()) for i in range(6)]
    backbone = backbone_from_source(nn.Sequential(nn.Sequential(*blocks), nn.Flatten(), nn.LazyLinear(2)))
    assert backbone.layer_names == [f"0.{index}" for index in range(6)]
    assert backbone.layers == ["0.2", "0.3", "0.4", "0.5"]


def test_a_users_module_must_be_given_again():
    config = backbone_from_source(UserNetwork(), "deep").config
    with pytest.raises(ValueError, match="pass the module itself"):
        FeatureBackbone.from_config(config)
    network = UserNetwork()
    assert FeatureBackbone.from_config(config, network).module is network
    with pytest.raises(ValueError, match="pass `backbone"):
        source_state_dict(config)


def test_windows_are_not_taken_for_a_feature_map():
    network = build("swin_tiny_patch4_window7_224", **SMALL_SWIN)
    with pytest.raises(ValueError, match=r"'layers.0.blocks.0.attn' is no feature map"):
        backbone_from_source(network, "layers.0.blocks.0.attn")


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (196, (224, 224), (14, 14)),
        (1369, (518, 520), (37, 37)),
        (24, (64, 96), (4, 6)),
        (197, (224, 224), None),
        (20, (64, 64), None),
    ],
)
def test_token_grids_follow_the_aspect_of_the_image(tokens, size, grid):
    assert token_grid(tokens, *size) == grid


@pytest.mark.parametrize(
    ("shape", "layout", "prefix"),
    [
        ((2, 96, 8, 12), "NCHW", 0),
        ((2, 8, 12, 96), "NHWC", 0),
        ((2, 101, 7), "NLC", 5),
        ((97, 2, 7), "LNC", 1),
        ((2, 7), "NC", 0),
    ],
)
def test_layouts_are_inferred_and_undone(shape, layout, prefix):
    found = infer_layout(torch.Size(shape), 2, 128, 192)
    assert found == {"layout": layout, "prefix": prefix}
    feature_map = to_map(torch.zeros(shape), **found, height=128, width=192)
    assert feature_map.shape[2:] == ((1, 1) if layout == "NC" else (8, 12))


# ---------------------------------------------------------------------------------------- transformers


def test_blocks_of_a_transformers_model_are_its_hidden_states():
    network = ViTModel(ViTConfig(**TINY, **SMALL_IMAGES)).eval()
    backbone = backbone_from_source(network, class_tokens=True)
    images = images_for(backbone)
    with torch.no_grad():
        maps = backbone(images)
        hidden = network(images, output_hidden_states=True).hidden_states[1:]
    assert backbone.layers[1::2] == [f"{name}:class" for name in backbone.layers[::2]]
    for patches, token, state in zip(maps[::2], maps[1::2], hidden, strict=True):
        torch.testing.assert_close(token[:, :, 0, 0], state[:, 0])
        torch.testing.assert_close(patches.flatten(2).transpose(1, 2), state[:, 1:])


@pytest.mark.parametrize("requested", [None, ["stage1", "stage3"]])
def test_stages_of_a_transformers_backbone_are_its_feature_maps(requested):
    network = SwinBackbone(SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], image_size=64))
    backbone = backbone_from_source(network, requested)
    assert backbone.layers == (requested or ["stage1", "stage2", "stage3", "stage4"])
    images = images_for(backbone)
    again = FeatureBackbone.from_config(json.loads(json.dumps(backbone.config)))
    again.load_state_dict(backbone.state_dict())
    own = backbone.module(images).feature_maps
    for mine, rebuilt, theirs in zip(backbone(images), again(images), own, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, rebuilt)


def test_registers_of_a_transformers_backbone_are_left_out():
    network = Dinov2WithRegistersBackbone(Dinov2WithRegistersConfig(**TINY, **SMALL_IMAGES, num_register_tokens=3))
    backbone = backbone_from_source(network, ["stage2", "stage2:class"])
    patches, token = backbone(images_for(backbone))
    assert (patches.shape, token.shape) == ((2, 32, 4, 4), (2, 32, 1, 1))


# --------------------------------------------------------------------------------------------- sources


def save_timm(folder, name="test_resnet", **kwargs) -> nn.Module:
    network = timm.create_model(name, **kwargs)
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    return network


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_directory_of_timm_is_a_source_that_loads_again(prefix, tmp_path):
    network = save_timm(tmp_path)
    backbone = backbone_from_source(f"{prefix}{tmp_path}")
    assert backbone.config["source"] == str(tmp_path)
    assert backbone.config["sha256"] == weights_hash(backbone.module)
    assert torch.equal(backbone.module.conv1[0].weight, network.conv1[0].weight)
    weights = source_state_dict(json.loads(json.dumps(backbone.config)))
    assert weights.keys() == backbone.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in backbone.state_dict().items())


def test_arguments_of_a_timm_source_are_kept(tmp_path):
    save_timm(tmp_path, "test_vit", img_size=96, depth=3)
    backbone = backbone_from_source(tmp_path, backbone_kwargs={"img_size": 96, "depth": 3})
    assert backbone.config["input_size"] == [3, 96, 96]
    again = FeatureBackbone.from_config(json.loads(json.dumps(backbone.config)))
    again.load_state_dict(source_state_dict(backbone.config))


def test_a_directory_of_transformers_is_a_source_with_its_image_processor(tmp_path):
    SwinBackbone(SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[1, 2], image_size=64)).save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    ViTImageProcessorPil(size=size, image_mean=[0.1] * 3, image_std=[0.2] * 3, resample=2).save_pretrained(tmp_path)
    backbone = backbone_from_source(tmp_path, ["stage1", "stage2"])
    data_config = backbone.config["data_config"]
    assert (data_config["input_size"], data_config["interpolation"]) == ([3, 64, 64], "bilinear")
    assert (data_config["mean"], data_config["std"]) == ([0.1] * 3, [0.2] * 3)
    assert (data_config["crop_pct"], data_config["crop_mode"]) == (1.0, "squash")
    assert source_state_dict(backbone.config).keys() == backbone.state_dict().keys()


def test_the_vision_tower_of_a_two_tower_model_is_taken(tmp_path):
    text = CLIPTextConfig(**TINY, vocab_size=50)
    vision = CLIPVisionConfig(**TINY, **SMALL_IMAGES)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    backbone = backbone_from_source(tmp_path, class_tokens=True)
    assert [tuple(m.shape[1:]) for m in backbone(images_for(backbone))] == [(32, 4, 4), (32, 1, 1)] * 4
    FeatureBackbone.from_config(backbone.config).load_state_dict(source_state_dict(backbone.config))


def test_changed_weights_are_found_by_both_hashes(tmp_path):
    network = save_timm(tmp_path)
    config = backbone_from_source(tmp_path).config
    with torch.no_grad():
        network.conv1[0].weight += 1
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    changed = backbone_from_source(tmp_path).config["sha256"]
    with pytest.raises(ValueError, match=f"{changed}.*{config['sha256']}"):
        source_state_dict(config)


def test_a_source_that_moved_can_be_named(tmp_path):
    save_timm(tmp_path / "here")
    config = backbone_from_source(tmp_path / "here").config
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(OSError, match=r"pass as `backbone=`"):
        source_state_dict(config)
    assert source_state_dict(config, tmp_path / "there")
    module = backbone_from_source(tmp_path / "there").module
    assert source_state_dict(config, module).keys() == source_state_dict(config, tmp_path / "there").keys()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet5O", r"'resnet5O'.*similar.*resnet50"),
        ("resnet50.no_such_tag", "resnet50.no_such_tag.*resnet50.a1_in1k"),
        ("test_resnet.", "test_resnet."),
    ],
)
def test_an_unknown_source_is_named_with_what_is_like_it(source, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=message):
        backbone_from_source(source)


def test_the_hash_depends_on_name_type_shape_and_value():
    tensor = torch.arange(6.0)
    states = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.half()},
        {"a": tensor.view(2, 3)},
        {"a": tensor + 1},
        {"a": tensor, "b": torch.tensor(1)},
    ]
    assert len({weights_hash(state) for state in states}) == len(states)
    assert weights_hash({"a": tensor, "b": tensor}) == weights_hash({"b": tensor, "a": tensor})


def test_a_description_of_an_architecture_reaches_neither_the_hub_nor_a_file():
    with pytest.raises((RuntimeError, ValueError), match="repository"):
        build_module({"kind": "timm", "architecture": "hf-hub:tester/repository", "kwargs": {}})
    with pytest.raises(ValueError, match="checkpoint_path"):
        build_module({"kind": "timm", "architecture": "test_resnet", "kwargs": {"checkpoint_path": "weights.pt"}})


@pytest.mark.parametrize(("content", "told"), [("[]", "describes no network: it holds no JSON object"), ("{", "is not JSON")])
def test_a_damaged_description_of_a_network_is_named(content, told, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json {told}"):
        backbone_from_source(str(tmp_path))


class Waiting(nn.Module):
    """Two layers, between which two threads that read it meet."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.meeting = threading.Barrier(2, timeout=60)

    def forward(self, pixel_values):
        self.meeting.wait()
        found = self.first(pixel_values)
        self.meeting.wait()
        return self.second(found)


@torch.no_grad()
def test_threads_that_read_one_network_get_the_features_of_their_own_images():
    network, images = Waiting(), torch.randn(2, 1, 3, 5, 5)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda one: capture(network, one, {"first": 1, "second": 1}), images))
    for one, outputs in zip(images, found, strict=True):
        first = network.first(one)
        assert torch.equal(outputs["first"], first)
        assert torch.equal(outputs["second"], network.second(first))
