"""Grounded descriptions: the candidates of beam search, ranked with what places say, against a loop that asks one by one."""

import json

import pytest
import torch

from devil_hf.checkpoints.loading import load
from devil_hf.cli import main as cli
from devil_hf.data.shapes import make_scene
from devil_hf.questions.grounding import describe_grounded, noun_phrases, tile_regions


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("a dotted red square and a plain blue ring", ["a dotted red square", "a plain blue ring"]),
        ("a cross that is striped left of a star", ["a cross that is striped", "a star"]),
        ("there is a red circle on a dark background", ["a red circle", "a dark background"]),
        ("two dogs are running on the grass next to a man", ["two dogs are running", "the grass", "a man"]),
        ("A man riding a horse, to the left of his dog.", ["a man riding", "a horse", "his dog"]),
        ("people walk through water", ["people walk", "water"]),
        ("a picture of a red ring", ["a red ring"]),
        ("There is a black and white photo of a dog", ["a dog"]),
        ("in this image there is a dog", ["a dog"]),
        ("a picture on the wall", ["a picture", "the wall"]),
        ("striped", ["striped"]),
        ("there is", []),
        ("", []),
    ],
)
def test_captions_are_cut_into_phrases(text, phrases):
    assert noun_phrases(text) == phrases


def test_tiles_cover_the_image_once_by_row():
    tiles = tile_regions(3)
    assert tiles.shape == (9, 48, 48)
    torch.testing.assert_close(tiles.sum(dim=0), torch.ones(48, 48))
    assert tiles[1, 0, 16] == 1 and tiles[3, 16, 0] == 1
    with pytest.raises(ValueError, match="grid=0"):
        tile_regions(0)


def one_by_one(model, processor, pixels, candidates, strength, grid):
    """The definition, asked phrase by phrase and place by place: (score, text) of every candidate."""
    sequences = model.generate(pixels, num_beams=candidates, num_return_sequences=candidates, max_new_tokens=12)
    scored = []
    for tokens in sequences:
        ids = tokens.tolist()
        if model.config.eos_token_id in ids:
            ids = ids[: ids.index(model.config.eos_token_id) + 1]
        log_prob = model.score(pixels, input_ids=torch.tensor([ids])).log_probs.item()
        text = processor.batch_decode([tokens], skip_special_tokens=True)[0].strip()
        support = 0.0
        for phrase in noun_phrases(text):
            asked = processor(text=[phrase], return_tensors="pt")
            evidence = []
            for tile in tile_regions(grid).repeat_interleave(5, dim=1).repeat_interleave(5, dim=2):  # to the pixels' 160
                output = model.score(pixels, regions=tile[None, None], **asked)
                evidence.append((output.log_probs[0, 0] - output.null_log_probs[0]).item())
            support += max(evidence)
        scored.append(((log_prob + strength * support) / len(ids), text))
    return scored


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_the_chosen_candidate_is_the_best_of_a_naive_loop(strength, model, processor, pixel_values):
    options = {"candidates": 4, "strength": strength, "grid": 2}
    found = describe_grounded(model, processor, pixel_values, max_new_tokens=12, **options)
    for row, description in enumerate(found):
        scored = one_by_one(model, processor, pixel_values[row : row + 1], **options)
        assert description.score(strength) == pytest.approx(max(scored)[0], abs=1e-4)
        assert description.text in [text for score, text in scored if score > max(scored)[0] - 1e-4]
        assert [phrase.text for phrase in description.phrases] == noun_phrases(description.text)


def test_the_places_change_what_is_said_and_reading_features_again_does_not(model, processor, pixel_values):
    said = [
        [one.text for one in describe_grounded(model, processor, pixel_values, strength=strength, max_new_tokens=12)]
        for strength in (0.0, 20.0)
    ]
    assert said[0] != said[1]
    features = model.extract_features(pixel_values)
    again = describe_grounded(model, processor, feature_maps=features, strength=20.0, max_new_tokens=12)
    assert [one.text for one in again] == said[1]


def test_a_choice_needs_candidates_and_a_strength_that_is_not_negative(model, processor, pixel_values):
    with pytest.raises(ValueError, match="candidates=1"):
        describe_grounded(model, processor, pixel_values, candidates=1)
    with pytest.raises(ValueError, match="strength=-1"):
        describe_grounded(model, processor, pixel_values, strength=-1)
    with pytest.raises(ValueError, match="num_beams"):
        describe_grounded(model, processor, pixel_values, num_beams=3)


def test_only_the_layers_that_are_asked_are_computed(model, processor, pixel_values, monkeypatch):
    asked = []
    extract = model.extract_features
    monkeypatch.setattr(model, "extract_features", lambda *given: asked.append(given[1]) or extract(*given))
    last = len(model.layer_names) - 1
    describe_grounded(model, processor, pixel_values, layers=last, max_new_tokens=4)
    assert asked == [[last]]


def test_places_mend_what_beam_search_binds_wrongly():
    """On the embedded checkpoint and scenes of several objects: more of them are described with every attribute in its place."""
    model, processor = load("shapes")
    scenes = [scene for index in range(60) if len((scene := make_scene(1, index)).objects) == 3]
    pixels = processor(images=[scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    features = model.extract_features(pixels)

    def right(strength: float) -> int:
        said = describe_grounded(model, processor, feature_maps=features, strength=strength)
        return sum(
            sum(set(item.attributes.values()) <= set(phrase.text.split()) for phrase in one.phrases)
            for one, scene in zip(said, scenes, strict=True)
            for item in scene.objects
        )

    assert len(scenes) > 12
    assert right(0.2) > right(0.0) + 3


def test_the_command_prints_the_evidence_of_each_phrase(images, tmp_path, capsys):
    images[0].save(tmp_path / "one.png")
    command = ["describe", str(tmp_path / "one.png"), "--device", "cpu", "--grounded"]
    assert cli.main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["text"] and [phrase["text"] for phrase in row["phrases"]] == noun_phrases(row["text"])
    for option in (["--evidence"], ["--window", "3"]):
        assert cli.main([*command, *option]) == 1
        assert f"leave out {option[0]}" in capsys.readouterr().err
