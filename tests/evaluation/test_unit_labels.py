"""Labels of units: masked pooling as in a naive loop, strategies that keep their promise, and labels that are checked."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from devil_hf.checkpoints.loading import load
from devil_hf.cli.main import main
from devil_hf.data.exemplars import find_exemplars
from devil_hf.data.images import open_images
from devil_hf.data.unit_features import PooledUnits, encoded_features, own_features, pool_units
from devil_hf.data.unit_reader import UnitReader
from devil_hf.evaluation import unit_check
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.results import read_evaluations
from devil_hf.evaluation.unit_check import UnitsSettings
from devil_hf.evaluation.units.labels import label_units
from devil_hf.evaluation.units.simulation import (
    check_constant,
    check_labels,
    check_shuffled,
    correlation_test,
    held_out_activations,
    held_out_evidence,
    precision_test,
    ranked_precision,
    shuffled_labels,
)
from devil_hf.model.pooling_devil import region_weights
from devil_hf.report.neurons import NeuronsSettings, neurons
from devil_hf.statistics import average_precision, false_discovery
from tests.evaluation.planted import CONCEPTS, concept_locations, fit_probes, planted_probes, selectivity


@pytest.fixture(scope="module")
def exemplars(model, processor, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("units") / "exemplars"
    reader = UnitReader(model.backbone, layers=[0, -1])
    pictures = [image.rotate(angle) for image in images for angle in (0, 90, 180)]
    return find_exemplars(reader, processor.image_processor, open_images(pictures), folder, k=3)


@pytest.fixture(scope="module")
def pooled(model, processor, exemplars):
    few = own_features(model, exemplars)
    rows = torch.tensor([0, 1, 40, 70])
    features = [None if one is None else one[rows] for one in few.features]
    return PooledUnits([few.units[at] for at in rows.tolist()], features, few.hidden[rows])


def test_re_encoded_units_equal_a_loop_over_exemplars(model, processor, exemplars):
    batched = encoded_features(model, processor, exemplars)
    for at in (0, 3, len(exemplars) - 1):
        unit = exemplars[at]
        sums, counts = [0.0] * len(model.layer_names), [0] * len(model.layer_names)
        for image, mask in zip(unit.images, unit.masks, strict=True):
            pixel_values = processor(images=image.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
            geometry = processor.image_processor.geometry(mask.shape)
            (top, left), (height, width) = geometry.offset, geometry.crop_size
            resized = F.interpolate(
                mask[None, None].float(), geometry.resized_size, mode="bilinear", antialias=True, align_corners=False
            )[..., top : top + height, left : left + width]
            for layer, feature_map in enumerate(model.extract_features(pixel_values)):
                weights, empty = region_weights(resized, feature_map.shape[-2:])
                if not empty.any():
                    sums[layer] = sums[layer] + (feature_map[0] * weights[0]).sum(dim=(1, 2))
                    counts[layer] += 1
        for layer, count in enumerate(counts):
            assert bool(batched.hidden[at, layer]) == (count == 0)
            if count:
                torch.testing.assert_close(batched.features[layer][at], sums[layer] / count, rtol=1e-3, atol=1e-4)
    # A sequence of units that are no exemplar set goes another way, to the same place.
    one_by_one = encoded_features(model, processor, [exemplars[0], exemplars[3]])
    for layer, features in enumerate(one_by_one.features):
        torch.testing.assert_close(features, batched.features[layer][[0, 3]], rtol=1e-3, atol=1e-4)


def test_own_features_show_the_units_layer_alone(model, processor, exemplars):
    own = own_features(model, exemplars)
    first, last = model.layer_names[0], model.layer_names[-1]
    assert exemplars.layers == [first, last] and own.units[0] == (first, 0) and own.units[-1][0] == last
    loud = ~own.silent
    assert loud.any() and own.hidden[loud & torch.tensor([name == first for name, _ in own.units])][:, 1:].all()
    torch.testing.assert_close(own.features[0][0], exemplars.tensors[first]["features"][0])


def test_own_features_of_another_network_are_refused(model, processor, exemplars):
    other = dict(exemplars.summary) | {"weights_sha256": "0" * 64}
    stranger = type(exemplars)(exemplars.folder, other)
    with pytest.raises(ValueError, match='use the mode "pixels"'):
        pool_units(model, processor, stranger, "features")


def naive_scores(model, prefix, tokens):
    """log p(tokens | prefix), and under the null prefix, of one row, by one plain forward pass each."""
    results = []
    for start in (prefix, model.null_prefix()):
        words = model.get_input_embeddings()(tokens[None])
        embeds = torch.cat([model.embed_prefix(start), words], dim=1)
        logits = model.language_model(inputs_embeds=embeds).logits[0, -len(tokens) - 1 : -1].log_softmax(dim=-1)
        results.append(logits.gather(1, tokens[:, None]).sum().item())
    return results


@torch.no_grad()
def test_rerank_takes_the_beam_with_the_most_information(model, processor, pooled):
    rows = label_units(model, processor, pooled, "rerank", candidates=3, prior_weight=0.7, max_new_tokens=5)
    greedy = label_units(model, processor, pooled, "greedy", candidates=3, max_new_tokens=5)
    for at, row in enumerate(rows):
        assert (row["layer"], row["unit"]) == pooled.units[at]
        features = [None if one is None else one[at : at + 1] for one in pooled.features]
        prefix = model.translate(features, pooled.hidden[at : at + 1])
        beams = model.decode(prefix, num_beams=3, num_return_sequences=3, max_new_tokens=5)
        scored = []
        for beam in beams:
            length = int(model.word_mask(beam[None]).sum())
            given, null = naive_scores(model, prefix, beam[:length])
            text = processor.batch_decode(beam[None], skip_special_tokens=True)[0].strip()
            scored.append((given - 0.7 * null, text, (given - null) / length))
        best = max(scored)
        assert row["label"] == best[1] and row["evidence"] == pytest.approx(best[2], abs=1e-3)
        assert " ".join(word for word, _ in row["words"]) == " ".join(row["label"].split())
        assert row["runner_up"] != row["label"]
        plain = model.decode(prefix, max_new_tokens=5)
        assert greedy[at]["label"] == processor.batch_decode(plain, skip_special_tokens=True)[0].strip()


def test_words_are_chosen_by_evidence(model, processor, pooled):
    words = ["red", "a dog", "grass"]
    rows = label_units(model, processor, pooled, "words", words=words)
    for at, row in enumerate(rows):
        features = [None if one is None else one[at : at + 1] for one in pooled.features]
        weights = model.translate(features, pooled.hidden[at : at + 1])
        values = {}
        for word in words:
            tokens = torch.tensor(processor.tokenizer(word)["input_ids"])
            with torch.no_grad():
                given, null = naive_scores(model, weights, tokens)
            values[word] = (given - null) / len(tokens)
        order = sorted(values, key=values.get, reverse=True)
        assert [row["label"], row["runner_up"]] == order[:2]
        assert row["evidence"] == pytest.approx(values[order[0]], abs=1e-3)
        assert [word for word, _ in row["words"]] == row["label"].split()
        count = len(processor.tokenizer(row["label"])["input_ids"])
        assert sum(nats for _, nats in row["words"]) == pytest.approx(count * row["evidence"], abs=1e-3)
    with pytest.raises(ValueError, match="words"):
        label_units(model, processor, pooled, "words")


def test_silent_units_get_no_label(model, processor, pooled):
    hidden = pooled.hidden.clone()
    hidden[1] = True
    rows = label_units(model, processor, PooledUnits(pooled.units, pooled.features, hidden), candidates=2, max_new_tokens=4)
    assert rows[1]["label"] == "" and rows[1]["evidence"] is None and rows[0]["label"]


# ---------------------------------------------------------------------------------------------------------- simulation


def test_evidence_of_labels_is_what_score_says(model, processor, images):
    labels = ["a dog", "red", "the small cat", "blue"]
    found = held_out_evidence(model, processor, open_images(images), labels, batch_size=2)
    output = model.score(**processor(images=images, return_tensors="pt"), **processor(text=labels, return_tensors="pt"))
    torch.testing.assert_close(found, output.evidence.T, rtol=1e-3, atol=1e-3)


def test_correlation_and_average_precision_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    simulated, actual = (torch.randn(4, 40, generator=generator) for _ in range(2))
    r, r_p = correlation_test(simulated, actual, 300)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(simulated.numpy(), actual.numpy(), strict=True)]
    np.testing.assert_allclose(r, expected, atol=1e-5)
    ap, _ = precision_test(simulated, actual, 300)
    for row in range(4):
        top = set(actual[row].topk(4).indices.tolist())
        order = sorted(range(40), key=lambda n: -simulated[row, n].item())
        precisions = [len(top & set(order[: at + 1])) / (at + 1) for at, n in enumerate(order) if n in top]
        assert ap[row].item() == pytest.approx(sum(precisions) / 4)
        hits = [n in top for n in range(40)]
        assert ap[row].item() == pytest.approx(average_precision(simulated[row].numpy(), np.array(hits)))
    assert ranked_precision(torch.tensor([[True, False, True]])).item() == pytest.approx((1 + 2 / 3) / 2)
    assert ((r_p > 0) & (r_p <= 1)).all()


def test_permutation_p_values_are_uniform_without_a_relation():
    generator = torch.Generator().manual_seed(3)
    simulated, actual = (torch.randn(600, 50, generator=generator) for _ in range(2))
    for test in (correlation_test, precision_test):
        _, p = test(simulated, actual, 400)
        for level in (0.05, 0.2, 0.5):
            assert abs((p <= level).float().mean().item() - level) < 4 * (level * (1 - level) / 600) ** 0.5


def test_false_discovery_is_the_step_up_procedure():
    p = torch.tensor([0.03, 0.001, 0.5, 0.02, 0.9])
    # rank: .001*5/1, .02*5/2, .03*5/3, .5*5/4, .9*5/5, then minima from above
    expected = [0.05, 0.005, 0.625, 0.05, 0.9]
    np.testing.assert_allclose(false_discovery(p), expected, rtol=1e-6)


def test_right_labels_pass_and_wrong_ones_do_not():
    generator = torch.Generator().manual_seed(4)
    evidence = torch.randn(20, 200, generator=generator)  # of 20 labels
    labels = [f"label {n:02d}" for n in range(20)]
    unit_labels = [labels[n % 20] for n in range(60)] + [""]
    activations = torch.stack([evidence[n % 20] + torch.randn(200, generator=generator) for n in range(60)])
    activations = torch.cat([activations, torch.zeros(1, 200)])
    rows = check_labels(activations, evidence, labels, unit_labels, permutations=1000)
    assert sum(row["passed"] for row in rows) == 60 and rows[60]["pearson"] is None and not rows[60]["passed"]
    shuffled = check_shuffled(activations, evidence, labels, unit_labels, permutations=1000)
    assert shuffled["passed"] <= 0.05
    constant = check_constant(activations, evidence, labels, unit_labels, permutations=1000)
    assert constant["label"] == "label 00" and constant["passed"] <= 0.1


def test_a_few_right_labels_pass_among_many_wrong_ones():
    generator = torch.Generator().manual_seed(5)
    evidence, activations = torch.randn(400, 60, generator=generator), torch.randn(400, 60, generator=generator)
    activations[:2] = evidence[:2] + 0.3 * activations[:2]
    labels = [f"label {n:03d}" for n in range(400)]
    rows = check_labels(activations, evidence, labels, labels, permutations=100)
    assert rows[0]["passed"] and rows[1]["passed"] and sum(row["passed"] for row in rows) <= 3


def test_shuffled_labels_meet_no_unit_of_theirs():
    labels = ["red", "red", "blue", "green", "", "blue", "red", "striped", "dotted", "star"]
    dealt = [shuffled_labels(labels, seed) for seed in range(20)]
    for one in dealt:
        assert sorted(one) == sorted(labels) and one[4] == ""
        assert all(new != old for new, old in zip(one, labels, strict=True) if old)
    assert dealt[0] == shuffled_labels(labels, 0)
    assert len({tuple(one) for one in dealt}) > 10
    assert len({one[3] for one in dealt}) > 2  # not always its neighbour by alphabet


# ------------------------------------------------------------------------------------------------------- planted truth


def test_probes_and_selectivity_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 6, generator=generator)
    truths = torch.stack([features[:, 0] + features[:, 1] > 0.5, features[:, 3] > 1], dim=1).float()
    directions, biases = fit_probes(features, truths)
    area = selectivity(features @ directions.T + biases, truths)
    assert (area.diagonal() > 0.95).all()
    positive, negative = features[truths[:, 1] > 0, 3], features[truths[:, 1] == 0, 3]
    expected = (positive[:, None] > negative).float().mean()
    torch.testing.assert_close(selectivity(features[:, 3:4], truths)[0, 1], expected)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Units planted into the two deepest layers of the embedded backbone, their exemplars, and what they look for."""
    model, processor = load("shapes", device="cpu")
    layers = model.layer_names[-2:]
    directions, biases, concepts = planted_probes(model.backbone, processor.image_processor, layers, scenes=300)
    reader = UnitReader(model.backbone, directions, biases, channels=False, layers=layers)
    kept, _ = open_images("shapes:800:11").split(5)
    folder = tmp_path_factory.mktemp("planted")
    found = find_exemplars(reader, processor.image_processor, kept, folder)
    return model, processor, reader, found, [word for name in found.layers for word in concepts[name]]


@pytest.mark.slow
def test_planted_units_are_named_and_pass_the_check(planted):
    model, processor, reader, exemplars, truth = planted
    assert len(truth) >= 24
    pooled = pool_units(model, processor, exemplars, "features")
    rows = label_units(model, processor, pooled, "words", words=CONCEPTS)
    named = [word in (row["label"], row["runner_up"]) for word, row in zip(truth, rows, strict=True)]
    assert np.mean(named) >= 0.9, [(w, r["label"]) for w, r, ok in zip(truth, rows, named, strict=True) if not ok]
    _, held = open_images("shapes:800:11").split(2)
    activations = held_out_activations(reader, processor.image_processor, held)
    evidence = held_out_evidence(model, processor, held, sorted(set(truth)))
    checks = check_labels(activations, evidence, sorted(set(truth)), truth)
    assert np.mean([row["passed"] for row in checks]) >= 0.8
    assert check_shuffled(activations, evidence, sorted(set(truth)), truth)["passed"] <= 0.05


@pytest.mark.slow
def test_natural_units_have_a_measurable_selectivity():
    model, processor = load("shapes", device="cpu")
    features, truths = concept_locations(model.backbone, processor.image_processor, "layer1", range(100), 5)
    area = selectivity(features, truths)
    colours = area[:, :8].max(dim=1).values
    assert area.shape == (features.shape[1], len(CONCEPTS)) and colours.max() > 0.8 and colours.min() < 0.7


# --------------------------------------------------------------------------------------------------------- all stages


def test_all_stages_leave_an_atlas(model, processor, images, tmp_path, monkeypatch):
    pictures = [image.rotate(angle) for image in images for angle in range(0, 360, 24)]
    settings = NeuronsSettings(
        output_dir=tmp_path,
        layers=["-1"],
        exemplars=3,
        held_out=2,
        candidates=2,
        permutations=100,
        limit=44,
        batch_size=22,
    )
    summary = neurons(settings, model, processor, images=pictures)
    assert summary["labels"]["mode"] == "features" and summary["checks"]["images"] == 22
    assert set(summary["checks"]) >= {"labels", "constant label", "shuffled labels"}
    assert summary["images"] == 22 and (tmp_path / "atlas" / "index.html").is_file()
    atlas = json.loads((tmp_path / "atlas" / "atlas.json").read_text())
    assert len(atlas["units"]) == summary["units"] == model.backbone.channels[-1]
    # The same labels on the same images, by `devil evaluate units`.
    held_out = open_images(pictures, None, "image", 44).split(2)[1]
    monkeypatch.setattr(unit_check, "open_images", lambda *arguments: held_out)
    asked = UnitsSettings(
        labels=tmp_path / "labels.json",
        images="held out",
        permutations=100,
        batch_size=22,
        output_dir=tmp_path / "units",
    )
    evaluation = evaluate("units", asked, model, processor)
    for name, row in {"labels": evaluation.scores["labels"], **evaluation.controls}.items():
        told = summary["checks"]["labels" if name == "labels" else f"{name} label{'s' * (name == 'shuffled')}"]
        assert row == {measure: told[measure] for measure in ("pearson", "auprc", "passed")}
    assert read_evaluations(tmp_path / "units" / "scores.json") == [evaluation] and "passed" in evaluation.text
    # A check on images among which exemplars were found, or of other units, would be worth nothing.
    for changes, what in (({"held_out": 3}, "source"), ({"limit": 40}, "source"), ({"layers": ["0"]}, "layers")):
        with pytest.raises(ValueError, match=f"cannot be checked like this: {what}"):
            neurons(dataclasses.replace(settings, stage="check", **changes), model, processor, images=pictures)
    before = (tmp_path / "labels.json").read_text()
    again = NeuronsSettings(output_dir=tmp_path, stage="describe", strategy="greedy", candidates=2)
    neurons(again, model, processor)
    assert (tmp_path / "labels.json").read_text() != before
    with pytest.raises(ValueError, match="run the check again"):
        neurons(NeuronsSettings(output_dir=tmp_path, stage="atlas"), model, processor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "all"], "there are no images"),
        (["shapes:50", "--held-out", "1"], "n of 2 or more"),
        (["shapes:50", "--strategy", "words"], "needs words to choose from"),
        (["--stage", "describe"], "find exemplars first"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(options, message, tmp_path, capsys):
    assert main(["neurons", "--output-dir", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err


def test_the_command_names_units_and_checks_the_names(model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    command = [
        "neurons",
        "shapes:42",
        "--output-dir",
        str(tmp_path / "out"),
        "--checkpoint",
        str(tmp_path / "checkpoint"),
    ]
    command += ["--layers", str(len(model.layer_names) - 1), "--exemplars", "2", "--held-out", "2", "--candidates", "2"]
    assert main([*command, "--permutations", "100", "--device", "cpu", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["layers"] == [model.layer_names[-1]] and summary["checks"]["images"] == 21


def test_help_shows_an_example(capsys):
    for verb in (["neurons"], ["evaluate", "neurons"]):
        with pytest.raises(SystemExit, match="0"):
            main([*verb, "--help"])
        shown = capsys.readouterr().out
        assert "example:" in shown and f"devil {' '.join(verb)}" in shown
