"""Pictures of a repository: what the checkpoint says of images, and maps of phrases on them, drawn by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from devil_hf.checkpoints import SCOPES, SHAPES
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.hub.facts import Examples, Layer
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.figures import attribution_figure, layers_figure

LARGEST_PICTURE = 768  # pixels of an example image's longer side
FIGURE: dict[str, Any] = {"quality": 90, "subsampling": 0}
EXAMPLE_WORLD = World(20, HELD_OUT_WORLD)
EXAMPLE_SCENES = 3
MAX_NEW_TOKENS = 30


def layer_table(model: DevilModel) -> list[Layer]:
    """The layers of a model with the grids that they have at its own input size."""
    size = model.config.backbone_config["input_size"]
    with torch.no_grad():
        maps = model.extract_features(torch.zeros(1, *size))
    return [
        Layer(name, values.shape[1], values.shape[2], values.shape[3], size)
        for name, values in zip(model.layer_names, maps, strict=True)
        if values is not None
    ]


def draw_examples(
    model: DevilModel, processor: DevilProcessor, folder: Path, images: Sequence[Image.Image] = (), phrases: Sequence[str] = ()
) -> Examples | None:
    """Let the checkpoint describe and map images, into `folder/pictures`; None where there is no image."""
    world = EXAMPLE_WORLD if not images and model.config.scope == SCOPES[SHAPES] else None
    asked = [list(phrases)] * len(images)
    if world is not None:
        images, words = _scenes(world)
        asked = [list(phrases) or one for one in words]
    if not images:
        return None
    images = [image.convert("RGB") for image in images]
    for image in images:
        image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    rows = _descriptions(model, processor, images)
    # Without phrases of the publisher's: what the model itself says of the image.
    asked = [one or [dict(said)["all"] or "a"] for one, said in zip(asked, rows, strict=True)]
    (folder / "pictures").mkdir(exist_ok=True)
    examples = Examples([], "pictures/layers.jpg", [], asked[0], world.label if world else None)
    layers_figure(images, rows).save(folder / examples.layers, **FIGURE)
    for number, (image, wanted) in enumerate(zip(images, asked, strict=True), 1):
        examples.images.append(f"pictures/example_{number}.png")
        examples.maps.append(f"pictures/maps_{number}.jpg")
        image.save(folder / examples.images[-1])
        maps = model.attribute(**processor(images=image), phrases=processor(text=wanted))
        maps.maps = {name: values.cpu() for name, values in maps.maps.items()}
        attribution_figure(processor, image, maps, wanted).save(folder / examples.maps[-1], **FIGURE)
    return examples


def _scenes(world: World) -> tuple[list[Image.Image], list[list[str]]]:
    """Scenes of several objects, and the words of their objects."""
    scenes = [scene for scene in world.scenes() if len(scene.objects) > 1][:EXAMPLE_SCENES]
    words = [list(dict.fromkeys(w for item in scene.objects for w in item.attributes.values())) for scene in scenes]
    return [Image.fromarray(scene.image) for scene in scenes], words


def _descriptions(model: DevilModel, processor: DevilProcessor, images: Sequence[Image.Image]) -> list[list]:
    """Per image, (layer, description) pairs; the first is of all layers together."""
    output = model.describe(**processor(images=images, return_tensors="pt"), max_new_tokens=MAX_NEW_TOKENS)
    rows: list[list[tuple[str, str]]] = [[] for _ in images]
    for row, text in enumerate(processor.batch_decode(output.sequences, skip_special_tokens=True)):
        rows[int(output.image_index[row])].append((output.layer_of(row), text.strip()))
    return rows


__all__ = ["draw_examples", "layer_table"]
