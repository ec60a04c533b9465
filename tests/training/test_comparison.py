"""Translators beside each other: one comparison file, one cache of features, one table."""

import json
import os
import shutil

import pytest
import torch
import yaml
from scipy.stats import ttest_ind
from transformers import AutoModel

from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.regions import RegionsSettings
from devil_hf.folders import CLAIM, FolderInUse
from devil_hf.questions.grounding import describe_grounded
from devil_hf.training import comparison
from devil_hf.training.comparison import EvaluationImages, compare, comparison_table, read_comparison, summarise
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from tests.conftest import SMALL_TRANSLATOR
from tests.training.runs import CAPTIONS, ROOT

BASELINES = ("clipcap", "clipcap_mlp", "limber")


@pytest.fixture
def fields(shared_fields, tmp_path):
    """A tiny run from cached features."""
    own = {
        "output_dir": str(tmp_path / "run"),
        "cache_features": str(tmp_path / "features"),
        "draws": 2,
        "max_steps": 2,
    }
    return shared_fields | own


def test_several_layers_of_a_baseline_are_refused_before_anything_is_trained(fields, monkeypatch):
    monkeypatch.setattr("devil_hf.training.run.DevilTrainer.train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(Exception, match="set layers to one of"):
        train(Recipe(**fields | {"model": SMALL_TRANSLATOR | {"translator_type": "clipcap"}}))


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


def test_a_comparison_trains_each_translator_once_and_scores_all_on_the_same_images(comparison_file, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "NEW_TOKENS", 8)
    asked = read_comparison(comparison_file, fields={"max_steps": 4})
    assert asked.recipes["linear"].model == SMALL_TRANSLATOR | {"translator_type": "limber", "location_dropout": 0.0}
    assert {recipe.max_steps for recipe in asked.recipes.values()} == {4}
    results = compare(asked, [3], tmp_path / "runs")
    assert [(run["name"], run["seed"]) for run in results] == [("devil", 3), ("linear", 3)]
    assert results[0]["images"] == results[1]["images"] and len(set(results[0]["images"])) == 3
    assert [set(run["scores"]["greedy"]) for run in results] == [{"all", "layer4"}, {"all"}]
    model = AutoModel.from_pretrained(tmp_path / "runs/linear/seed_3/checkpoint")
    assert results[1]["trained_parameters"] == sum(p.numel() for p in model.translator.parameters())
    # What is finished stays; another evaluation trains nothing either, and costs no earlier one.
    assert results[0]["evaluations"] == {}
    monkeypatch.setattr(comparison, "train", lambda recipe: pytest.fail("it was trained again"))
    del asked.recipes["devil"]
    asked.decodings = {"beams": {"num_beams": 2}}
    assert set(compare(asked, [3], tmp_path / "runs")[0]["scores"]) == {"beams"}
    asked.decodings = {"grounded": {"num_beams": 3, "grounding": 2.0}}
    (grounded,) = compare(asked, [3], tmp_path / "runs")
    loaded, processor = comparison.load(tmp_path / "runs/linear/seed_3/checkpoint")
    shown = EvaluationImages(asked.evaluation_data)
    samples = list(shown._batches(processor))
    alone = describe_grounded(loaded, processor, torch.cat(samples), candidates=3, strength=2.0, max_new_tokens=8)
    assert grounded["descriptions"]["grounded"]["all"] == [one.text for one in alone]
    monkeypatch.setattr(comparison, "load", lambda path: pytest.fail("it was evaluated again"))
    asked.decodings = {"greedy": {}}
    assert compare(asked, [3], tmp_path / "runs") == json.loads(json.dumps(results[1:]))
    with pytest.raises(ValueError, match=r"other values of \['learning_rate'\]"):
        compare(read_comparison(comparison_file, fields={"max_steps": 4, "learning_rate": 0.5}), [3], tmp_path / "runs")


def test_a_comparison_evaluates_what_else_it_is_asked(comparison_file, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "NEW_TOKENS", 4)
    settings = {"source": "shapes:3", "layers": ["layer3", "layer4"], "max_new_tokens": 4}
    regions = {"evaluator": "regions", "settings": settings, "show": ["head_word", "rouge_l", "absent"]}
    content = yaml.safe_load(comparison_file.read_text())
    comparison_file.write_text(yaml.safe_dump(content | {"evaluations": {"regions": regions}}))
    asked = read_comparison(comparison_file)
    results = compare(asked, [3], tmp_path / "runs")
    found = {run["name"]: run["evaluations"]["regions"] for run in results}
    assert set(found["devil"]) == {"all", "layer3", "layer4"} and set(found["linear"]) == {"all", "layer4"}
    model, processor = comparison.load(tmp_path / "runs/devil/seed_3/checkpoint")
    own = RegionsSettings(checkpoint="", output_dir=tmp_path / "own", **settings)
    assert evaluate("regions", own, model, processor).scores == found["devil"]
    (entry, _, other) = summarise(results, evaluations=asked.evaluations)
    assert entry["evaluations"]["regions: ROUGE-L"]["mean"] == found["devil"]["all"]["rouge_l"]
    text = comparison_table([entry, other])
    assert "regions: ROUGE-L" in text and text.endswith("not among the scores of every run, or misspelt: regions: absent")
    # Other boxes are other results, in a folder of their own.
    asked.evaluations["regions"].settings = settings | {"source": "shapes:2", "layers": ["layer4"]}
    again = compare(asked, [3], tmp_path / "runs")
    assert len(list((tmp_path / "runs/devil/seed_3").glob("regions_*"))) == 2
    assert [set(run["evaluations"]["regions"]) for run in again] == [{"all", "layer4"}] * 2
    asked.evaluations["regions"].settings["layers"] = ["layer3"]
    asked.recipes = {"linear": asked.recipes["linear"]}
    with pytest.raises(ValueError, match=r"layers \['layer3'\], which no translator reads: \['layer4'\]"):
        compare(asked, [3], tmp_path / "runs")


def test_a_checkpoint_that_was_changed_is_scored_again(comparison_file, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "NEW_TOKENS", 4)
    settings = {"source": "shapes:3", "layers": ["layer4"], "max_new_tokens": 4}
    regions = {"evaluator": "regions", "settings": settings, "show": ["head_word"]}
    content = yaml.safe_load(comparison_file.read_text())
    comparison_file.write_text(yaml.safe_dump(content | {"evaluations": {"regions": regions}}))
    asked = read_comparison(comparison_file)
    asked.recipes = {"linear": asked.recipes["linear"]}
    (before,) = compare(asked, [3], tmp_path / "runs")
    folder = tmp_path / "runs/linear/seed_3"
    file = folder / "checkpoint/processor_config.json"
    changed = json.loads(file.read_text())
    changed["image_processor"]["image_std"] = [0.01, 0.02, 0.03]
    file.write_text(json.dumps(changed))
    monkeypatch.setattr(comparison, "train", lambda recipe: pytest.fail("it was trained again"))
    (after,) = compare(asked, [3], tmp_path / "runs")
    assert after["checkpoint"] != before["checkpoint"] and len(list(folder.glob("regions_*"))) == 2
    monkeypatch.setattr(comparison, "load", lambda path: pytest.fail("it was evaluated again"))
    assert compare(asked, [3], tmp_path / "runs") == [after]
    for file in (scores := next(folder.glob("scores_*.json"))), folder / "checkpoint/calibration.json":
        file.write_text(json.dumps({name: part for name, part in after.items() if name != "checkpoint"}))
    (without,) = compare(asked, [3], tmp_path / "runs")
    assert "checkpoint" not in without, "results of before stay"
    scores.write_text(json.dumps(after))
    assert compare(asked, [3], tmp_path / "runs") == [after], "what lies beside a checkpoint does not count"
    shutil.rmtree(folder / "checkpoint")
    assert compare(asked, [3], tmp_path / "runs") == [after], "without its checkpoint, what is finished stays"


def test_a_checkpoint_is_known_by_the_content_of_its_large_files_too(tmp_path):
    folder, copy = tmp_path / "checkpoint", tmp_path / "copy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_bytes(b"a" * (1 << 21))
    shutil.copytree(folder, copy)
    os.utime(copy / "tokenizer.json", (1, 1))
    assert comparison._checkpoint_identity(copy) == comparison._checkpoint_identity(folder)
    (copy / "tokenizer.json").write_bytes(b"a" * (1 << 20) + b"b" + b"a" * ((1 << 20) - 1))
    assert comparison._checkpoint_identity(copy) != comparison._checkpoint_identity(folder)


def test_changed_images_are_scored_anew_and_never_taken_for_those_of_a_training(comparison_file, images, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number, split in enumerate(["train"] * 4 + ["val"] * 2):
        images[number % 3].rotate(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": CAPTIONS[number % 4], "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(comparison, "NEW_TOKENS", 4)
    train_data, evaluation_data = ([{"kind": "folder", "path": str(folder), "split": split}] for split in ("train", "val"))
    changes = {"train_data": train_data, "validation_data": [], "cache_features": ""}
    asked = read_comparison(comparison_file, fields=changes)
    asked.evaluation_data = evaluation_data
    del asked.recipes["devil"]
    (before,) = compare(asked, [3], tmp_path / "runs")
    monkeypatch.setattr(comparison, "train", lambda recipe: pytest.fail("it was trained again"))
    images[0].rotate(90).save(folder / "5.png")
    (after,) = compare(asked, [3], tmp_path / "runs")
    assert before["evaluation"]["data_sha256"] != after["evaluation"]["data_sha256"]
    assert len(list((tmp_path / "runs/linear/seed_3").glob("scores_*.json"))) == 2
    images[0].rotate(90).save(folder / "0.png")
    with pytest.raises(ValueError, match=r"captions of train_data have changed since .*checkpoint-2"):
        compare(asked, [3], tmp_path / "runs")
    claim = tmp_path / "runs/linear/seed_3" / CLAIM
    claim.write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    images[0].rotate(0).save(folder / "0.png")
    assert compare(asked, [3], tmp_path / "runs") == [after], "what is finished is read, and needs no claim"
    asked.decodings = {"beams": {"num_beams": 2}}
    with pytest.raises(FolderInUse):
        compare(asked, [3], tmp_path / "runs")


def test_the_table_has_means_and_standard_deviations_over_seeds():
    def result(name, seed, value):
        scores = {"greedy": {"all": {"cider": value}}}
        return {"name": name, "seed": seed, "trained_parameters": 10, "validation_loss": 2.0 + seed, "scores": scores}

    summary = summarise([result("a", 0, 0.1), result("b", 0, 0.5), result("a", 1, 0.3), result("b", 1, 0.5)])
    assert [entry["name"] for entry in summary] == ["a", "b"]
    assert summary[0]["cider"]["greedy"]["mean"] == pytest.approx(20)
    assert summary[0]["cider"]["greedy"]["sd"] == pytest.approx(2**0.5 * 10)
    text = comparison_table(summary)
    assert "20.0 ± 14.1" in text and "2.500 ± 0.707" in text
    apart = ttest_ind([10, 30], [50, 50], equal_var=False).confidence_interval()
    assert f"-30.0 [{apart.low:+.1f}, {apart.high:+.1f}]" in text and "+0.000 [" in text
    assert "difference" not in comparison_table(summarise([result("a", 0, 0.1), result("b", 0, 0.5)]))
    assert "difference" not in comparison_table(summarise([result("a", 0, 0.1), result("a", 1, 0.5)]))
    assert "nan" not in comparison_table(summarise([result("a", 0, 0.1), result("a", 1, 0.5), result("b", 0, 0.5)]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"translators": {"a": {"learning_rat": 1}}}, "learning_rat"),
        ({"evaluation_dat": []}, "evaluation_dat"),
        ({"recipe": "nowhere.yaml"}, "nowhere"),
        ({"evaluations": {"../a": {"evaluator": "regions", "settings": {}, "show": []}}}, "folders are named by them"),
        ({"evaluations": {"a": {"evaluator": "regions", "settings": {}}}}, "show is missing"),
        ({"translators": {"a": {"learning_rate": "fast"}}}, "fast"),
    ],
)
def test_a_wrong_comparison_is_named(change, text, comparison_file):
    content = yaml.safe_load(comparison_file.read_text())
    comparison_file.write_text(yaml.safe_dump(content | change))
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        read_comparison(comparison_file)


@pytest.mark.parametrize("file", sorted((ROOT / "scripts/comparisons").glob("*.yaml")), ids=lambda f: f.stem)
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


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"evaluator": "nowhere", "settings": {}}, "nowhere"),
        ({"evaluator": "regions", "settings": {"sourc": "shapes:3"}}, "sourc"),
        ({"evaluator": "regions", "settings": {"source": "absent/folder"}}, "absent/folder"),
    ],
)
def test_a_wrong_evaluation_is_named_before_anything_is_trained(asked, text, comparison_file, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "train", lambda recipe: pytest.fail("training began"))
    content = yaml.safe_load(comparison_file.read_text())
    comparison_file.write_text(yaml.safe_dump(content | {"evaluations": {"a": asked | {"show": ["cider"]}}}))
    with pytest.raises((ValueError, OSError), match=text):
        compare(read_comparison(comparison_file), [3], tmp_path / "runs")
