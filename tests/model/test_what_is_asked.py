"""Counts, features, regions and phrases that are unusual and right are answered; those that are wrong are named."""

import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from devil_hf import DevilProcessor
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.pooling_devil import place_weights
from devil_hf.model.scoring_devil import finite_log_probs

INF = float("inf")


@pytest.mark.parametrize("name", ["max_new_tokens", "max_length", "num_beams", "num_return_sequences", "do_sample"])
def test_none_is_the_librarys_default(model, pixel_values, name):
    assert torch.equal(model.generate(pixel_values, **{name: None}), model.generate(pixel_values))


@pytest.mark.parametrize(("name", "value"), [("max_length", -1), ("num_beams", 0), ("num_return_sequences", -2)])
def test_counts_of_a_generation_config_are_checked_as_those_of_a_call(model, pixel_values, name, value):
    config = GenerationConfig()
    setattr(config, name, value)
    for call in (model.generate, model.describe):
        with pytest.raises(ValueError, match=f"{name}={value} must be a whole number, at least 1"):
            call(pixel_values, generation_config=config)
    with pytest.raises(TypeError, match="generation_config='short'"):
        model.generate(pixel_values, generation_config="short")


def test_the_generation_config_of_a_call_is_followed_and_left_as_it_was(model, pixel_values):
    config = GenerationConfig(max_new_tokens=np.int64(3).item(), num_beams=2)
    before = config.to_dict()
    found = model.generate(pixel_values, generation_config=config)
    assert torch.equal(found, model.generate(pixel_values, max_new_tokens=np.int64(3), num_beams=2))
    assert config.to_dict() == before
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.describe(pixel_values, generation_config=GenerationConfig(return_dict_in_generate=True))


@pytest.mark.parametrize("training", [False, True])
def test_pooled_features_without_a_layer_name_it(model, training):
    pooled = [torch.zeros(2, channels) for channels in model.backbone.channels]
    model = copy.deepcopy(model).train(training)
    with pytest.raises(ValueError, match="pooled_features hold nothing of layer 'layer1'"):
        model(pooled_features=[None, *pooled[1:]])
    with pytest.raises(ValueError, match=r"'layer2' have the shape \(1, .*expected \(2, "):
        model(pooled_features=[pooled[0], pooled[1][:1], *pooled[2:]])


class Waits(TorchDispatchMode):
    """Counts where a device would be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def test_checks_do_not_wait_for_the_device_layer_by_layer(model, pixel_values, phrases):
    pooled = [torch.zeros(4, channels) for channels in model.backbone.channels]
    training = copy.deepcopy(model).train()
    with Waits() as step:
        training(pooled_features=pooled, input_ids=phrases["input_ids"], attention_mask=phrases["attention_mask"])
    assert step.count <= 5, "whatever the number of layers"
    with Waits() as question, torch.no_grad():
        model.ask(pixel_values)
    assert question.count <= 3


def test_features_that_are_large_and_finite_are_no_fault(model):
    features = [torch.full((1, channels), 1e38) for channels in model.backbone.channels]
    model.check_finite(features)
    features[2][0, 0] = -INF
    with pytest.raises(ValueError, match="features of layer 'layer3' are not finite"):
        model.check_finite(features)


class Silent(torch.nn.Module):
    """A language model's head that never says some tokens."""

    def __init__(self, head, tokens):
        super().__init__()
        self.head, self.tokens = head, tokens

    def forward(self, hidden):
        return self.head(hidden).index_fill(-1, self.tokens, -INF)


def test_words_that_are_never_said_are_named_and_others_keep_their_number(model, pixel_values):
    silent = copy.deepcopy(model)
    silent.language_model.lm_head = Silent(silent.language_model.lm_head, torch.tensor([0, 9]))
    ids = torch.tensor([[5, 6, 0], [5, 7, 8]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.isfinite(silent.score(pixel_values, ids, mask).evidence).all()  # 0 pads
    ids[1, 0] = 9
    carrier = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert torch.isfinite(silent.score(pixel_values, ids, mask, carrier).evidence).all()  # 9 is read, not scored
    for call in (
        lambda: silent.score(pixel_values, ids, mask),
        lambda: silent.attribute(pixel_values, {"input_ids": ids, "attention_mask": mask}),
    ):
        with pytest.raises(ValueError, match=r"phrases \[1\] hold tokens that the language model never says"):
            call()
    with pytest.raises(ValueError, match=r"descriptions \[1\] hold tokens"):
        silent.sequence_log_probs(silent.null_prefix().expand(2, -1, -1), ids[:, :2])


@pytest.mark.parametrize("wrong", [float("nan"), INF])
def test_scores_that_are_no_numbers_blame_the_weights(wrong):
    log_probs = torch.tensor([[[-1.0, -INF], [wrong, 0.0]]])
    with pytest.raises(ValueError, match="not finite: check the language model's weights"):
        finite_log_probs(log_probs, torch.ones(2, 2, dtype=torch.bool), "phrases")


def test_regions_of_the_size_of_the_pixel_values_fit_maps_of_any_aspect():
    regions = torch.zeros(1, 64, 128)
    regions[:, :32, :64] = 1
    pooled = {0: torch.zeros(1, 2, 7, 7)}
    (weights,) = place_weights(["a"], pooled, torch.zeros(1, 3, 64, 128), regions=regions)[0].values()
    assert weights.shape == (1, 1, 7, 7) and weights[..., :3, :3].sum() > 0.7
    with pytest.raises(ValueError, match=r"7 x 7 maps do not lie over the pixel values: .*give pixel_values"):
        place_weights(["a"], pooled, None, regions=regions)
    place_weights(["a"], {0: torch.zeros(1, 2, 1, 1)}, None, regions=torch.ones(1, 20, 200))


def test_masks_over_a_very_long_strip_cost_little_and_give_the_same_regions(tokenizer, monkeypatch):
    processor = DevilProcessor(DevilImageProcessor(crop_size={"height": 64, "width": 64}, crop_pct=0.8), tokenizer)
    mask = np.random.default_rng(0).random((2, 9, 300))
    whole = processor.masks_to_regions([mask])
    monkeypatch.setattr("devil_hf.model.image_processing_devil.MAX_RESIZED_PIXELS", 1)
    monkeypatch.setattr("devil_hf.model.processing_devil.MAX_RESIZED_PIXELS", 1)
    torch.testing.assert_close(processor.masks_to_regions([mask]), whole, atol=1e-3, rtol=0)
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.functional, "interpolate", None)  # 6 GB
    assert torch.equal(processor.masks_to_regions([np.ones((1, 200_000))]), torch.ones(1, 1, 64, 64))
