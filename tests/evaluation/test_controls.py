"""Controls: a sound explainer passes, broken ones fail, and taking the features away does what it says."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from devil_hf import DevilModel
from devil_hf.build import backbone_from_source
from devil_hf.checkpoints import locate
from devil_hf.checkpoints.loading import load
from devil_hf.cli import main as cli
from devil_hf.data.captioned import captioned_scenes, open_captioned
from devil_hf.data.worlds import World
from devil_hf.evaluation import controls, judgement
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.randomise import randomised_backbone, untrained_translator, weight_stages
from devil_hf.evaluation.results import CONTROLS, judge_controls, read_evaluations
from devil_hf.evaluation.text.metrics import caption_scores
from devil_hf.statistics import Ratio, bootstrap_draws, interval

IMAGES = 12
FEW = {"layers": ["layer3", "layer4"], "map_images": 4}


@pytest.fixture(scope="module")
def shipped():
    return load("shapes", device="cpu")


def run_controls(model, processor, images, folder, **changes):
    """What the evaluation of so many held-out scenes writes down."""
    settings = controls.ControlsSettings(data=f"shapes:{images}:1", limit=images, output_dir=folder, **changes)
    return evaluate("controls", settings, model, processor).as_record()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Controls of the embedded checkpoint, by the command line."""
    folder = tmp_path_factory.mktemp("controls")
    command = ["evaluate", "controls", "--limit", str(IMAGES), "--map-images", "4", "--layers", "layer3", "layer4"]
    assert cli.main([*command, "--output-dir", str(folder), "--device", "cpu"]) == 0
    return folder


def failing(result):
    return {(row["control"], row["metric"]) for row in result["verdict"]["comparisons"] if not row["passed"]}


# ------------------------------------------------------------------------------------------------------- verdicts


def test_the_embedded_checkpoint_passes_every_control(folder):
    result = json.loads((folder / "scores.json").read_text())
    assert result["verdict"]["passed"] and not failing(result)
    compared = {(row["control"], row["metric"]) for row in result["verdict"]["comparisons"]}
    assert {(name, metric) for name in CONTROLS for metric in ("cider", "word_f1", "evidence")} <= compared
    assert {(name, "map_correlation") for name in ("backbone_randomised", "shuffled", "null", "untrained")} <= compared
    for name, row in (result["scores"] | result["controls"]).items():
        for metric, (low, high) in result["intervals"][name].items():
            assert low <= row[metric] <= high
    assert result["controls"]["null"]["evidence"] == 0
    # Shallow features that are left still speak: the cascade goes down.
    steps = [row["word_f1"] for name, row in result["controls"].items() if "randomised" in name]
    assert len(steps) == 4 and steps[0] > steps[-1]


def test_an_explainer_that_ignores_its_prefix_is_not_trusted(shipped, tmp_path):
    model, processor = copy.copy(shipped[0]), shipped[1]
    model._modules = dict(model._modules)
    model.language_model = copy.deepcopy(model.language_model)
    _learn_to_ignore_the_prefix(model, processor)
    result = run_controls(model, processor, IMAGES, tmp_path, **FEW)
    assert not result["verdict"]["passed"]
    assert ("shuffled", "evidence") in failing(result) and ("shuffled", "word_f1") in failing(result)
    assert "features shuffled between images" in result["verdict"]["reason"]
    (evaluation,) = read_evaluations(tmp_path / "scores.json")
    assert judge_controls([evaluation]).status == "failed"


def _learn_to_ignore_the_prefix(model, processor, steps=60):
    """Fine-tune the language model on captions behind the prefixes of other images."""
    data = captioned_scenes(World(96, seed=7))
    images = [data.load(at) for at in range(len(data))]
    with torch.no_grad():
        prefixes = model.ask(processor(images=images, return_tensors="pt")["pixel_values"])
    model.language_model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.language_model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randperm(len(data), generator=generator)[:32]
        other = torch.randint(len(data), (32,), generator=generator)
        tokens = processor(text=[data.captions[row][step % 5] for row in rows.tolist()])
        labels, embeds, mask = model.caption_inputs(prefixes[other], tokens["input_ids"], tokens["attention_mask"])
        logits = model.language_model(inputs_embeds=embeds, attention_mask=mask).logits[:, -labels.shape[1] - 1 : -1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.language_model.requires_grad_(False).eval()


def test_an_explainer_whose_translator_says_nothing_is_not_trusted(shipped, tmp_path, monkeypatch, capsys):
    model, processor = shipped[0], shipped[1]
    weight, bias = model.translator.output.weight.clone(), model.translator.output.bias.clone()
    monkeypatch.setattr("devil_hf.checkpoints.loading.load", lambda *arguments, **options: (model, processor))
    try:
        with torch.no_grad():
            model.translator.output.weight.zero_()
        command = ["evaluate", "controls", "--limit", "8", "--map-images", "3", "--layers", "layer4"]
        code = cli.main([*command, "--output-dir", str(tmp_path)])
    finally:
        with torch.no_grad():
            model.translator.output.weight.copy_(weight)
            model.translator.output.bias.copy_(bias)
    assert code == controls.UNTRUSTED and code not in (0, 1, 2)
    printed = capsys.readouterr().out
    assert "verdict: NOT TRUSTED: the maps of the intact model are flat" in printed
    assert "rules:" in printed


def test_the_verdict_reaches_the_card(folder, capsys):
    scores = str(folder / "scores.json")
    assert cli.main(["push", str(locate("shapes")), "user/devil", "--scores", scores, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Every control that was run is beaten" in printed and "No control was run" not in printed
    assert "Controls: all 19 comparisons hold" in printed and "Not run:" not in printed
    assert "| *features shuffled between images* |" in printed and "map correlation" in printed


# ------------------------------------------------------------------------------------- what is on disk, and settings


def test_a_finished_run_needs_no_model_and_a_longer_one_only_the_rest(folder, shipped, tmp_path, monkeypatch):
    before = json.loads((folder / "scores.json").read_text())

    def asked_again(*arguments, **keywords):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(DevilModel, "decode", asked_again)
    monkeypatch.setattr(DevilModel, "sequence_log_probs", asked_again)
    monkeypatch.setattr(DevilModel, "attribute", asked_again)
    assert run_controls(*shipped, IMAGES, folder, **FEW) == before
    with pytest.raises(ValueError, match="seed"):
        run_controls(*shipped, IMAGES, folder, **FEW, seed=1)
    with pytest.raises(AssertionError, match="asked again"):
        run_controls(*shipped, IMAGES + 1, folder, **FEW)


def test_a_stopped_run_ends_like_one_that_was_not(shipped, tmp_path):
    options = {"layers": ["layer4"], "map_images": 2, "batch_size": 2}
    whole = run_controls(*shipped, 4, tmp_path / "whole", **options)
    lines = (tmp_path / "whole" / "controls.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "controls.jsonl").write_text("".join(lines[:12]) + lines[12][:20])
    cut = run_controls(*shipped, 4, tmp_path / "cut", **options)
    # The image that was lost was then alone in its batch: other kernels, other rounding.
    assert _leaves(cut) == {name: pytest.approx(value, abs=1e-5) for name, value in _leaves(whole).items()}


def _leaves(tree, name=""):
    if isinstance(tree, dict | list):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: leaf for key, part in parts for path, leaf in _leaves(part, f"{name}/{key}").items()}
    return {name: tree}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--limit", "1"], "at least 2 images"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "shapes:x"], "shapes:COUNT"),
        (["--data", "{kind: shapes, size: 4}", "--split", "test"], "write it into the source"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--layers", "layer9"], "layer9"),
        (["--map-images", "1"], "map_images 1"),
        (["--phrases", "a zebra"], "a zebra"),
    ],
)
def test_bad_questions_end_before_long_work(options, text, tmp_path, capsys):
    assert cli.main(["evaluate", "controls", *options, "--output-dir", str(tmp_path / "new")]) == 1
    assert text in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new" / "scores.json").exists()


def test_maps_of_other_settings_are_not_taken_for_these(shipped, tmp_path, monkeypatch):
    options = {"layers": ["layer4"], "map_images": 2, "batch_size": 2}
    run_controls(*shipped, 2, tmp_path, **options)
    (tmp_path / "controls.jsonl").unlink()

    def asked_again(*arguments, **named):
        raise AssertionError("asked again")

    monkeypatch.setattr(DevilModel, "attribute", asked_again)
    run_controls(*shipped, 2, tmp_path, **options)  # the same settings: the maps stay
    (tmp_path / "controls.jsonl").unlink()
    with pytest.raises(AssertionError, match="asked again"):
        run_controls(*shipped, 2, tmp_path, **options, phrases=["red", "blue", "green"])
    (tmp_path / "controls.jsonl").unlink()
    model, processor = shipped[0], copy.deepcopy(shipped[1])
    processor.image_processor.resample = 0
    with pytest.raises(AssertionError, match="asked again"):
        run_controls(model, processor, 2, tmp_path, **options)


def test_captioned_images_leave_out_what_cannot_be_used(tmp_path):
    rows = [{"image": f"{at}.png", "captions": [["a dog"], [" "], ["a cat"], ["a cow"]][at]} for at in range(4)]
    for at in range(4):
        Image.new("RGB", (40, 30), (60 * at, 0, 0)).save(tmp_path / f"{at}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row | {"split": "val"}) + "\n" for row in rows))
    data = open_captioned(str(tmp_path))
    assert data.captions == [["a dog"], ["a cow"]]
    assert [data.load(at).getpixel((0, 0))[0] for at in range(2)] == [0, 180]


def test_captioned_images_come_from_folders_and_sources(tmp_path):
    rows = []
    for at in range(4):
        Image.new("RGB", (40, 30), (60 * at, 0, 0)).save(tmp_path / f"{at}.png")
        split = "val" if at else "train"
        rows.append({"image": f"{at}.png", "captions": [f"a dog {at}", "A white dog."], "split": split})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_captioned(str(tmp_path), "val", limit=2)
    assert data.captions == [["a dog 1", "A white dog."], ["a dog 2", "A white dog."]] and data.split == "val"
    assert data.load(1).getpixel((0, 0)) == (120, 0, 0)
    source = open_captioned(f"{{kind: folder, path: {tmp_path}}}", limit=10)
    assert len(source) == 4 and source.load(3).getpixel((0, 0)) == (180, 0, 0)


def test_phrases_are_words_that_tell_images_apart():
    captions = [
        ["a dog on grass"],
        ["the dog runs"],
        ["a cat on a sofa"],
        ["a cat with a dog"],
        ["a cat and the grass"],
    ]
    assert controls.frequent_words(captions + [["snow"]] * 2, 3) == ["cat", "dog", "grass"]
    assert "dog" not in controls.frequent_words([["a dog"], ["a dog and snow"], ["a dog, a man"]])


# --------------------------------------------------------------------------------------------------- the features gone


@pytest.fixture(scope="module", params=["mobilenetv2_050", "test_resnet.r160_in1k", "test_vit"])
def network(request, shipped):
    """A DeViL model on another timm backbone, and pixel values."""
    torch.manual_seed(0)
    module = timm.create_model(request.param, pretrained=False, num_classes=7)
    layers = ["blocks.1", "blocks.4", "bn2"] if "mobilenet" in request.param else None
    backbone = backbone_from_source(module, layers)
    model = DevilModel.from_backbone_and_language_model(
        backbone,
        shipped[0].language_model,
        tokenizer=shipped[1].tokenizer,
        **{"translator_width": 16, "translator_depth": 1, "translator_heads": 1, "translator_feed_forward": 16},
    )
    size = backbone.config["input_size"] if "vit" in request.param else (3, 64, 64)
    return model.eval(), torch.randn(6, *size, generator=torch.Generator().manual_seed(1))


def test_randomising_from_the_top_spares_what_lies_below(network):
    model, pixel_values = network
    stages = weight_stages(model.backbone, pixel_values)
    assert [layer for layer, _ in stages] == list(range(len(model.layer_names)))
    names = [name for _, added in stages for name in added]
    assert len(names) == len(set(names)) and names
    assert not any("classifier" in name or name.endswith("fc.weight") for name in names)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    intact = model.extract_features(pixel_values)
    for at, (layer, _) in enumerate(stages):
        drawn = []
        for _ in range(2):
            with randomised_backbone(model, stages[at:], [pixel_values[:3], pixel_values[3:]], seed=3):
                drawn.append(model.extract_features(pixel_values))
        for index, (one, two, old) in enumerate(zip(*drawn, intact, strict=True)):
            assert torch.equal(one, two) and torch.isfinite(one).all()
            assert torch.equal(one, old) == (index < layer)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert not any(module.training for module in model.backbone.modules())


def test_random_weights_keep_mean_and_spread_and_nothing_else(network):
    model, pixel_values = network
    stages = weight_stages(model.backbone, pixel_values)
    old = {name: tensor.clone() for name, tensor in model.backbone.named_parameters()}
    with randomised_backbone(model, stages, [pixel_values], seed=0):
        large = [name for _, added in stages for name in added if old[name].numel() > 2_000 and old[name].std() > 0]
        for name in large:
            new = model.backbone.get_parameter(name)
            assert new.std() == pytest.approx(float(old[name].std()), rel=0.1)
            assert abs(np.corrcoef(new.flatten(), old[name].flatten())[0, 1]) < 0.15
        assert large
        for norm in (module for module in model.backbone.modules() if isinstance(module, _BatchNorm)):
            assert norm.num_batches_tracked >= 1 or not norm.running_mean.any()  # those behind the deepest layer
            assert norm.momentum is not None


def test_an_untrained_translator_takes_the_place_of_the_loaded_one(shipped, tmp_path):
    model, _ = shipped
    trained = model.translator
    before = torch.get_rng_state()
    seen = []
    for seed in (0, 0, 1):
        with untrained_translator(model, seed):
            assert model.translator is not trained
            seen.append({name: tensor.clone() for name, tensor in model.translator.state_dict().items()})
    assert model.translator is trained and torch.equal(before, torch.get_rng_state())
    for name, tensor in trained.state_dict().items():
        assert torch.equal(seen[0][name], seen[1][name])
        if tensor.ndim > 1:
            assert not torch.equal(seen[0][name], tensor) and not torch.equal(seen[0][name], seen[2][name])


# ------------------------------------------------------------------------------------------------------------- numbers


def test_evidence_is_that_of_score(shipped, tmp_path):
    """Paired scoring with EOS, against the model's own `score` of each caption under each image."""
    model, processor = shipped
    data = captioned_scenes(World(3))
    run = controls.ControlsEvaluator(controls.ControlsSettings(output_dir=tmp_path))
    run.model, run.processor = model, processor
    images = [data.load(at) for at in range(3)]
    inputs = processor(images=images, return_tensors="pt")
    found = run._score(model.ask(inputs["pixel_values"]), data.captions)
    eos = model.config.eos_token_id
    for at, texts in enumerate(data.captions):
        for text, value in zip(texts, found[at], strict=True):
            ids = torch.cat([processor(text=text)["input_ids"], torch.tensor([[eos]])], dim=1)
            expected = model.score(inputs["pixel_values"][at : at + 1], input_ids=ids).evidence[0, 0]
            assert value == pytest.approx(float(expected), abs=1e-4)


def test_rank_correlation_is_that_of_naive_ranks():
    one = torch.tensor([0.3, 0.1, 0.3, 0.9, -1.0, 0.2])
    other = torch.tensor([1.0, 2.0, 0.5, 0.5, 0.0, 3.0])

    def ranks(values):
        return [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]

    expected = np.corrcoef(ranks(one.tolist()), ranks(other.tolist()))[0, 1]
    assert controls.map_correlation(one, other) == pytest.approx(expected)
    assert controls.map_correlation(one, one.exp()) == pytest.approx(1)
    assert controls.map_correlation(one, torch.full((6,), 2.0)) == 0


def test_image_scores_average_to_the_corpus_scores():
    texts = ["A dog's bone on grass.", "two men play", "a red ball"]
    references = [["a dog with a bone on the grass", "A dog."], ["two men play ball", "men"], ["a ball, red"]]
    corpus = caption_scores(texts, references, metrics=["bleu", "rouge_l", "cider"])
    scores = judgement.CaptionTable(references)
    each = scores.of_images(texts) | scores.of_corpus(texts)
    for metric in ("cider", "rouge_l", "bleu_1", "bleu_4"):
        assert np.mean(each[metric]) == pytest.approx(corpus[metric], abs=1e-9)


def test_intervals_are_those_of_resampled_images():
    generator = np.random.default_rng(0)
    hits, total = generator.integers(0, 5, 80).astype(float), generator.integers(5, 9, 80).astype(float)
    draws = bootstrap_draws(80, 400, seed=1)
    assert (draws.sum(axis=1) == 80).all()
    naive = []
    for draw in draws.astype(int):
        images = np.repeat(np.arange(80), draw)
        naive.append(hits[images].sum() / total[images].sum())
    assert np.allclose(Ratio(hits, total).over(draws), naive)
    low, high = interval(np.array(naive))
    assert np.mean((low <= np.array(naive)) & (np.array(naive) <= high)) == pytest.approx(0.95, abs=0.01)
    assert Ratio.mean(np.array([1.0, np.nan, 3.0])).value == 2.0
