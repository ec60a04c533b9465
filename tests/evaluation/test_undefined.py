"""What is not defined is left out of every table, with the reason; in JSON it is null, and never NaN."""

import json
import math

import numpy as np
import pytest
import torch

from devil_hf.data.captioned import CaptionedImages
from devil_hf.evaluation.captions import CaptionsSettings, score_descriptions
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.judgement import Measured, judge
from devil_hf.evaluation.knowledge import knowledge_table, word_scores
from devil_hf.evaluation.maps.scores import Sample, summarise
from devil_hf.evaluation.milan import label_scores
from devil_hf.evaluation.results import CONTROLS, Evaluation, read_evaluations
from devil_hf.evaluation.text.metrics import caption_scores
from devil_hf.evaluation.unit_check import check_all
from devil_hf.statistics import Ratio, average_precision, bootstrap, bootstrap_draws, interval, rank_correlation


def strict(text):
    """JSON that holds no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_one_image_has_no_cider_and_no_other_images_description(model, processor, images, tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    images[0].save(source / "a.png")
    (source / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red dog on grass"}\n')
    metrics = ["bleu", "rouge_l", "cider"]
    settings = CaptionsSettings(
        checkpoint="none", source=str(source), metrics=metrics, output_dir=tmp_path / "out", max_new_tokens=4
    )
    evaluation = evaluate("captions", settings, model, processor)
    assert set(evaluation.controls) == {"constant"} and "cider" not in evaluation.metrics
    assert "at least 2 images" in evaluation.missing["cider"] and "no other image" in evaluation.missing["shuffled"]
    assert "CIDEr is missing: it weighs" in evaluation.text
    assert f"{CONTROLS['shuffled']} is missing: there is no other image" in evaluation.text
    record = strict((tmp_path / "out" / "scores.json").read_text())
    assert record["missing"] == evaluation.missing
    assert read_evaluations(tmp_path / "out" / "scores.json")[0].missing == evaluation.missing


def test_the_same_captions_for_all_images_weigh_nothing():
    scores = caption_scores(["a dog", "a cat"], [["a dog"], ["a dog"]])
    assert "cider" not in scores and "every word of them" in scores["missing"]["cider"]
    assert caption_scores(["a dog", "a cat"], [["a dog"], ["a cat"]])["cider"] > 0


@pytest.mark.parametrize("references", [[[""]], [["."], ["!"]], [["a dog"]], [["a dog"], ["a dog"]]])
def test_controls_of_descriptions_need_no_defined_cider(references):
    texts = {"all": ["a dog"] * len(references)}
    found = score_descriptions(texts, references)
    assert "cider" in found["missing"] and ("shuffled" in found["controls"]) == (len(references) > 1)


def test_one_label_cannot_be_dealt_to_another_unit():
    found = label_scores(["a dog", ""], [["a dog"], ["a cat", "cats"]], bert=None)
    assert "shuffled" not in found["scores"] and "another unit" in found["missing"]["shuffled"]
    # Of the annotators' one unit CIDEr is not defined, of both units it is.
    assert "cider" in found["scores"]["labels"] and "cider" not in found["scores"]["one annotator"]
    assert "one annotator: cider" in found["missing"]


def test_a_result_takes_out_what_is_no_number_and_says_so(tmp_path):
    scores = {"all": {"cider": float("nan"), "rouge_l": 0.5}, "layer4": {"cider": 0.25, "rouge_l": None}}
    controls = {"null": {"cider": float("inf")}}
    evaluation = Evaluation("Captions", scores, controls, details={"intervals": {"all": {"cider": [float("nan"), 1.0]}}})
    assert evaluation.scores == {"all": {"rouge_l": 0.5}, "layer4": {"cider": 0.25}} and evaluation.controls == {"null": {}}
    assert set(evaluation.missing) == {"all: cider", "layer4: rouge_l", "null: cider"}
    assert evaluation.reasons[0].startswith("all, CIDEr is missing: not defined")
    evaluation.write(tmp_path / "scores.json")
    assert strict((tmp_path / "scores.json").read_text())["intervals"]["all"]["cider"] == [None, 1.0]
    assert all(math.isfinite(result.metric_value) for result in evaluation.model_index())


def test_a_ratio_of_nothing_is_no_number_and_draws_without_it_do_not_count():
    nothing = Ratio(np.zeros(3), np.zeros(3))
    draws = bootstrap_draws(3)
    assert math.isnan(nothing.value) and nothing.interval(draws) is None
    one = Ratio.mean(np.array([0.75, np.nan, np.nan]))  # draws without the first image used to count as zero
    assert one.value == 0.75 and one.interval(draws) is None
    two = Ratio.mean(np.array([0.75, 0.75, np.nan]))
    assert two.interval(draws) == (0.75, 0.75)
    assert two.interval(draws, less=one) is None and interval(np.full(5, np.nan)) is None


def test_one_image_has_no_interval():
    assert bootstrap([0.5], [1.0]) is None and bootstrap([0.5, 0.0], [1.0, 0.0]) is None
    found = summarise([Sample(0, "dog", ("all",), {"pointing": 1.0}), Sample(0, "cat", ("all",), {"pointing": 0.0})], 100, 0)
    assert found["pointing"] == (0.5, None)


def test_what_does_not_vary_correlates_with_nothing():
    assert all(map(math.isnan, (rank_correlation([1, 1, 1], [1, 2, 3]), rank_correlation([1], [2]))))
    assert math.isnan(average_precision([0.5, 0.25], [False, False]))


def test_precision_of_words_that_nobody_said_is_left_out():
    found = word_scores(["grass", "grass"], [{"colour": {"red"}, "shape": set()}] * 2)
    assert found["colour"] == {"precision": None, "recall": 0.0, "f1": 0.0}
    assert found["shape"] == {"precision": None, "recall": None, "f1": None}
    assert "- / 0.000" in knowledge_table({"described": {"all": found}})


def test_units_that_do_the_same_everywhere_are_not_scored():
    rng = torch.Generator().manual_seed(0)
    evidence = torch.rand(2, 40, generator=rng)
    activations = torch.stack([evidence[0] - evidence[1], torch.zeros(40)])
    found = check_all(activations, evidence, ["a", "b"], ["a", "b"], permutations=100)
    assert found["units"][0]["pearson"] > 0.9 and found["units"][1]["pearson"] is None and not found["units"][1]["passed"]
    assert found["summaries"]["labels"]["pearson"] == found["units"][0]["pearson"]
    silent = check_all(torch.zeros(2, 40), evidence, ["a", "b"], ["a", ""], permutations=100)
    assert silent["summaries"]["labels"] == {"units": 2, "pearson": None, "auprc": None, "passed": 0.0}
    assert "shuffled" not in silent["summaries"]


def test_a_verdict_does_without_cider_and_never_trusts_one_image():
    captions = [["a dog"], ["a dog"], ["a dog"]]
    data = CaptionedImages("photos", "photos", ["0", "1", "2"], captions, load=None)
    texts = {"all": "a dog"} | dict.fromkeys(CONTROLS, "a cat")
    measured = {
        name: Measured([text] * 3, np.full(3, 1.0 if name == "all" else 0.0), np.array([0.1, np.nan, np.nan]))
        for name, text in texts.items()
    }
    found = judge(measured, data)
    assert "cider" in found["missing"] and all(
        "cider" not in row for row in (found["scores"]["all"], *found["controls"].values())
    )
    assert found["intervals"]["null"]["map_correlation"] is None
    assert not found["verdict"]["passed"] and "no interval: fewer than 2 images" in found["verdict"]["reason"]
    for one in measured.values():
        one.correlation = np.array([0.1, 0.2, np.nan])
    assert judge(measured, data)["verdict"]["passed"]
