"""Choices between statements are those of scoring each text by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from devil_hf.data.statements import read_statements
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.pairs import ALL, FEWEST, NULL, PLAIN, PairScores, PairsEvaluator, PairsSettings, StatementScores
from devil_hf.settings import make
from devil_hf.statistics import roc_area

TEXTS = ["a red dog", "a blue cat", "the green circle", "a small striped square", "left of a large dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("said")
    rows = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        for kind in ("swap", "add"):
            text, false = TEXTS[number], TEXTS[(number + (kind == "swap")) % 5] + " on grass"
            rows += [{"image": f"{number}.png", "type": kind, "caption": text, "negative_caption": false}] * 3
    (place / "3.png").write_bytes(b"no image")
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    singles = [
        {"image": f"{number}.png", "statements": [{"caption": text, "label": at % 2} for at, text in enumerate(TEXTS)]}
        for number in range(3)
    ]
    (place / "singles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in singles))
    return place


def run(name, folder, model, processor, output):
    asked = {"checkpoint": "shapes", "file": str(folder / name), "batch_size": 2, "output_dir": str(output)}
    return evaluate("pairs", make(PairsSettings, asked), model, processor)


def by_hand(folder, number, text, model, processor, layers=None):
    inputs = processor(images=Image.open(folder / f"{number}.png").convert("RGB"), text=[text], return_tensors="pt")
    found = model.score(**inputs, layers=layers)
    return float(found.log_probs[0, 0]), float(found.null_log_probs[0])


def test_the_text_with_more_evidence_is_chosen(folder, model, processor, tmp_path):
    found = run("pairs.jsonl", folder, model, processor, tmp_path)
    assert found.settings["pairs"] == 18 and found.settings["bad_images"] == 1
    assert list(found.scores) == [ALL, PLAIN, *model.layer_names] and set(found.controls) == {NULL, "chance"}
    deepest = model.layer_names[-1]
    right: dict[str, list[float]] = {ALL: [], PLAIN: [], NULL: [], deepest: []}
    for number in range(3):
        for kind in ("swap", "add"):
            texts = TEXTS[number], TEXTS[(number + (kind == "swap")) % 5] + " on grass"
            (true, null), (false, null_false) = (by_hand(folder, number, text, model, processor) for text in texts)
            deep, deep_false = (by_hand(folder, number, text, model, processor, deepest)[0] for text in texts)
            right[ALL].append(true - null > false - null_false)
            right[PLAIN].append(true > false)
            right[NULL].append(null > null_false)
            right[deepest].append(deep - null > deep_false - null_false)
    rows = found.scores | found.controls
    for name, hits in right.items():
        assert rows[name]["accuracy"] == pytest.approx(np.mean(hits))
    assert "accuracy_swap" not in rows[ALL] or found.details["counts"]["accuracy_swap"] >= FEWEST
    assert "1 images could not be used" in found.text and "evidence over" in found.text


def test_single_statements_are_ranked(folder, model, processor, tmp_path):
    found = run("singles.jsonl", folder, model, processor, tmp_path)
    evidence, truth = [], []
    for number in range(3):
        for at, text in enumerate(TEXTS):
            given, null = by_hand(folder, number, text, model, processor)
            evidence.append(given - null)
            truth.append(at % 2)
    assert found.scores[ALL]["auroc"] == pytest.approx(roc_area(evidence, truth))
    assert found.controls["chance"] == {"auroc": 0.5}


def said(group, true, null, given):
    return {"group": group, "true": true, "log_probs": {NULL: null, ALL: given}}


def test_types_are_told_apart_and_ties_are_half_right():
    images = [[said("swap", True, [-3.0, -2.0], [-1.0, -2.0])] for _ in range(FEWEST)]
    images += [[said("add", True, [-1.0, -1.0], [-2.0, -2.0])] for _ in range(FEWEST)] + [[said("few", True, [0, 0], [0, 1])]]
    judged = PairScores(images)
    assert judged.counts == {"accuracy": 21, "accuracy_add": FEWEST, "accuracy_swap": FEWEST}
    assert judged.values(ALL) == pytest.approx({"accuracy": 15 / 21, "accuracy_add": 0.5, "accuracy_swap": 1})
    assert judged.values(NULL)["accuracy_swap"] == 0 and judged.intervals(ALL)["accuracy_swap"] == (1, 1)
    value, low, high = judged.lead(NULL)
    assert value == pytest.approx(15 / 21 - 5.5 / 21) and low < value < high


def test_statements_of_one_kind_alone_are_refused():
    assert StatementScores([[said("on", True, [0.0], [1.0]), said("on", False, [0.0], [0.5])]]).values(ALL) == {"auroc": 1.0}
    with pytest.raises(ValueError, match="all statements are true, or all are false"):
        StatementScores([[said("on", True, [0.0], [1.0])]] * 3)


def test_statements_of_one_kind_are_refused_before_anything_is_scored(folder, tmp_path):
    rows = [{"image": name, "caption": "a dog", "label": 1} for name in ("0.png", "./0.png", "1.png")]
    (tmp_path / "ones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [one.key for one in read_statements(tmp_path / "ones.jsonl", folder)] == ["0.png", "1.png"]
    asked = {
        "checkpoint": "shapes",
        "file": str(tmp_path / "ones.jsonl"),
        "images": str(folder),
        "output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(ValueError, match=r"ones\.jsonl: all statements are true"):
        PairsEvaluator(make(PairsSettings, asked)).open()


def test_lines_with_unknown_words_are_counted_and_left_out(folder, tmp_path):
    rows = [{"image": "0.png", "caption": "a red star", "negative_caption": false} for false in ("a blue star", "a zqxv")]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"checkpoint": "shapes", "file": str(tmp_path / "odd.jsonl"), "images": str(folder), "output_dir": str(tmp_path)}
    found = evaluate("pairs", make(PairsSettings, asked))
    assert found.settings["pairs"] == 1 and found.settings["unknown"] == 1 and "1 lines hold words" in found.text


def test_texts_that_are_cut_at_the_context_end_no_run(folder, model, processor, tmp_path):
    row = {"image": "0.png", "caption": "a red dog " * 60, "negative_caption": "a red dog " * 61}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    asked = {"checkpoint": "shapes", "file": str(tmp_path / "long.jsonl"), "images": str(folder), "output_dir": str(tmp_path)}
    found = evaluate("pairs", make(PairsSettings, asked), model, processor)
    assert found.scores[ALL]["accuracy"] == 0.5 and torch.is_grad_enabled()
