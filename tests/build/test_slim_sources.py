"""What the sources of a slim checkpoint, and of a new model, may hold: the numbers of a network, as they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from devil_hf.build import backbone_from_source
from devil_hf.build.slim_devil import load_language_model, load_network


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_a_configuration_of_quantised_weights_is_refused(field, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: {}}))
    load_language_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {field: {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=f"quantised weights .{field}.*pass the module"):
        load_language_model(str(folder))
    with pytest.raises(OSError, match=f"quantised weights .{field}"):
        load_network({"kind": "transformers"}, folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32], ids=str)
def test_weights_of_other_types_are_refused(dtype, folder):
    """Their scales would be thrown away."""
    change_weights(folder, lambda weights: weights.update({NAME: weights[NAME].to(dtype)}))
    with pytest.raises(ValueError, match=rf"in {NAME}"):
        load_language_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_any_floating_point_type_are_read(dtype, folder):
    change_weights(folder, lambda weights: weights.update({NAME: weights[NAME].to(dtype)}))
    expected = load_file(folder / "model.safetensors")[NAME].float()
    found, _ = load_language_model(str(folder))
    assert torch.equal(found.state_dict()[NAME], expected)


def test_scales_beside_weights_and_missing_weights_are_refused(folder):
    change_weights(folder, lambda weights: weights.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    load_language_model(str(folder))  # as old ones have it
    change_weights(folder, lambda weights: weights.update({f"{NAME}_scale_inv": torch.ones(1)}))
    with pytest.raises(ValueError, match=rf"{NAME}_scale_inv beside the weights"):
        load_language_model(str(folder))
    change_weights(folder, lambda weights: (weights.pop(f"{NAME}_scale_inv"), weights.pop(NAME)))
    with pytest.raises(ValueError, match=f"lacks 1 weights of a language model, {NAME}"):
        load_language_model(str(folder))


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000])
def test_a_configuration_that_is_none_is_named(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        backbone_from_source(folder)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        load_language_model(str(folder))


def test_what_a_checkpoint_asks_for_is_counted_before_memory_is_taken(sources):
    backbone = backbone_from_source(sources["backbone"])
    wide = backbone.config | {"kwargs": backbone.config["kwargs"] | {"channels": [2**24] * 4}}
    with pytest.raises(OSError, match="asks for far more"):
        load_network(wide, sources["backbone"])
