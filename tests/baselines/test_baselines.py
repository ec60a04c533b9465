"""Baseline translators: their formulas, their checkpoints, their null prefix, their training, and a comparison by recipes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from devil_hf import DevilModel
from devil_hf.model.pooling_devil import pool
from tests.conftest import SMALL_TRANSLATOR

BASELINES = ["clipcap", "clipcap_mlp", "limber"]


def build(sources, tokenizer, translator_type: str, layers=("layer4",), **fields) -> DevilModel:
    torch.manual_seed(4)
    settings = SMALL_TRANSLATOR | {"translator_type": translator_type, "normalize_features": True} | fields
    model = DevilModel.from_backbone_and_language_model(
        sources["backbone"], sources["language_model"], list(layers), tokenizer=tokenizer, **settings
    )
    with torch.no_grad():
        model.translator.null_feature.normal_()
    return model


@pytest.fixture(scope="module")
def baselines(sources, tokenizer):
    return {name: build(sources, tokenizer, name) for name in BASELINES}


@pytest.fixture(scope="module")
def checkpoints(baselines, processor, tmp_path_factory):
    root = tmp_path_factory.mktemp("baselines")
    for name, model in baselines.items():
        for kind in ("slim", "full"):
            model.save_pretrained(root / name / kind, slim=kind == "slim")
            processor.save_pretrained(root / name / kind)
    return root


# ------------------------------------------------------------------------------------------------- formulas, one by one


def naive_clipcap(weights: dict, feature: torch.Tensor, k: int, width: int, heads: int) -> torch.Tensor:
    """One image: k tokens of the feature and k constants through pre-norm blocks, each head by itself."""

    def linear(name, rows):
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, rows):
        return F.layer_norm(rows, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    rows = torch.cat([linear("projection", feature).view(k, width), weights["constants"]])
    for block in ("blocks.0", "blocks.1"):
        normed = norm(f"{block}.attention_norm", rows)
        query, size = linear(f"{block}.query", normed), width // heads
        key, value = linear(f"{block}.key_value", normed).split(width, dim=1)
        outputs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            attention = (query[:, part] @ key[:, part].T / size**0.5).softmax(dim=-1)
            outputs.append(attention @ value[:, part])
        rows = rows + linear(f"{block}.attention_out", torch.cat(outputs, dim=1))
        hidden = F.gelu(linear(f"{block}.feed_forward_in", norm(f"{block}.feed_forward_norm", rows)))
        rows = rows + linear(f"{block}.feed_forward_out", hidden)
    return rows[k:]


def naive_prefix(model: DevilModel, feature: torch.Tensor) -> torch.Tensor:
    weights = dict(model.translator.state_dict())
    k, width = model.config.prefix_length, model.get_input_embeddings().weight.shape[1]
    if model.config.translator_type == "clipcap":
        return naive_clipcap(weights, feature, k, width, model.config.translator_heads)
    if model.config.translator_type == "clipcap_mlp":
        hidden = torch.tanh(weights["hidden.weight"] @ feature + weights["hidden.bias"])
        assert len(hidden) == k * width // 2
        return (weights["output.weight"] @ hidden + weights["output.bias"]).view(k, width)
    return (weights["output.weight"] @ feature + weights["output.bias"]).view(k, width)


@pytest.mark.parametrize("name", BASELINES)
def test_the_prefix_is_the_papers_formula_on_the_mean_of_the_deepest_map(name, baselines, pixel_values):
    model = baselines[name]
    found = model.ask(pixel_values)
    (maps,) = model.extract_features(pixel_values)
    for row, feature_map in enumerate(maps):
        feature = F.layer_norm(feature_map.mean(dim=(1, 2)), (len(feature_map),))
        torch.testing.assert_close(found[row], naive_prefix(model, feature), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_hidden_rows_get_the_prefix_of_the_learned_null_feature(name, baselines, pixel_values):
    model = baselines[name]
    null = naive_prefix(model, model.translator.null_feature.detach())
    torch.testing.assert_close(model.null_prefix()[0], null, atol=2e-5, rtol=1e-4)
    pooled = [pool(maps, None) for maps in model.extract_features(pixel_values)]
    hidden = torch.tensor([[False], [True], [False]])
    mixed, shown = model.translate(pooled, hidden), model.translate(pooled)
    torch.testing.assert_close(mixed[1], null, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[[0, 2]], shown[[0, 2]])
    assert not torch.allclose(shown[1], null, atol=1e-2)


# ----------------------------------------------------------------------------------------- like any other checkpoint


@pytest.mark.parametrize("name", BASELINES)
def test_slim_and_full_checkpoints_answer_the_same(name, checkpoints, baselines, pixel_values, processor):
    model, phrases = baselines[name], processor(text=["a dog", "the green grass"], return_tensors="pt")
    pixel_values = pixel_values[:1]
    slim, full = (AutoModel.from_pretrained(checkpoints / name / kind) for kind in ("slim", "full"))
    for loaded in (slim, full):
        assert type(loaded.translator) is type(model.translator)
        assert torch.equal(loaded.generate(pixel_values, max_new_tokens=5), model.generate(pixel_values, max_new_tokens=5))
        expected = model.attribute(pixel_values, phrases).maps["layer4"]
        torch.testing.assert_close(loaded.attribute(pixel_values, phrases).maps["layer4"], expected, atol=1e-5, rtol=0)
        guided = loaded.describe(pixel_values, guidance=1.5, evidence=True, max_new_tokens=3)
        assert torch.isfinite(guided.token_evidence).all() and guided.token_evidence.abs().sum() > 0


FRESH_PROCESS = """
    import json, sys
    sys.modules["devil_hf"] = None  # importing it now fails
    import torch
    from transformers import AutoModel, AutoProcessor
    torch.set_num_threads(1)
    answers = {}
    for path in sys.argv[1:]:
        model = AutoModel.from_pretrained(path, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)}
        scores = model.score(**inputs, **processor(text=["a dog"], return_tensors="pt"))
        model.save_pretrained(path + "_again")  # the code travels on
        answers[path] = [scores.log_probs.item(), scores.evidence.item()]
    print(json.dumps(answers))
"""


def test_a_process_without_the_package_loads_them(checkpoints, baselines, processor, tmp_path):
    paths = [str(checkpoints / name / kind) for name, kind in zip(BASELINES, ("slim", "full", "slim"), strict=True)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(FRESH_PROCESS), *paths]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    answers = json.loads(run.stdout.splitlines()[-1])
    pixel_values = torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)
    for name, path in zip(BASELINES, paths, strict=True):
        scores = baselines[name].score(pixel_values, **processor(text=["a dog"], return_tensors="pt"))
        expected = [scores.log_probs.item(), scores.evidence.item()]
        assert answers[path] == pytest.approx(expected, abs=1e-5)
        assert Path(f"{path}_again", "baselines_devil.py").exists()


def test_several_layers_are_refused(sources, tokenizer):
    with pytest.raises(Exception, match=r"'limber' reads the pooled feature of one layer, but 2 are chosen"):
        build(sources, tokenizer, "limber", layers=("layer3", "layer4"))


def test_clipcap_needs_heads_that_divide_the_language_models_width(sources, tokenizer):
    with pytest.raises(ValueError, match="width of 32, which is not a multiple of translator_heads=3"):
        build(sources, tokenizer, "clipcap", translator_width=33, translator_heads=3)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", BASELINES)
def test_steps_lower_the_loss_and_train_the_null_feature(name, sources, tokenizer, processor, pixel_values):
    model = build(sources, tokenizer, name, null_probability=0.5, location_dropout=0.0)
    phrases = processor(text=["a red dog", "the cat on grass", "a blue square"], return_tensors="pt")
    mask = torch.tensor([[False], [True], [False]])
    null = model.translator.null_feature.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model.train()(pixel_values, **phrases, layer_mask=mask).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert not torch.equal(model.translator.null_feature, null)
