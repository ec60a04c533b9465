"""Pairs of the shapes world: scenes, and what its grammar says of them."""

from collections.abc import Iterator, Sequence
from io import BytesIO

from datasets import Dataset, IterableDataset
from PIL import Image

from devil_hf.data.pairs import PAIR_FEATURES, PAIR_SOURCES
from devil_hf.data.worlds import SHAPES, World


@PAIR_SOURCES.register(SHAPES)
def open_shapes(size: int, seed: int, captions: int = 5, streaming: bool = True) -> Dataset | IterableDataset:
    """The embedded world of shapes, drawn when it is read, or written once to the cache of `datasets`.

    Args:
        size: number of scenes.
        seed: of the world; different seeds share no scene. Recipes train on world 0, and world 1 is held out.
        captions: per scene.
        streaming: draw scenes when they are read.
    """
    if size < 1 or captions < 1:
        raise ValueError(f"size={size} and captions={captions} must both be positive")
    arguments: dict = {"ranges": World(size, seed).ranges(), "size": size, "seed": seed, "captions": captions}
    if streaming:
        arguments["packed"] = False
    cls = IterableDataset if streaming else Dataset
    return cls.from_generator(_shapes_rows, features=PAIR_FEATURES, gen_kwargs=arguments)


def _shapes_rows(ranges: Sequence[tuple[int, int]], size: int, seed: int, captions: int, packed: bool = True) -> Iterator[dict]:
    """Rows of scenes; those that no disk has to hold are not packed, which takes as long as drawing them."""
    world = World(size, seed)
    for start, stop in ranges:
        for index in range(start, stop):
            scene, texts = world.captioned(index, captions)
            picture = Image.fromarray(scene.image)
            image = {"bytes": png(picture) if packed else _bitmap(picture), "path": None}
            key = f"shapes {seed} {index}"
            yield {"key": key, "image": image, "captions": texts, "region": None, "problem": None}


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _bitmap(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "BMP")
    return file.getvalue()
