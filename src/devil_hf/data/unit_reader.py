"""Activations of a network's units on images of any source, batch by batch.

A unit is a channel of a layer's feature map, or a linear read-out of the map (a *direction*: a probe, a class vector, a latent
of a sparse autoencoder).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from devil_hf.build import backbone_from_source, image_processor_of
from devil_hf.checkpoints.identity import network_identity, precision_of, preprocessing_of
from devil_hf.data.images import ImageStream, NumberedImages
from devil_hf.model.backbone_devil import FeatureBackbone
from devil_hf.model.checkpoint_devil import weights_hash
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.pooling_devil import resolve_layers


class UnitReader:
    """Activations of a network's units, layer by layer.

    Args:
        backbone: the network and its layers.
        directions: linear read-outs (M, C_l) by layer name. They follow the layer's channels as further units.
        biases: (M,) by layer name, added to the read-outs; zero where left out.
        channels: whether channels are units too; without them only layers with directions are read.
        layers: which of the backbone's layers, by name or index; None for all.
    """

    def __init__(
        self,
        backbone: FeatureBackbone,
        directions: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
        channels: bool = True,
        layers: str | int | Sequence[str | int] | None = None,
    ):
        directions, biases = dict(directions or {}), dict(biases or {})
        for name, vectors in directions.items():
            if name not in backbone.layers:
                raise ValueError(f"directions of layer {name!r}: this network reads the layers {backbone.layers}")
            width = backbone.channels[backbone.layers.index(name)]
            if vectors.ndim != 2 or vectors.shape[1] != width:
                raise ValueError(f"directions of shape {tuple(vectors.shape)}: layer {name!r} needs (directions, {width})")
        if not channels and not directions:
            raise ValueError("without channels there are no units but directions: give some")
        self.backbone, self.directions, self.biases, self.channels = backbone, directions, biases, channels
        chosen = [backbone.layers[at] for at in resolve_layers(layers, backbone.layers)]
        self.layers = [name for name in chosen if channels or name in directions]

    def known(self, processor: DevilImageProcessor) -> dict[str, Any]:
        """What decides the units' activations on an image that `processor` prepares, as JSON."""
        return {
            "weights_sha256": self._fingerprint(),
            "network_settings": network_identity(self.backbone.config, self.layers),
            "precision": precision_of(self.backbone),
            "preprocessing": preprocessing_of(processor),
        }

    def _fingerprint(self) -> str:
        """A hash of the network's weights and of the directions."""
        extra = {f"{name}.direction": tensor for name, tensor in self.directions.items()}
        extra |= {f"{name}.bias": tensor for name, tensor in self.biases.items()}
        own = str(self.backbone.config["sha256"])
        return f"{own}+{weights_hash(extra)}" if extra else own

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer of `layers`: activations of its units (B, U, H, W), and the feature map (B, C, H, W)."""
        parameter = next(self.backbone.parameters())
        positions = [self.backbone.layers.index(name) for name in self.layers]
        pixel_values = pixel_values.to(parameter).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(pixel_values, positions)
        return [(self._units(name, maps[at].float()), maps[at].float()) for name, at in zip(self.layers, positions, strict=True)]

    def _units(self, name: str, feature_map: Tensor) -> Tensor:
        if name not in self.directions:
            return feature_map
        read = torch.einsum("bchw,mc->bmhw", feature_map, self.directions[name].to(feature_map))
        if name in self.biases:
            read = read + self.biases[name].to(feature_map)[:, None, None]
        return torch.cat([feature_map, read], dim=1) if self.channels else read


def open_network(
    network: str | PathLike | nn.Module, layers: Any = None, device: str | torch.device = "cpu", **kwargs
) -> tuple[FeatureBackbone, DevilImageProcessor]:
    """Any network and its own preprocessing; the arguments are those of `devil_hf.build.backbone_from_source`."""
    backbone = backbone_from_source(network, layers, **kwargs)
    return backbone.to(device), image_processor_of(backbone.config["data_config"])


def pixel_batches(
    images: ImageStream, processor: DevilImageProcessor, batch_size: int, start: int = 0, step: int = 1, workers: int = 0
) -> Iterator[tuple[list[int], Tensor, int]]:
    """(numbers, pixel values, positions read) of batches of a source; images that cannot be read are left out, with a warning."""
    if isinstance(images, NumberedImages):
        chosen = _Positions(images, processor, range(start, len(images), step))
        pairs: Any = torch.utils.data.DataLoader(
            chosen,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=list,
            multiprocessing_context="fork" if workers else None,  # sources hold functions, which cannot be pickled
        )
    else:
        rows = ((n, _pixels(image, processor)) for n, image in images.stream(start, step))
        pairs = iter(lambda: list(islice(rows, batch_size)), [])
    read = 0
    for batch in pairs:
        read += len(batch)
        kept = [(number, pixels) for number, pixels in batch if pixels is not None]
        if kept:
            yield [number for number, _ in kept], torch.stack([pixels for _, pixels in kept]), read
            read = 0


class _Positions(torch.utils.data.Dataset):
    """Pixel values of the images at given positions, for a data loader."""

    def __init__(self, images: NumberedImages, processor: DevilImageProcessor, positions: range):
        self.images, self.processor, self.positions = images, processor, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        number = self.images.numbers[self.positions[index]]
        return number, _pixels(self.images.picture(number), self.processor)


def _pixels(picture: Image.Image | None, processor: DevilImageProcessor) -> Tensor | None:
    return None if picture is None else processor(images=picture, return_tensors="pt")["pixel_values"][0]


__all__ = ["UnitReader", "open_network", "pixel_batches"]
