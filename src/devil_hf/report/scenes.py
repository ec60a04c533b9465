"""Pictures of what a checkpoint of the shapes world says: each layer in words, maps of words, descriptions by place."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.folders import written as whole_file
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.figures import attribution_figure, layers_figure, locations_figure


def draw_pictures(
    model: DevilModel, processor: DevilProcessor, folder: Path, scenes: int = 3, say: Callable[[str], None] = print
) -> list[Path]:
    """Pictures of held-out scenes: what each layer says, maps per phrase and layer, descriptions by location."""
    folder.mkdir(parents=True, exist_ok=True)
    several = [scene for scene in World(40, HELD_OUT_WORLD).scenes() if len(scene.objects) > 1]
    written = []

    def write(picture: Image.Image, name: str) -> None:
        with whole_file(folder / name) as unfinished:
            picture.save(unfinished)
        written.append(folder / name)

    images = [Image.fromarray(scene.image) for scene in several[:scenes]]
    inputs = processor(images=images, return_tensors="pt")
    output = model.describe(**inputs, max_new_tokens=40)
    texts = processor.batch_decode(output.sequences, skip_special_tokens=True)
    rows: list[list[tuple[str, str]]] = [[] for _ in images]
    for row, text in enumerate(texts):
        rows[int(output.image_index[row])].append((output.layer_of(row), text))
    for scene, layer_texts in zip(several, rows, strict=False):
        objects = ", ".join(" ".join(item.attributes.values()) for item in scene.objects)
        say("\n".join([f"  {'(truth)':12} {objects}", *(f"  {layer:12} {text}" for layer, text in layer_texts), ""]))
    write(layers_figure(images, rows), "layers.png")
    for index, (image, scene) in enumerate(zip(images, several, strict=False)):
        write(image, f"scene_{index}.png")
        words = list(dict.fromkeys(word for item in scene.objects for word in item.attributes.values()))
        one = processor(images=image, return_tensors="pt")
        maps = model.attribute(**one, phrases=processor(text=words, return_tensors="pt"))
        write(attribution_figure(processor, image, maps, words), f"maps_{index}.png")
        layer = model.layer_names[-2]
        dense = model.describe(**one, layers=layer, locations="all", max_new_tokens=12)
        cells = processor.batch_decode(dense.sequences, skip_special_tokens=True)
        places = [tuple(place) for place in dense.locations.tolist()]
        grid = (maps.maps[layer].shape[-2], maps.maps[layer].shape[-1])
        figure = locations_figure(processor, image, dict(zip(places, cells, strict=True)), grid, layer)
        write(figure, f"locations_{index}.png")
    return written


__all__ = ["draw_pictures"]
