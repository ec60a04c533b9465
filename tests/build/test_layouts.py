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
