"""An image that is unlike those of the training is told from them, and named with its distance."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from devil_hf.checkpoints.loading import load
from devil_hf.checkpoints.scope import distances, image_statistics, measure_scope, out_of_scope
from devil_hf.cli.main import main
from devil_hf.data.worlds import HELD_OUT_WORLD, World


def test_statistics_are_those_of_a_naive_loop():
    maps = [torch.randn(3, 5, 4, 2), torch.randn(3, 7, 2, 2)]
    for image, row in enumerate(image_statistics(maps)):
        expected = []
        for layer in maps:
            one = layer[image].numpy().reshape(layer.shape[1], -1)
            pooled = one.mean(axis=1)
            expected += [pooled.mean(), pooled.std(), one.std(axis=1).mean(), np.sqrt((one**2).sum(axis=0)).mean()]
        np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_what_is_far_is_said_with_its_distance(model, pixel_values):
    asked = copy.deepcopy(model)
    maps = asked.extract_features(pixel_values)
    assert distances(asked, maps) is None and out_of_scope(asked, maps, ["a", "b", "c"]) is None, "nothing is known"
    generator = torch.Generator().manual_seed(0)
    training = torch.randn(200, *pixel_values.shape[1:], generator=generator)
    asked.config.scope_statistics = measure_scope(asked, training.split(50))
    asked.config.scope = "It has seen noise."
    near = distances(asked, asked.extract_features(training))
    assert (near <= asked.config.scope_statistics["most"]).float().mean() == pytest.approx(0.99, abs=0.006)
    numbers = image_statistics(asked.extract_features(training)).double().numpy()
    inverse = np.linalg.inv(np.cov(numbers.T) + 1e-3 * np.diag(numbers.var(axis=0, ddof=1)))
    apart = numbers - numbers.mean(axis=0)
    expected = np.sqrt(np.einsum("nd,de,ne->n", apart, inverse, apart) / numbers.shape[1])
    np.testing.assert_allclose(near, expected, rtol=1e-2)
    far = asked.extract_features(torch.cat([training[:1], 9 * training[1:2]]))
    told = out_of_scope(asked, far, ["noise.png", "loud.png"])
    assert told is not None and told.startswith("1 of 2 images are unlike") and "(loud.png the farthest)" in told
    assert told.endswith("It has seen noise.")
    asked.config.scope_statistics["mean"] = "1 2"
    with pytest.raises(ValueError, match="do not fit its"):
        distances(asked, far)


def distance_of(model, processor, image) -> float:
    return float(distances(model, model.extract_features(processor(images=image, return_tensors="pt")["pixel_values"])))


def test_photographs_and_scenes_are_told_apart():
    scenes = [World(20, HELD_OUT_WORLD).scene(at).image for at in range(20)]
    rng = np.random.default_rng(0)
    others = [Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)), Image.new("RGB", (99, 99), "teal")]
    for name, images in {"shapes": (scenes, others), "photos": ([], [*scenes, *others])}.items():
        model, processor = load(name, "cpu")
        most = model.config.scope_statistics["most"]
        near, far = ([distance_of(model, processor, image) for image in kind] for kind in images)
        assert sum(distance > most for distance in near) <= 1 and min(far) > most


def test_the_command_says_it_once(tmp_path, capsys):
    file = tmp_path / "blank.png"
    Image.new("RGB", (64, 64), "teal").save(file)
    assert main(["describe", str(file), "--checkpoint", "shapes", "--max-new-tokens", "2"]) == 0
    told = capsys.readouterr().err
    assert told.count("blank.png is unlike the images of the training") == 1 and "rendered scenes" in told
    assert main(["describe", "--max-new-tokens", "2"]) == 0
    assert "note" not in capsys.readouterr().err
