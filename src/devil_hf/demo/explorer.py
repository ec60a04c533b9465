"""What the demo answers, without any page: the same plain functions stand behind clicks and API endpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.outputs_devil import AttributionOutput
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.places import crop_box, location_to_box, pixel_to_location

MAX_PHRASES, MAX_PHRASE_LENGTH = 6, 60
MAX_CARRIER_LENGTH = 160  # letters: about the words of a description before its last
MAX_NEW_TOKENS = 30


@dataclass(frozen=True)
class Look:
    """An image and what the backbone made of it.

    Args:
        image: upright RGB picture of size (W, H).
        feature_maps: per layer (1, C_l, H_l, W_l).
    """

    image: Image.Image
    feature_maps: list[Tensor]

    @property
    def size(self) -> int:
        """Bytes of the feature maps."""
        return sum(maps.nbytes for maps in self.feature_maps)


@dataclass(frozen=True)
class Explorer:
    """A model and its processor, asked about one image at a time."""

    model: DevilModel
    processor: DevilProcessor

    @property
    def layers(self) -> list[str]:
        """Names of the layers, shallowest first."""
        return self.model.layer_names

    def look(self, image: Image.Image) -> Look:
        """Run the backbone once; every question about `image` reads its features."""
        pixel_values = self.processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return Look(image, [maps for maps in self.model.extract_features(pixel_values) if maps is not None])

    def check_layer(self, layer: Any) -> str:
        """The name of a layer, as it was given.

        Raises:
            ValueError: for what is none.
        """
        if layer not in self.layers:
            raise ValueError(f"There is no layer {str(layer)[:40]!r}; this model reads {', '.join(self.layers)}.")
        return str(layer)

    def grid(self, look: Look, layer: str) -> tuple[int, int]:
        """(rows, columns) of a layer."""
        self.check_layer(layer)
        height, width = look.feature_maps[self.layers.index(layer)].shape[-2:]
        return height, width

    def describe(self, look: Look) -> list[dict[str, Any]]:
        """What all layers together, and each alone, say of the whole image, with the evidence of each word."""
        output = self.model.describe(feature_maps=look.feature_maps, evidence=True, max_new_tokens=MAX_NEW_TOKENS)
        return self.processor.post_process_descriptions(output)

    def describe_pixel(self, look: Look, x: float, y: float, layers: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What the place under pixel (x, y) of the image says, at each layer, with the evidence of each word."""
        size = (look.image.height, look.image.width)
        places = {}
        for layer in layers or self.layers:
            place = pixel_to_location(self.processor.image_processor, x, y, self.grid(look, layer), size)
            if place is None:
                raise ValueError("The network does not see this part: its crop ends before. Choose a place inside.")
            places[layer] = [place]
        output = self.model.describe(
            feature_maps=look.feature_maps, locations=places, evidence=True, max_new_tokens=MAX_NEW_TOKENS
        )
        return self.processor.post_process_descriptions(output)

    def pixel_of(self, look: Look, layer: str, row: int, column: int) -> tuple[float, float]:
        """(x, y) in the middle of a place of a layer, in pixels of the image."""
        rows, columns = self.grid(look, layer)
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(
                f"{layer} has rows 0 to {rows - 1} and columns 0 to {columns - 1}; row {row}, column {column} is outside."
            )
        size = (look.image.height, look.image.width)
        left, top, right, bottom = location_to_box(self.processor.image_processor, (row, column), (rows, columns), size)
        return (left + right) / 2, (top + bottom) / 2

    def map_phrases(self, look: Look, phrases: Sequence[str], carrier: str | None = "") -> AttributionOutput:
        """Maps of phrases on every layer, in nats per token over the null prefix."""
        carrier = carrier.strip()[:MAX_CARRIER_LENGTH] if isinstance(carrier, str) else None
        tokens = self.processor(text=list(phrases), carrier=carrier or None, return_tensors="pt")
        output = self.model.attribute(feature_maps=look.feature_maps, phrases=tokens)
        output.maps = {layer: values.cpu() for layer, values in output.maps.items()}
        return output

    def crop(self, look: Look) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the part that the backbone sees, as shares of the image; beyond 0..1 if padded."""
        width, height = look.image.size
        left, top, right, bottom = crop_box(self.processor.image_processor.geometry((height, width)))
        return left / width, top / height, right / width, bottom / height


def read_phrases(text: str) -> list[str]:
    """Phrases between commas or line ends.

    Raises:
        ValueError: for none, for too many, and for one that is too long.
    """
    if not isinstance(text, str):
        raise ValueError(f"Phrases are text with commas between, not {str(text)[:40]!r}.")
    phrases = list(dict.fromkeys(" ".join(part.split()) for part in text.replace("\n", ",").split(",") if part.strip()))
    if not phrases:
        raise ValueError("Type at least one word or phrase; commas stand between several.")
    if len(phrases) > MAX_PHRASES:
        raise ValueError(f"{len(phrases)} phrases are too many at once: at most {MAX_PHRASES}.")
    for phrase in phrases:
        if len(phrase) > MAX_PHRASE_LENGTH:
            raise ValueError(f"The phrase '{phrase[:40]}…' is too long: at most {MAX_PHRASE_LENGTH} letters.")
    return phrases
