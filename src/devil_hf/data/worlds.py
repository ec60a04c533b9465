"""Worlds of shapes: which scenes a text such as `shapes:150:1` stands for, and what they are called in results.

This is the one reader of `shapes`, `shapes:COUNT` and `shapes:COUNT:SEED`. A seed names a world; different seeds share no scene.
Recipes of this package train on world 0, and what is measured without a seed is measured on world 1, which nothing here is
trained on. The label says which one was read, so that no result can claim held-out scenes of a world that it was trained on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from devil_hf.checkpoints import DEFAULT
from devil_hf.data.shapes import Scene, make_scene, sample_scene

SHAPES = "shapes"
TRAINING_WORLD, HELD_OUT_WORLD = 0, 1
USUAL_COUNT = 200  # scenes of `shapes` without a number
MAX_SHARDS = 64  # of a stream of scenes


@dataclass(frozen=True)
class World:
    """The first `count` scenes of the world with seed `seed`.

    Raises:
        ValueError: for a count below 1 or a negative seed.
    """

    count: int
    seed: int = HELD_OUT_WORLD

    def __post_init__(self) -> None:
        if self.count < 1 or self.seed < 0:
            raise ValueError(f"{self.name} names no scenes: the number of scenes must be positive, the seed 0 or more")

    def __len__(self) -> int:
        return self.count

    @property
    def name(self) -> str:
        """The world as it is written on the command line, with its seed."""
        return f"{SHAPES}:{self.count}:{self.seed}"

    @property
    def label(self) -> str:
        """Which world this is, for people: in tables, score files and model cards."""
        return world_label(self.seed)

    def scene(self, index: int) -> Scene:
        """The scene at a position from 0 to `count - 1`."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.name} has no scene {index}")
        return make_scene(self.seed, index)

    def scenes(self) -> Iterator[Scene]:
        """Every scene, made when it is asked for."""
        return (make_scene(self.seed, index) for index in range(self.count))

    def captioned(self, index: int, captions: int) -> tuple[Scene, list[str]]:
        """A scene with the first `captions` of the texts that the grammar says about it."""
        rng = np.random.default_rng((self.seed, index))
        scene = sample_scene(rng)
        return scene, [scene.caption(rng) for _ in range(captions)]

    def first(self, limit: int | None) -> "World":
        """This world with at most `limit` scenes."""
        return self if limit is None or limit >= self.count else World(limit, self.seed)

    def ranges(self) -> list[tuple[int, int]]:
        """Positions in up to `MAX_SHARDS` parts (start, stop), for the workers and nodes of a stream."""
        shards = min(self.count, MAX_SHARDS)
        return list(pairwise(self.count * shard // shards for shard in range(shards + 1)))


def usual_checkpoint(data: str) -> str:
    """The shipped checkpoint that is asked about data where none is named: that of the shapes world for its scenes."""
    return SHAPES if data.partition(":")[0] == SHAPES else DEFAULT


def world_label(seed: int) -> str:
    """What the world with this seed is called in results."""
    kinds = {TRAINING_WORLD: "training scenes", HELD_OUT_WORLD: "held-out scenes"}
    return f"shapes world, seed {seed} ({kinds.get(seed, 'scenes of another world')})"


def parse_world(text: str, count: int = USUAL_COUNT) -> World | None:
    """The world that `shapes`, `shapes:COUNT` or `shapes:COUNT:SEED` names; None for a text that is not about shapes.

    Args:
        text: what was typed.
        count: scenes where the text names no number.

    Raises:
        ValueError: for a text that begins like a world and names none.
    """
    kind, *numbers = text.split(":")
    if kind != SHAPES:
        return None
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers) or int((numbers or ["1"])[0]) < 1:
        raise ValueError(f"{text!r} is not {SHAPES}:COUNT or {SHAPES}:COUNT:SEED, such as {SHAPES}:{USUAL_COUNT}")
    return World(*[int(number) for number in numbers] or [count])


__all__ = ["HELD_OUT_WORLD", "SHAPES", "TRAINING_WORLD", "USUAL_COUNT", "World", "parse_world", "usual_checkpoint", "world_label"]
