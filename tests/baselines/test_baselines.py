"""Baseline translators: their formulas, their checkpoints, their null prefix, their training, and a comparison by recipes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModel

from devil_hf import DevilModel
from devil_hf.model.pooling_devil import pool
from devil_hf.questions.grounding import describe_grounded
from devil_hf.training import comparison
from devil_hf.training.comparison import EvaluationImages, compare, comparison_table, read_comparison, summarise
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
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
        assert torch.equal(
            loaded.generate(pixel_values, max_new_tokens=5), model.generate(pixel_values, max_new_tokens=5)
        )
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


def test_several_layers_are_refused_before_anything_is_trained(sources, tokenizer, fields, monkeypatch):
    with pytest.raises(Exception, match=r"'limber' reads the pooled feature of one layer, but 2 are chosen"):
        build(sources, tokenizer, "limber", layers=("layer3", "layer4"))
    monkeypatch.setattr("devil_hf.training.run.DevilTrainer.train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(Exception, match="set layers to one of"):
        train(Recipe(**fields | {"model": SMALL_TRANSLATOR | {"translator_type": "clipcap"}}))


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


@pytest.fixture
def fields(sources, images, tmp_path):
    """A tiny run on files, from cached features."""
    folder = tmp_path / "captions"
    folder.mkdir()
    lines = []
    for index in range(6):
        images[index % 3].rotate(10 * index).save(folder / f"{index}.png")
        split = "train" if index < 4 else "val"
        lines.append(json.dumps({"image": f"{index}.png", "captions": ["a red dog", "the cat"], "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return {
        "output_dir": str(tmp_path / "run"),
        "backbone": sources["backbone"],
        "language_model": sources["language_model"],
        "train_data": [{"kind": "folder", "path": str(folder), "split": "train"}],
        "validation_data": [{"kind": "folder", "path": str(folder), "split": "val"}],
        "cache_features": str(tmp_path / "features"),
        "draws": 2,
        "model": SMALL_TRANSLATOR,
        "batch_size": 4,
        "max_steps": 2,
        "evaluation_steps": 2,
        "logging_steps": 2,
        "warmup_steps": 1,
        "report_to": "none",
        "precision": "fp32",
    }


def test_a_checkpoints_frozen_parts_take_a_translator_of_one_of_its_layers(fields, model, processor, tmp_path):
    base = tmp_path / "base"
    model.save_pretrained(base, slim=True)
    processor.save_pretrained(base)
    more = {name: value for name, value in fields.items() if name not in ("backbone", "language_model")}
    more |= {"checkpoint": str(base), "cache_features": "", "validation_data": []}
    own = {"new_translator": True, "layers": ["layer3"], "model": SMALL_TRANSLATOR | {"translator_type": "limber"}}
    trained = AutoModel.from_pretrained(train(Recipe(**more | own)))
    assert trained.layer_names == ["layer3"] and trained.config.translator_type == "limber"
    with pytest.raises(ValueError, match="set new_translator"):
        train(Recipe(**more | {"layers": ["layer3"], "model": {}}))


def test_seeds_share_a_cache_but_not_a_course(fields, tmp_path, monkeypatch):
    fields |= {"validation_data": []}
    first = train(Recipe(**fields))
    monkeypatch.setattr("devil_hf.training.feature_cache._draw", lambda *_: pytest.fail("features were computed again"))
    second = train(Recipe(**fields | {"seed": 5, "output_dir": str(tmp_path / "second")}))
    models = [AutoModel.from_pretrained(path).translator.queries for path in (first, second)]
    assert not torch.equal(*models)


# ---------------------------------------------------------------------------------------------------------- comparison


@pytest.fixture
def comparison_file(fields, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    own = {"layers": ["layer4"], "draws": 1, "cache_features": str(tmp_path / "whole")}
    content = {
        "recipe": "recipe.yaml",
        "evaluation_data": fields["validation_data"],
        "translators": {
            "devil": None,
            "linear": own | {"model": {"translator_type": "limber", "location_dropout": 0.0}},
        },
    }
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_comparison_trains_each_translator_once_and_scores_all_on_the_same_images(
    comparison_file, tmp_path, monkeypatch
):
    asked = read_comparison(comparison_file, fields={"max_steps": 4})
    assert asked.recipes["linear"].model == SMALL_TRANSLATOR | {"translator_type": "limber", "location_dropout": 0.0}
    assert {recipe.max_steps for recipe in asked.recipes.values()} == {4}
    results = compare(asked, [3], tmp_path / "runs")
    assert [(run["name"], run["seed"]) for run in results] == [("devil", 3), ("linear", 3)]
    assert results[0]["images"] == results[1]["images"] and len(set(results[0]["images"])) == 2
    assert [set(run["scores"]["greedy"]) for run in results] == [{"all", "layer4"}, {"all"}]
    model = AutoModel.from_pretrained(tmp_path / "runs/linear/seed_3/checkpoint")
    assert results[1]["trained_parameters"] == sum(p.numel() for p in model.translator.parameters())
    # What is finished stays; another evaluation trains nothing either, and costs no earlier one.
    monkeypatch.setattr(comparison, "train", lambda recipe: pytest.fail("it was trained again"))
    del asked.recipes["devil"]
    asked.decodings = {"beams": {"num_beams": 2}}
    assert set(compare(asked, [3], tmp_path / "runs")[0]["scores"]) == {"beams"}
    asked.decodings = {"grounded": {"num_beams": 3, "grounding": 2.0}}
    (grounded,) = compare(asked, [3], tmp_path / "runs")
    loaded, processor = comparison.load(tmp_path / "runs/linear/seed_3/checkpoint")
    shown = EvaluationImages(asked.evaluation_data)
    samples = list(shown._batches(processor))
    alone = describe_grounded(loaded, processor, torch.cat(samples), candidates=3, strength=2.0, max_new_tokens=40)
    assert grounded["descriptions"]["grounded"]["all"] == [one.text for one in alone]
    monkeypatch.setattr(comparison, "load", lambda path: pytest.fail("it was evaluated again"))
    asked.decodings = {"greedy": {}}
    assert compare(asked, [3], tmp_path / "runs") == json.loads(json.dumps(results[1:]))
    with pytest.raises(ValueError, match=r"other values of \['learning_rate'\]"):
        compare(read_comparison(comparison_file, fields={"max_steps": 4, "learning_rate": 0.5}), [3], tmp_path / "runs")


def test_the_table_has_means_and_standard_deviations_over_seeds():
    def result(name, seed, value):
        scores = {"greedy": {"all": {"cider": value}}}
        return {"name": name, "seed": seed, "trained_parameters": 10, "validation_loss": 2.0 + seed, "scores": scores}

    summary = summarise([result("a", 0, 0.1), result("b", 0, 0.5), result("a", 1, 0.3), result("b", 1, 0.5)])
    assert [entry["name"] for entry in summary] == ["a", "b"]
    assert summary[0]["cider"]["greedy"]["mean"] == pytest.approx(20)
    assert summary[0]["cider"]["greedy"]["sd"] == pytest.approx(2**0.5 * 10)
    assert "20.0 ± 14.1" in comparison_table(summary) and "2.500 ± 0.707" in comparison_table(summary)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"translators": {"a": {"learning_rat": 1}}}, "learning_rat"),
        ({"evaluation_dat": []}, "evaluation_dat"),
        ({"recipe": "nowhere.yaml"}, "nowhere"),
        ({"translators": {"a": {"learning_rate": "fast"}}}, "fast"),
    ],
)
def test_a_wrong_comparison_is_named(change, text, comparison_file):
    content = yaml.safe_load(comparison_file.read_text())
    comparison_file.write_text(yaml.safe_dump(content | change))
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        read_comparison(comparison_file)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "scripts/comparisons").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_comparison_is_valid(file):
    found = read_comparison(file, fields={"report_to": "none"})
    recipes = found.recipes.values()
    assert len({(r.max_steps, r.batch_size, str(r.train_data), r.views) for r in recipes}) == 1  # one budget
    if file.stem == "lora":
        without, adapted = ({r.language_model for r in recipes if bool(r.lora) is lora} for lora in (False, True))
        assert without == adapted and {r.lora["rank"] for r in recipes if r.lora} == {8}
    else:
        assert {r.model.get("translator_type", "transformer") for r in recipes} == {"transformer", *BASELINES}
        assert len({r.language_model for r in recipes}) == 1
