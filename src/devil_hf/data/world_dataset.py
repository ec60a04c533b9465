"""Scenes of the shapes world as a `datasets` data set with the whole ground truth of each."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from devil_hf.data.worlds import World

SCENE_FEATURES = Features(
    {
        "image": Image(),
        "caption": Value("string"),
        "captions": List(Value("string")),
        "objects": List(
            {
                **{name: Value("string") for name in ("colour", "texture", "shape", "size")},
                "centre": List(Value("float32")),
                "box": List(Value("int32")),
            }
        ),
        "masks": List(Image()),
        "relations": List({"subject": Value("int32"), "relation": Value("string"), "object": Value("int32")}),
        "background": Value("string"),
    }
)


def world_dataset(world: World, captions: int = 5, streaming: bool = False) -> Dataset | IterableDataset:
    """The scenes of a world, with the columns of `SCENE_FEATURES`.

    Args:
        world: which scenes.
        captions: texts of each scene in `captions`; `caption` is the first of them.
        streaming: give an `IterableDataset` that makes rows when they are read; otherwise a `Dataset`, written once to the cache
            of `datasets`.

    Raises:
        ValueError: if `captions` is not positive.
    """
    if captions < 1:
        raise ValueError(f"captions={captions} must be positive")
    cls = IterableDataset if streaming else Dataset
    arguments = {"ranges": world.ranges(), "count": world.count, "seed": world.seed, "captions": captions}
    return cls.from_generator(_scene_rows, features=SCENE_FEATURES, gen_kwargs=arguments)


def _scene_rows(ranges: Sequence[tuple[int, int]], count: int, seed: int, captions: int) -> Iterator[dict[str, Any]]:
    world = World(count, seed)
    for start, stop in ranges:
        for index in range(start, stop):
            scene, texts = world.captioned(index, captions)
            yield {
                "image": PILImage.fromarray(scene.image),
                "caption": texts[0],
                "captions": texts,
                "objects": [
                    {**item.attributes, "size": item.size, "centre": list(item.centre), "box": list(box)}
                    for item, box in zip(scene.objects, scene.boxes, strict=True)
                ],
                "masks": [PILImage.fromarray(mask) for mask in scene.masks],
                "relations": [{"subject": i, "relation": relation, "object": j} for i, relation, j in scene.relations],
                "background": scene.background,
            }
