"""Maps of layers become one by the documented rule; an evaluation of maps goes on after a kill, and asks the model once."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from devil_hf.cli.main import main
from devil_hf.data.objects import LocalisedImage
from devil_hf.data.objects.masks import runs_of
from devil_hf.evaluation import localisation
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.localisation import MapsSettings
from devil_hf.evaluation.maps import collecting as mapping
from devil_hf.evaluation.maps import scores as map_scores
from devil_hf.evaluation.maps.collecting import CENTRE, draw_boards, location_curves, read_arrays, shown_weights
from devil_hf.evaluation.maps.combining import combine_maps
from devil_hf.evaluation.maps.gradcam import ClassMapper
from devil_hf.evaluation.maps.measures import centre_prior
from devil_hf.evaluation.maps.pointing import pointing
from devil_hf.evaluation.maps.scores import UNSEEN_HEAD, maps_text, named_in_captions, score_maps, summarise
from devil_hf.evaluation.maps.views import MAP_MEASURES, map_measure
from devil_hf.evaluation.results import read_evaluations
from devil_hf.report.localisation import localisation_figure
from devil_hf.settings import read_windows


@pytest.fixture
def examples(images):
    def example(number):
        left, right = np.zeros((96, 128), dtype=bool), np.zeros((96, 128), dtype=bool)
        left[20:60, 20:50], right[30:80, 80:110] = True, True
        names = [("dog", "grass"), ("cat", "circle"), ("square", "dog")][number]
        parts = {name: [runs_of(mask)] for name, mask in zip(names, (left, right), strict=True)}
        groups = dict.fromkeys(names, "class")
        return LocalisedImage(f"{number}.jpg", lambda: images[number], groups, frozenset(names), parts)

    return [example(number) for number in range(3)]


@pytest.fixture
def mapped(model, processor, examples, monkeypatch):
    """Evaluates the maps of so many of the examples into a folder; the result, and the rows by key."""

    def run(folder, begin=0, end=None, **changes):
        monkeypatch.setattr(localisation, "open_localised", lambda *arguments: examples[begin:end])
        settings = {"layers": ["-2", "-1"], "boards": 1} | changes
        evaluation = evaluate("maps", MapsSettings(source="test", output_dir=folder, **settings), model, processor)
        lines = (folder / "records.jsonl").read_text().splitlines()[1:]
        return evaluation, {line["key"]: line["row"] for line in map(json.loads, lines)}

    return run


def test_phrases_whose_head_word_no_training_region_has_are_a_group_with_the_centre_beside(mapped, tmp_path):
    evaluation, rows = mapped(tmp_path, boards=0, unseen=["shapes:40:1"])
    counts, groups = evaluation.details["counts"], evaluation.details["over_centre"]
    assert counts["class"]["phrases"] == 6 and counts[UNSEEN_HEAD]["phrases"] == 4, "circle and square are the world's"
    assert sum(phrase in ("dog", "grass", "cat") for row in rows.values() for phrase in row["phrases"]) == 4
    own = f"pointing_{UNSEEN_HEAD.replace(' ', '_')}"
    centre = evaluation.details["pointing_centre"][UNSEEN_HEAD]["mean"]
    value, low, high = groups[UNSEEN_HEAD]["mean"]["pointing"]
    assert value == pytest.approx(evaluation.scores["mean"][own] - centre) and low <= value <= high
    assert groups["class"][CENTRE]["pointing"] == (0, 0, 0), "paired"
    assert UNSEEN_HEAD in evaluation.text and "pointing over the centre: " in evaluation.text


def test_the_informed_combination_is_its_formula(model, pixel_values, phrases):
    layers = model.layer_names[-3:]
    combined = model.attribute(pixel_values, phrases, layers=layers, combine="informed").maps["informed"]
    maps = model.attribute(pixel_values, phrases, layers=layers).maps
    grid = max((one.shape[-2:] for one in maps.values()), key=lambda g: g[0] * g[1])
    for image in range(len(pixel_values)):
        for k in range(4):
            total, weight = torch.zeros(grid), 0.0
            for name, one in maps.items():
                known = model.score(pixel_values[image : image + 1], layers=name, **phrases).evidence[0, k]
                w = torch.exp(known / 2) * one[image, k].std(correction=0)
                total += w * F.interpolate(one[image : image + 1, k : k + 1], grid, mode="bilinear")[0, 0]
                weight += w
            average, smoothed = total / weight, torch.zeros(grid)
            for i in range(grid[0]):
                for j in range(grid[1]):
                    rows = torch.exp(-((torch.arange(grid[0]) - i) ** 2) / (2 * (grid[0] / 32) ** 2))
                    columns = torch.exp(-((torch.arange(grid[1]) - j) ** 2) / (2 * (grid[1] / 32) ** 2))
                    gaussian = rows[:, None] * columns
                    smoothed[i, j] = (gaussian * average).sum() / gaussian.sum()
            torch.testing.assert_close(combined[image, k], smoothed, rtol=1e-4, atol=1e-5)


def test_a_combination_keeps_the_unit_of_its_maps(model, pixel_values, phrases):
    """sum = tokens * evidence + prior, for the combination as for every layer."""
    layers = model.layer_names[-2:]
    maps = {
        measure: model.attribute(pixel_values, phrases, layers=layers, combine="informed", measure=measure).maps["informed"]
        for measure in ("sum", "evidence")
    }
    tokens = phrases["attention_mask"].sum(dim=1)[:, None, None]
    null = model.score(pixel_values, **phrases).null_log_probs[:, None, None]
    torch.testing.assert_close(maps["sum"], maps["evidence"] * tokens + null, rtol=1e-4, atol=1e-3)


def test_a_layer_that_knows_nothing_of_a_phrase_does_not_count():
    sharp, noise = torch.zeros(1, 1, 32, 32), torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    sharp[..., 10:14, 20:24] = 3
    combined = combine_maps({"a": noise, "b": sharp}, "informed", torch.tensor([-9.0, 1.0])[:, None, None])
    assert combined.flatten().argmax() // 32 in range(10, 14) and combined.flatten().argmax() % 32 in range(20, 24)
    flat = combine_maps({"a": sharp * 0 + 2, "b": sharp * 0 + 4}, "informed", torch.zeros(2, 1, 1))
    torch.testing.assert_close(flat, torch.full_like(flat, 3.0))
    with pytest.raises(ValueError, match="whole"):
        combine_maps({"a": noise}, "informed")


def test_unknown_combinations_are_named(model, pixel_values, phrases):
    with pytest.raises(ValueError, match=r"combine='best' is not one of .*informed"):
        model.attribute(pixel_values, phrases, combine="best")


def test_locations_are_shown_and_hidden_best_first():
    values = torch.arange(20.0).view(1, 4, 5)
    weights = shown_weights(values)[0]
    for share, shown, kept in zip(mapping.SHARES, weights, weights[len(mapping.SHARES) :], strict=False):
        count = max(round(share * 20), 1)
        assert shown.flatten().nonzero().flatten().tolist() == list(range(20 - count, 20))
        assert kept.flatten().nonzero().flatten().tolist() == list(range(20 - count))
    assert torch.allclose(weights.sum(dim=(1, 2)), torch.ones(len(weights)))


def test_curves_agree_with_one_question_at_a_time(model, processor, pixel_values):
    names = model.layer_names[-2:]
    text = processor(text=["a dog", "red"], return_tensors="pt")
    features = model.extract_features(pixel_values[:1])
    order = torch.rand(2, 10, 10, generator=torch.Generator().manual_seed(0))
    curves = location_curves(model, features, names, text, {"map": order})
    for phrase in range(2):
        for step, share in enumerate(mapping.SHARES):
            for kind in ("insertion", "deletion"):
                weights = [None] * len(model.layer_names)
                for name in names:
                    index = model.layer_names.index(name)
                    rows, columns = features[index].shape[-2:]
                    ranked = F.adaptive_avg_pool2d(order[phrase][None], (rows, columns)).flatten().argsort(descending=True)
                    count = min(max(round(share * rows * columns), 1), rows * columns - 1)
                    chosen = ranked[:count] if kind == "insertion" else ranked[count:]
                    weight = torch.zeros(rows * columns).index_fill(0, chosen, 1 / len(chosen))
                    weights[index] = weight.view(1, rows, columns)
                alone = model.score(feature_maps=features, location_weights=weights, layers=names, **text)
                assert curves[kind]["map"][phrase][step] == pytest.approx(float(alone.evidence[0, phrase]), abs=1e-4)


def test_boards_ask_for_what_only_one_of_their_images_has_whatever_the_limit(examples):
    boards = draw_boards(examples, 10, seed=0)
    assert boards and boards == draw_boards(examples, 10, seed=0)
    for board in boards:
        for one, phrase in zip(board.members, board.phrases, strict=True):
            assert [phrase in other.present for other in board.members] == [other is one for other in board.members]


def test_a_killed_evaluation_goes_on_and_scores_need_no_model(model, mapped, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    evaluation, records = mapped(whole)
    mapped(stopped, end=1)
    with (stopped / "records.jsonl").open("a") as file:
        file.write('{"key": "1.jpg", "row": {"phra')  # killed while writing
    asked = []
    once = mapping._map_one
    monkeypatch.setattr(mapping, "_map_one", lambda *a, **k: asked.append(1) or once(*a, **k))
    _, resumed = mapped(stopped)
    assert resumed.keys() == records.keys() and len(asked) == 2
    for key in records:
        assert resumed[key].keys() == records[key].keys()
        masks, maps = read_arrays(whole / "maps" / records[key]["file"])
        masks_again, maps_again = read_arrays(stopped / "maps" / resumed[key]["file"])
        assert (masks == masks_again).all() and all(np.allclose(maps[name], maps_again[name], atol=1e-5) for name in maps)
    with pytest.raises(ValueError, match="carrier"):
        mapped(stopped, carrier="a")
    with monkeypatch.context() as other:
        other.setattr(mapping, "INFORMED", (1, 1 / 32))
        with pytest.raises(ValueError, match=r"was made with \{'informed': \[2, 0.03125\]\}, not"):
            mapped(stopped)

    monkeypatch.setattr(type(model), "forward", None)
    content = score_maps(records, whole, resamples=50)
    assert content == score_maps(records, whole, resamples=50)
    assert content["counts"]["class"]["phrases"] == 6 and content["counts"]["class"]["images"] == 3
    table = content["groups"]["class"]
    assert {*model.layer_names[-2:], "informed", "mean", "joint", "centre prior", "chance"} <= set(table)
    area = content["counts"]["class"]["area"]
    assert table["chance"]["energy"] == table["chance"]["average_precision"] == pytest.approx(area)
    assert "informed" in maps_text(content)
    for name in model.layer_names[-2:]:  # each against chance on its own grid
        assert table[name]["pointing_chance"] >= table["informed"]["pointing_chance"] == table["chance"]["pointing"]
    # Log-probabilities are never positive: energy is not defined, and overlaps are from their minimum.
    for measure in ("sum", "per_token"):
        other = table[f"informed, {measure}"]
        assert {"iou", "iou_best", "miou"} <= set(other) and not {"energy", "pointing"} & set(other)
    (read,) = read_evaluations(whole / "scores.json")
    assert read == evaluation and read.headline == "informed" and set(read.controls) == {"chance"}
    assert read.dataset["size"] == 3 and "pointing_chance" not in read.scores["informed"]
    assert Image.open(whole / "maps.png").size


def test_a_broken_image_or_mask_is_left_out_told_and_mapped_when_it_is_mended(mapped, examples, images, tmp_path, caplog):
    picture, masks = tmp_path / "0.png", tmp_path / "classes.png"
    picture.write_bytes(b"no image")
    Image.new("L", (5, 5)).save(masks)
    whole = dict(examples[1].parts)
    examples[:] = [dataclasses.replace(examples[0], read=lambda: picture), *examples[1:]]
    examples[1] = dataclasses.replace(examples[1], parts=whole | {"cat": [{"classes": str(masks), "index": 1}]})
    evaluation, records = mapped(tmp_path / "maps", boards=3, joint=False)
    assert evaluation.dataset["size"] == 1 and evaluation.settings["bad_images"] == 2
    assert "broken image" in records["0.jpg"]["problem"] and "5" in records["1.jpg"]["problem"]
    assert all(row["problem"] and not row["phrases"] for key, row in records.items() if key.startswith("board"))
    assert "0.jpg is left out: broken image" in caplog.text and "1.jpg is left out: broken region" in caplog.text
    with pytest.raises(ValueError, match="broken image"):
        mapped(tmp_path / "none", boards=0, joint=False, end=1)

    images[0].save(picture)
    masks.unlink()
    evaluation, records = mapped(tmp_path / "maps", boards=3, joint=False)
    assert evaluation.dataset["size"] == 2 and "problem" not in records["0.jpg"] and "classes.png" in records["1.jpg"]["problem"]
    kept = json.loads(json.dumps(records))
    picture.unlink()
    figure = localisation_figure(None, examples[:1], kept, tmp_path / "maps")  # what is gone when the figure is drawn
    assert figure.size and "0.jpg is left out of the figure" in caplog.text


def test_a_measure_of_maps_is_added_by_one_function(mapped, tmp_path, monkeypatch):
    monkeypatch.setattr(MAP_MEASURES, "_entries", dict(MAP_MEASURES))

    @map_measure("peak")
    def peak(view):
        return float(view.values.max())

    evaluation, records = mapped(tmp_path, boards=0, joint=False, end=1)
    _, maps = read_arrays(tmp_path / "maps" / records["0.jpg"]["file"])
    assert evaluation.scores["mean"]["peak"] == pytest.approx(maps["mean"].max(axis=(1, 2)).mean())
    assert "peak" in evaluation.text and read_evaluations(tmp_path / "scores.json") == [evaluation]


def test_images_that_are_added_leave_every_map_with_its_image(mapped, tmp_path):
    settings = {"boards": 3, "joint": False}
    mapped(tmp_path / "grown", begin=1, **settings)
    _, grown = mapped(tmp_path / "grown", **settings)
    _, whole = mapped(tmp_path / "whole", **settings)
    assert whole.keys() <= grown.keys()
    for key in whole:
        assert grown[key]["phrases"] == whole[key]["phrases"]
        one, other = (
            read_arrays(tmp_path / folder / "maps" / rows[key]["file"]) for folder, rows in (("grown", grown), ("whole", whole))
        )
        assert (one[0] == other[0]).all() and one[1]["informed"] == pytest.approx(other[1]["informed"], abs=1e-5)
    with pytest.raises(ValueError, match="names"):
        mapped(tmp_path / "grown", names="other.yaml", **settings)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (1, 1)])
def test_random_maps_score_the_printed_chance_on_boards(size, grid):
    rng, draws = np.random.default_rng(0), 400
    masks = np.zeros((size, 32, 32), dtype=bool)
    for at in range(size):
        row, column = divmod(at, 2)
        masks[at, 16 * row + 3 : 16 * row + 9, 16 * column + 4 : 16 * column + 13] = True
    table = {}
    for number in range(draws):
        row = {"board": size, "phrases": [str(at) for at in range(size)]}
        map_scores._score_board(number, row, masks, {"layer": rng.normal(size=(size, *grid))}, table)
    found = {name: summarise(samples, 20, 0) for name, samples in table.items()}
    for metric, chance in (
        (f"tile_{size}", found["chance"][f"tile_{size}"][0]),
        (f"pointing_{size}", found["layer"][f"pointing_chance_{size}"][0]),
    ):
        sigma = (chance * (1 - chance) / (draws * size)) ** 0.5
        assert found["layer"][metric][0] == pytest.approx(chance, abs=4 * sigma + 1e-9)
    assert found["chance"][f"tile_{size}"][0] == 1 / size
    # It points at the middle of an image, and cannot know of which.
    tiles = [sample.values[f"tile_{size}"] for sample in table["centre prior"]]
    assert tiles == pytest.approx([1 / size] * len(tiles))
    assert found["centre prior"][f"pointing_{size}"][0] == found["layer"][f"pointing_centre_{size}"][0]
    if grid == (8, 8):
        alone = [pointing(centre_prior((4, 4)), masks[at][16 * (at // 2) :, 16 * (at % 2) :][:16, :16]) for at in range(size)]
        assert np.mean(alone) > 0 and found["centre prior"][f"pointing_{size}"][0] == pytest.approx(np.mean(alone) / size)


def test_scores_of_nothing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no phrase of these images is visible"):
        score_maps({"one.jpg": {"phrases": [], "groups": {}}}, tmp_path)


def test_recorded_maps_are_those_of_the_model(model, processor, examples, mapped, tmp_path):
    _, records = mapped(tmp_path, end=1)
    masks, maps = read_arrays(tmp_path / "maps" / records["0.jpg"]["file"])
    inputs = processor(images=examples[0].read(), return_tensors="pt")
    text = processor(text=records["0.jpg"]["phrases"], carrier="the", return_tensors="pt")
    for name, options in (
        ("informed", {"combine": "informed"}),
        ("joint", {"combine": "joint"}),
        (model.layer_names[-1], {}),
    ):
        expected = model.attribute(**inputs, phrases=text, layers=[-2, -1], **options).maps[name][0]
        assert maps[name] == pytest.approx(expected.numpy(), abs=1e-5)
    assert masks.shape[-2:] == tuple(inputs["pixel_values"].shape[-2:])


def test_class_names_are_seen_when_enough_images_name_them(tmp_path):
    texts = ["two dogs run", "a dog", "a hot dog", "a catalogue"]
    lines = [json.dumps({"image": f"{n}.jpg", "captions": [text], "split": "train"}) for n, text in enumerate(texts)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    names = {"dog", "cat", "hot dog"}
    assert named_in_captions(names, [f"{tmp_path}:train"], 1) == {"dog", "hot dog"}
    assert named_in_captions(names, [str(tmp_path)], 2) == {"dog"}


def test_grad_cam_is_the_librarys_and_leaves_the_backbone_alone(tokenizer, language_model):
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    import timm

    from devil_hf import DevilModel

    torch.manual_seed(0)
    network = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=4).eval()
    options = {"translator_width": 16, "translator_depth": 1, "translator_heads": 1, "translator_feed_forward": 16}
    model = DevilModel.from_backbone_and_language_model(network, language_model, tokenizer=tokenizer, **options)
    mapper = ClassMapper(model, ["cat, house cat", "sports car", "school bus", "bus stop"])
    assert mapper.classes_of("bus") == [2] and mapper.classes_of("Cat") == [0] and mapper.classes_of("at") == []
    pixels = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        maps = mapper.maps(pixels, ["car", "unicorn"])
    module = model.backbone.module
    layer = module.get_submodule(model.layer_names[-1])
    features = {}
    handle = layer.register_forward_hook(lambda _, __, output: features.update(map=output))
    logits = module(pixels.clone().requires_grad_())
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 1], features["map"])
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * features["map"]).sum(dim=1)[0].clamp_min(0).detach().numpy()
    assert list(maps) == ["car"] and maps["car"].shape == expected.shape
    assert np.corrcoef(maps["car"].ravel(), expected.ravel())[0, 1] > 0.99
    assert not layer._forward_hooks and all(p.grad is None for p in module.parameters())
    assert grad_cam
    with pytest.raises(ValueError, match="3 class names for the 4 classes"):
        ClassMapper(model, ["a", "b", "c"])
    # Weights elsewhere, here of another type, take the pixels along; a backbone of its own, since others share this one.
    module.double()
    precise = ClassMapper(model, ["cat, house cat", "sports car", "school bus", "bus stop"]).maps(pixels, ["car"])
    module.float()
    assert precise["car"] == pytest.approx(maps["car"], abs=1e-4)


def test_grad_cam_refuses_tokens_before_it_maps(tokenizer, language_model):
    pytest.importorskip("pytorch_grad_cam")
    import timm

    from devil_hf import DevilModel

    network = timm.create_model("test_vit.r160_in1k", pretrained=False, num_classes=2).eval()
    options = {"translator_width": 16, "translator_depth": 1, "translator_heads": 1, "translator_feed_forward": 16}
    model = DevilModel.from_backbone_and_language_model(network, language_model, tokenizer=tokenizer, **options)
    with pytest.raises(ValueError, match=r"feature map .* gives \(1, \d+, \d+\)"):
        ClassMapper(model, ["a", "b"])


def test_grad_cam_needs_a_classifier(model):
    pytest.importorskip("pytorch_grad_cam")
    with pytest.raises(ValueError, match="num_classes=0"):
        ClassMapper(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json does not exist"),
        (["shapes:x"], "shapes:COUNT"),
        (["shapes:3", "--limit", "0"], "--limit 0 must be at least 1"),
        (["shapes:3", "--captions", "nowhere:train"], "nowhere"),
        (["shapes:3", "--captions", "typo"], "FOLDER:SPLIT"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_loaded(arguments, message, capsys, tmp_path):
    assert main(["evaluate", "maps", str(tmp_path), *arguments, "--output-dir", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_windows_pool_around_the_places_of_their_layer(model, processor, examples, mapped, tmp_path):
    names = model.layer_names[-2:]
    _, records = mapped(tmp_path, end=1, boards=0, joint=False, windows=["-2=3"])
    row = records[examples[0].key]
    _, maps = read_arrays(tmp_path / "maps" / row["file"])
    pixels = processor(images=examples[0].read(), return_tensors="pt")["pixel_values"]
    text = processor(text=row["phrases"], carrier="the", return_tensors="pt")
    for name, window in zip(names, (3, 1), strict=True):
        wanted = model.attribute(pixels, text, layers=name, window=window).maps[name][0]
        np.testing.assert_allclose(maps[name], wanted.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="windows"):
        mapped(tmp_path, end=1, boards=0, joint=False)


def test_windows_are_read_by_layer():
    known = ("stem", "layer3", "layer4")
    assert read_windows(["layer4=3", "-2=5"], known, known) == {"layer4": 3, "layer3": 5}
    for typed, reason in (
        (["layer4"], "LAYER=SIDE"),
        (["layer4=2"], "odd"),
        (["layer4=3", "-1=3"], "twice"),
        (["stem=3"], "not asked"),
        (["layer9=3"], "layer9"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_windows(typed, ["layer3", "layer4"], known)
