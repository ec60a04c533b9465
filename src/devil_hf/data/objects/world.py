"""Scenes of the shapes world as images with objects: words that one object of several has, and its exact mask."""

from devil_hf.data.objects import OBJECT_SOURCES, LocalisedImage, ObjectSource
from devil_hf.data.objects.masks import Part
from devil_hf.data.worlds import SHAPES, parse_world


def read_world(source: str, images=None, names=None) -> list[LocalisedImage]:
    """The scenes of `shapes:COUNT:SEED` in which a word belongs to one object alone."""
    world = parse_world(source)
    assert world is not None
    found = []
    for index, scene in enumerate(world.scenes()):
        phrases = scene.unique_phrases()
        if phrases:
            parts: dict[str, list[Part]] = {
                one.text: [{"scene": [world.seed, index], "object": one.object_index}] for one in phrases
            }
            groups = {phrase.text: phrase.attribute for phrase in phrases}
            present = frozenset(word for item in scene.objects for word in item.attributes.values())

            def read(scene=scene):
                return scene.image

            found.append(LocalisedImage(f"{world.seed}-{index}", read, groups, present, parts))
    return found


OBJECT_SOURCES.register(SHAPES, ObjectSource(f"{SHAPES}:COUNT:SEED", lambda text: text.partition(":")[0] == SHAPES, read_world))
