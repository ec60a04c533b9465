"""A layout of features can be added from outside, in one place; what a checkpoint with it needs is said."""

import pytest
import torch
from torch import nn

from devil_hf.build import backbone_from_source
from devil_hf.build.hooks_devil import LAYOUTS
from devil_hf.build.layouts import RECOGNISERS, infer_layout, register_layout


class Turned(nn.Module):
    """Feature maps (C, N, H, W), as some old code has them."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, pixel_values):
        return self.convolution(pixel_values).transpose(0, 1)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.eye = Turned()

    def forward(self, pixel_values):
        return self.eye(pixel_values).sum()


def recognise(shape, batch, height, width):
    return {"prefix": 0} if len(shape) == 4 and shape[1] == batch and shape[0] == 8 else None


@pytest.fixture
def turned(monkeypatch):
    monkeypatch.setattr("devil_hf.build.layouts.RECOGNISERS", dict(RECOGNISERS))
    before = dict(LAYOUTS)
    register_layout("CNHW", recognise, lambda output, prefix, height, width: output.transpose(0, 1))
    yield
    LAYOUTS.clear()
    LAYOUTS.update(before)


def test_a_layout_registered_from_outside_is_recognised_recorded_and_read(turned):
    network = Network()
    backbone = backbone_from_source(network, "eye")
    assert backbone.config["readers"][0]["layout"] == "CNHW" and backbone.channels == [8]
    images = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(backbone(images)[0], network.eye.convolution(images))
    del LAYOUTS["CNHW"]
    with pytest.raises(ValueError, match=r"layout 'CNHW', of which only .*'NCHW'.* are registered"):
        backbone(images)


def test_what_is_built_in_is_recognised_as_before(turned):
    assert infer_layout(torch.Size((2, 16, 7, 9)), 2, 224, 288) == {"layout": "NCHW", "prefix": 0}


class Tokens(nn.Module):
    """Patches as tokens among others: in front, in the middle and behind; then a block that mixes them a little."""

    def __init__(self, front=0, middle=0, behind=0, lnc=False, mixed=False):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 16, stride=16)
        self.others = nn.Parameter(torch.randn(front + middle + behind, 8))
        self.sizes, self.lnc, self.mixed = (front, middle, behind), lnc, mixed
        self.join, self.block = nn.Identity(), nn.Sequential(nn.Linear(8, 8))

    def forward(self, pixel_values):
        patches = self.convolution(pixel_values).flatten(2).transpose(1, 2)
        front, middle, behind = self.others.expand(len(patches), -1, -1).split(self.sizes, dim=1)
        half = patches.shape[1] // 2
        tokens = torch.cat([front, patches[:, :half], middle, patches[:, half:], behind], dim=1)
        if self.mixed:
            tokens = tokens + 0.1 * tokens.mean(dim=1, keepdim=True)
        tokens = tokens.transpose(0, 1) if self.lnc else tokens
        return self.block(self.join(tokens))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("lnc", [False, True])
@pytest.mark.parametrize(("front", "behind"), [(1, 0), (0, 4), (1, 4), (9, 0), (0, 0), (5, 1)])
def test_the_tokens_of_patches_are_found_by_a_probe(front, behind, lnc, mixed):
    torch.manual_seed(0)
    network = Tokens(front, 0, behind, lnc, mixed)
    config = {"data_config": {"input_size": (3, 128, 192)}}
    backbone = backbone_from_source(network, "join", backbone_kwargs=config)
    images = torch.randn(2, 3, 128, 192)
    expected = network.convolution(images)
    if not mixed:
        torch.testing.assert_close(backbone(images)[0], expected)
    assert backbone(images)[0].shape == expected.shape
    other = torch.randn(1, 3, 256, 192)
    assert backbone(other)[0].shape == network.convolution(other).shape


def test_tokens_in_the_middle_are_refused_and_the_error_says_how_to_state_them():
    network = Tokens(0, 1, 0)
    config = {"data_config": {"input_size": (3, 128, 192)}}
    with pytest.raises(ValueError, match=r"tokens_around.*register a layout"):
        backbone_from_source(network, "join", backbone_kwargs=config)
    stated = backbone_from_source(Tokens(2, 0, 3), "join", backbone_kwargs=config | {"tokens_around": [2, 3]})
    assert stated.config["readers"][0] | {"prefix": 2, "behind": 3} == stated.config["readers"][0]
    with pytest.raises(ValueError, match="tokens_around=3"):
        backbone_from_source(network, "join", backbone_kwargs=config | {"tokens_around": 3})
