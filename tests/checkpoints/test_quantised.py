"""Whole numbers of 8 bits: near the exact answers, everywhere, and neither saved nor trained."""

import copy

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from devil_hf import DevilModel
from devil_hf.checkpoints.loading import load
from devil_hf.checkpoints.quantised import Int8Linear, quantise

from ..conftest import SMALL_TRANSLATOR


@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (2, 7, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_rounded_product(shape, bias):
    torch.manual_seed(0)
    exact = nn.Linear(16, 24, bias=bias)
    with torch.no_grad():
        exact.weight[3] = 0  # an output without any weight
        inputs = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
        found, expected = Int8Linear(exact.weight, exact.bias)(inputs), exact(inputs)
        weight = exact.weight / (exact.weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-30)
        scale = inputs.abs().amax(dim=-1, keepdim=True) / 127
        products = (inputs / scale).round() @ weight.round().T * scale * (exact.weight.abs().amax(dim=1) / 127)
        torch.testing.assert_close(found, products + (exact.bias if bias else 0), atol=1e-5, rtol=1e-5)
    # Every row has a scale of its own: a small one is as exact as a large one.
    error = (found - expected).flatten(0, -2).norm(dim=1) / expected.flatten(0, -2).norm(dim=1)
    assert 0 < error.max() < 0.03


def opt(model):
    config = OPTConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    return DevilModel.from_backbone_and_language_model(model.backbone, OPTForCausalLM(config), **SMALL_TRANSLATOR).eval()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_answers_are_near_the_exact_ones(family, model, pixel_values, phrases):
    exact = model if family == "gpt2" else opt(model)
    if family == "opt":
        phrases = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    rounded = quantise(copy.deepcopy(exact))
    left = [name for name, one in rounded.language_model.named_modules() if isinstance(one, nn.Linear)]
    assert not left and sum(isinstance(one, Int8Linear) for one in rounded.modules()) > 10
    assert type(rounded.get_output_embeddings()) is Int8Linear and rounded.layer_names == exact.layer_names
    for measure in ("evidence", "per_token"):
        found, expected = (one.attribute(pixel_values, phrases, measure=measure).maps for one in (rounded, exact))
        for name, values in expected.items():
            assert 0 < (found[name] - values).abs().mean() < 0.04
    assert rounded.describe(pixel_values, max_new_tokens=4).sequences.shape[0] == len(pixel_values) * (1 + len(exact.layer_names))


def test_what_says_nothing_finite_is_told(model, pixel_values, phrases):
    rounded = quantise(copy.deepcopy(model))
    rounded.get_output_embeddings().scales.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        rounded.score(pixel_values, **phrases)


def test_a_rounded_model_is_neither_saved_nor_trained(model, tmp_path):
    rounded = quantise(copy.deepcopy(model))
    upload = lambda: rounded.push_to_hub("user/name")  # noqa: E731
    for refused in (lambda: rounded.save_pretrained(tmp_path), upload, rounded.train, copy.deepcopy(rounded).train):
        with pytest.raises(ValueError, match="neither trained nor saved"):
            refused()
    assert not list(tmp_path.iterdir()) and not rounded.eval().training


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("outputs", [1, 2, 7])
@pytest.mark.parametrize("rows", [1, 2, 18])
def test_layers_of_any_size_are_near_the_exact_ones(columns, outputs, rows):
    torch.manual_seed(0)
    exact, inputs = nn.Linear(columns, outputs), torch.randn(rows, columns)
    if columns == 1:
        with pytest.raises(ValueError, match="too few columns"):
            Int8Linear(exact.weight, exact.bias)
        return
    with torch.no_grad():
        found = Int8Linear(exact.weight, exact.bias)(inputs)
        assert (found - exact(inputs)).abs().max() < 0.02 * (inputs.abs() @ exact.weight.abs().T).max()


def test_a_layer_of_one_column_stays_exact(model):
    other = copy.deepcopy(model)
    other.translator.extra = nn.Linear(1, 3)
    assert type(quantise(other).translator.extra) is nn.Linear


def test_other_formats_than_it_was_made_for_are_refused(model, pixel_values):
    for other in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=f"in fp32 on a CPU, and not in {other} on cpu"):
            quantise(copy.deepcopy(model)).to(other).generate(pixel_values, max_new_tokens=2)


def test_other_types_and_words_are_refused(model):
    with pytest.raises(ValueError, match="fp32 on a CPU"):
        quantise(copy.deepcopy(model).to(torch.bfloat16))
    with pytest.raises(ValueError, match="quantize='int4'"):
        load("shapes", quantize="int4")
