"""Any vision network as a frozen source of feature maps (B, C, H, W), one per chosen layer.

How a layer is read was recorded when the checkpoint was built, and one companion for each way travels with it: `timm_devil.py`
and `transformers_devil.py` read what such networks hand out themselves, and make their architectures; `hooks_devil.py` reads any
submodule. The network is kept whole, so that its weights can be compared with their source by a hash.

`NAME:class` is the class token of layer NAME, a map of one location, as the paper uses CLIP-ViT's.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

# How layers are read (by a reader's `by`), and how the architecture of a description is made (by its kind): the companions that
# travel with such backbones enter themselves here.
READERS: dict[str, Callable[[Any, Tensor, list[dict]], list[Tensor]]] = {}
BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {}


class FeatureBackbone(nn.Module):
    """A frozen vision network that returns feature maps of chosen layers.

    Attributes:
        module: the whole network; its weights are this module's state dict, each name starting with `module.`.
        config: JSON-serialisable description, as `devil_hf.build.backbone_from_source` writes it:
            `kind` ("timm", "transformers" or "custom"), `architecture` or `model_class` and `model_config`, `kwargs`;
            `source`, `revision` (commit) and `sha256` of the weights; `data_config`, the evaluation preprocessing in
            timm's terms; `input_size` (3, height, width); `layer_names`, all layers offered; `layers`, `channels` and
            `readers` (how each is read), for the chosen layers.
        layers, channels: name and number of channels of each chosen layer.
        layer_names: the layers that the network offers, shallow to deep.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any]):
        super().__init__()
        self.module = module
        self.config = config
        self.layers: list[str] = config["layers"]
        self.channels: list[int] = config["channels"]
        self.layer_names: list[str] = config["layer_names"]
        ways = {reader["by"] for reader in config["readers"]}
        if not len(self.layers) == len(self.channels) == len(config["readers"]) or ways - READERS.keys():
            raise ValueError(f"the layers {self.layers!s:.200} of this backbone cannot be read by {ways!s:.200}: it is damaged.")
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_config(cls, config: dict[str, Any], module: nn.Module | None = None) -> "FeatureBackbone":
        """The architecture of `config`, without its weights; a custom backbone needs its `module`."""
        return cls(build_module(config) if module is None else module, config)

    def train(self, mode: bool = True) -> "FeatureBackbone":
        """Stay in evaluation mode: a frozen network has neither dropout nor running statistics."""
        return super().train(False)

    def forward(self, pixel_values: Tensor, layers: Sequence[int] | None = None) -> list[Tensor | None]:
        """Feature maps of images.

        Args:
            pixel_values: preprocessed images of shape `(batch_size, 3, height, width)`.
            layers: positions in `self.layers`; None means all. Nothing deeper is computed where the network allows it.

        Returns:
            One map of shape `(batch_size, channels, rows, columns)` per chosen layer, None where not asked for.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must have the shape (batch, 3, height, width), got {tuple(pixel_values.shape)}")
        if self.config["kind"] == "custom":
            pixel_values = pixel_values.contiguous()  # its code may flatten by `view`, which channels-last images do not allow
        wanted = range(len(self.layers)) if layers is None else layers
        maps: list[Tensor | None] = [None] * len(self.layers)
        for way, read in READERS.items():
            picked = [index for index in wanted if self.config["readers"][index]["by"] == way]
            if picked:
                readers = [self.config["readers"][index] for index in picked]
                for index, feature_map in zip(picked, read(self.module, pixel_values, readers), strict=True):
                    maps[index] = feature_map
        return maps


def build_module(description: dict[str, Any]) -> nn.Module:
    """The architecture of a description, with random weights, on the current default device.

    A ValueError for a description that cannot be built, or asks for more than an architecture.
    """
    kind = str(description.get("kind"))
    if kind not in BUILDERS:
        raise ValueError(f"a {kind:.80} backbone cannot be built from its configuration; pass the module itself as `backbone=`")
    return BUILDERS[kind](description)
