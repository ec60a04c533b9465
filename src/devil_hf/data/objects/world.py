"""Scenes of the shapes world as images with objects: words that one object of several has, and its exact mask.

As things, one by one, all objects of the same scenes, each called by its colour, texture and shape, in either order.
"""

from devil_hf.data.objects import OBJECT_SOURCES, LocalisedImage, ObjectSource, Region
from devil_hf.data.objects.masks import Part
from devil_hf.data.rendering import SceneObject
from devil_hf.data.worlds import SHAPES, parse_world

OBJECT = "object"  # the group of things


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

            things = tuple(
                Region(_names(item), OBJECT, [{"scene": [world.seed, index], "object": at}])
                for at, item in enumerate(scene.objects)
            )
            found.append(LocalisedImage(f"{world.seed}-{index}", read, groups, present, parts, things=things))
    return found


def _names(item: SceneObject) -> tuple[str, ...]:
    return (
        f"a {item.texture} {item.colour} {item.shape}",
        f"{'an' if item.colour[0] in 'aeiou' else 'a'} {item.colour} {item.texture} {item.shape}",
    )


OBJECT_SOURCES.register(
    SHAPES, ObjectSource(f"{SHAPES}:COUNT:SEED", lambda text: text.partition(":")[0] == SHAPES, read_world, options=())
)
