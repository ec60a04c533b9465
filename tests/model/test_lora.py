"""LoRA: trained beside the translator, in every kind of checkpoint, for every kind of language model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from devil_hf import DevilModel
from devil_hf.build import merge_lora
from devil_hf.build.lora_devil import add_lora, lora_layers
from tests.conftest import SMALL_TRANSLATOR
from tests.model.test_checkpoints import change_config


@pytest.fixture(scope="module")
def lora_model(sources, tokenizer):
    """A model whose adapters say something: freshly made ones add nothing."""
    torch.manual_seed(4)
    model = DevilModel.from_backbone_and_language_model(
        sources["backbone"], sources["language_model"], tokenizer=tokenizer, lora={"rank": 3}, **SMALL_TRANSLATOR
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def captions(processor):
    return dict(processor(text=["a red dog", "the cat on grass", "a square"], return_tensors="pt"))


def test_fresh_adapters_change_nothing_and_are_all_that_trains_beside_the_translator(model, sources, tokenizer):
    torch.manual_seed(2)
    fresh = DevilModel.from_backbone_and_language_model(
        sources["backbone"], sources["language_model"], tokenizer=tokenizer, lora={}, **SMALL_TRANSLATOR
    )
    embeds = torch.randn(2, 5, 32)
    ones = torch.ones(2, 5, dtype=torch.long)
    found, expected = (m.language_model(inputs_embeds=embeds, attention_mask=ones).logits for m in (fresh, model))
    torch.testing.assert_close(found, expected)
    trained = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert trained == set(fresh.trainable_state_dict())
    assert any(".lora_A." in name for name in trained) and any(name.startswith("translator.") for name in trained)
    assert not any(name.startswith("backbone.") or ".base_layer." in name for name in trained)


def test_slim_full_and_merged_checkpoints_load_with_equal_logits_without_the_package(
    lora_model, processor, pixel_values, captions, tmp_path
):
    with torch.no_grad():
        expected = lora_model(pixel_values, **captions).logits
    lora_model.save_pretrained(tmp_path / "slim", slim=True)
    lora_model.save_pretrained(tmp_path / "full")
    merged = merge_lora(DevilModel.from_pretrained(tmp_path / "full"))
    merged.save_pretrained(tmp_path / "merged")
    assert not any(True for _ in lora_layers(merged.language_model))
    assert not any(".lora_" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(merged)
    with pytest.raises(ValueError, match="slim=False"):
        merged.save_pretrained(tmp_path / "impossible", slim=True)
    torch.save({"pixel_values": pixel_values, **captions}, tmp_path / "inputs.pt")
    script = (
        "import sys, torch\nfrom transformers import AutoModel\n"
        "assert 'devil_hf' not in sys.modules\n"
        "inputs = torch.load('inputs.pt', weights_only=True)\n"
        "for kind in ('slim', 'full', 'merged'):\n"
        "    model = AutoModel.from_pretrained(kind, trust_remote_code=True)\n"
        "    assert type(model).__module__.startswith('transformers_modules.')\n"
        "    with torch.no_grad(): torch.save(model(**inputs).logits, kind + '.pt')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    for kind in ("slim", "full", "merged"):
        torch.testing.assert_close(torch.load(tmp_path / f"{kind}.pt", weights_only=True), expected, atol=1e-4, rtol=0)


def test_the_hash_in_a_slim_checkpoint_is_that_of_the_weights_without_adapters(lora_model, model, tmp_path):
    lora_model.save_pretrained(tmp_path, slim=True)
    source = json.loads((tmp_path / "config.json").read_text())["language_model_source"]
    assert source["sha256"] == model.config.language_model_source["sha256"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(lora_model.trainable_state_dict())


def test_only_what_is_trained_is_in_training_mode(sources, tokenizer):
    model = DevilModel.from_backbone_and_language_model(
        sources["backbone"], sources["language_model"], tokenizer=tokenizer, lora={"dropout": 0.1}, **SMALL_TRANSLATOR
    ).train()
    training = {name for name, module in model.named_modules() if module.training and name}
    assert training
    assert all(name.startswith("translator") or ".lora_dropout" in name for name in training)
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2),
        OPTConfig(
            vocab_size=50,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=32,
        ),
        LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_every_family_has_default_targets(config, model):
    language_model = AutoModelForCausalLM.from_config(config)
    lora = DevilModel.from_backbone_and_language_model(model.backbone, language_model, lora={"rank": 2}, **SMALL_TRANSLATOR)
    assert any(True for _ in lora_layers(lora.language_model))
    assert not any("lm_head" in name for name, _ in lora_layers(lora.language_model))


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": "8"}, "rank='8'"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"r": 4}, "'r'"),
        ({"dropout": 1.5}, "1.5"),
        ({"dropout": None}, "dropout=None"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"target_modules": "(a+)+$"}, "target_modules"),  # a regular expression that takes forever
        ({"target_modules": [3]}, "target_modules"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(lora, text):
    with pytest.raises(ValueError, match=text):
        DevilModel.from_backbone_and_language_model("nowhere", "nowhere", lora=lora)
    with pytest.raises(ValueError, match=text):
        add_lora(torch.nn.Linear(2, 2), lora)


def test_a_rank_beyond_the_width_is_refused_before_memory_is_taken(model, tmp_path):
    language_model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="rank=3000000 is more than the width 16"):
        add_lora(language_model, {"rank": 3_000_000})
    add_lora(language_model, {"rank": 16, "target_modules": "all-linear"})
    model.save_pretrained(tmp_path, slim=True)
    change_config(tmp_path, lora={"rank": 3_000_000})
    with pytest.raises(ValueError, match="rank=3000000 is more than the width"):
        DevilModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["c_attn", "lm_head"]], ids=str)
def test_adapters_on_tied_weights_are_refused_before_anything_changes(targets):
    language_model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="whose weights another layer reads"):
        add_lora(language_model, {"target_modules": targets})
    assert not any(True for _ in lora_layers(language_model))


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"]], ids=str)
@torch.no_grad()
def test_adapters_on_a_head_or_embeddings_of_their_own_say_the_same_when_merged(targets, model, captions, pixel_values):
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    language_model = AutoModelForCausalLM.from_config(config)
    lora = {"rank": 2, "target_modules": targets}
    plain = DevilModel.from_backbone_and_language_model(model.backbone, language_model, lora=lora, **SMALL_TRANSLATOR)
    for name, parameter in plain.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.3)
    expected = plain(pixel_values, **captions).logits
    torch.testing.assert_close(merge_lora(plain)(pixel_values, **captions).logits, expected, atol=1e-4, rtol=1e-4)
