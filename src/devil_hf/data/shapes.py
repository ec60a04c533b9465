"""The embedded world: rendered scenes of which everything is known.

A scene holds one to three objects with colour, texture, shape, size and place on one of four kinds of background. It is
drawn by `rendering.py`, with the exact visible mask of each object, and it is described by a small grammar. A scene is a
function of (seed, index), so that any process can make any part of the world, in any order (`worlds.py`). Most captions
name every object with all three attributes, so that the words of a description of the whole image can be counted; the rest
are fragments about one object ("red", "a striped star"), which is what a single place of an image can answer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from devil_hf.data.rendering import BACKGROUNDS, SCENE_SIZE, SceneObject, box_around, draw_objects

COLOURS = {
    "red": (208, 32, 36),
    "orange": (248, 132, 24),
    "yellow": (246, 218, 44),
    "green": (40, 158, 62),
    "cyan": (62, 206, 224),
    "blue": (40, 66, 208),
    "purple": (132, 44, 172),
    "pink": (250, 138, 192),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (15.0, 18.0), "medium": (20.0, 23.0), "large": (26.0, 30.0)}  # range of the radius in pixels
ATTRIBUTE_WORDS = {"colour": tuple(COLOURS), "texture": TEXTURES, "shape": SHAPES}
RELATIONS = ("left of", "right of", "above", "below")
GRAMMAR_WORDS = (
    *("a", "an", "the", "and", "with", "next", "to", "beside", "left", "right", "of", "above", "below", "there", "is"),
    *("that", "in", "on", "at", "top", "bottom", "middle", "background", "something", "one", "picture"),
)
VOCABULARY = (*COLOURS, *TEXTURES, *SHAPES, *SIZES, *BACKGROUNDS, *GRAMMAR_WORDS)

COUNT_SHARES = (0.3, 0.4, 0.3)  # of scenes with one, two and three objects
FRAGMENT_SHARE = 0.2
RELATION_MARGIN = 16.0  # pixels between two centres from which on a relation is stated


@dataclass(frozen=True)
class UniquePhrase:
    """A word that exactly one of several objects of a scene deserves: `objects[object_index]` of the scene."""

    text: str
    attribute: str
    object_index: int


@dataclass(frozen=True)
class Scene:
    """A scene; `image` and `masks` are drawn on first use. Later objects lie on top of earlier ones."""

    objects: tuple[SceneObject, ...]
    background: str
    drawing_seed: int

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        return draw_objects(self.objects, self.background, self.drawing_seed)

    @property
    def image(self) -> np.ndarray:
        """The picture, `uint8` of shape `(128, 128, 3)`."""
        return self._drawn[0]

    @property
    def masks(self) -> np.ndarray:
        """The visible pixels of each object, `bool` of shape `(objects, 128, 128)`; no pixel belongs to two objects."""
        return self._drawn[1]

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """The box (left, top, right, bottom) around each object's visible pixels, right and bottom exclusive.

        A hidden object has a box of zeros.
        """
        return [box_around(mask) for mask in self.masks]

    @property
    def words(self) -> dict[str, set[str]]:
        """The words that a complete description contains, by attribute."""
        return {attribute: {item.attributes[attribute] for item in self.objects} for attribute in ATTRIBUTE_WORDS}

    @property
    def relations(self) -> list[tuple[int, str, int]]:
        """Every relation that holds between two objects, as (subject, relation, other), indices into `objects`."""
        pairs = [(i, j) for i in range(len(self.objects)) for j in range(len(self.objects)) if i != j]
        return [(i, relation, j) for i, j in pairs for relation in _relations(self.objects[i], self.objects[j])]

    def caption(self, rng: np.random.Generator, fragment_share: float = FRAGMENT_SHARE) -> str:
        """Say something true about the scene.

        Args:
            rng: decides wording, order and detail.
            fragment_share: share of captions about one object only, often without all of its attributes.
        """
        if rng.random() < fragment_share:
            return _fragment(_pick(self.objects, rng), rng)
        return _full_caption(self, rng)

    def unique_phrases(self) -> list[UniquePhrase]:
        """The attribute words that exactly one object of several has; none for a scene of one object."""
        if len(self.objects) < 2:
            return []
        counts = Counter(word for item in self.objects for word in item.attributes.values())
        every = [
            UniquePhrase(word, attribute, i) for i, item in enumerate(self.objects) for attribute, word in item.attributes.items()
        ]
        return [phrase for phrase in every if counts[phrase.text] == 1]


def make_scene(seed: int, index: int) -> Scene:
    """Make scene `index` of the world with seed `seed`; the same pair gives the same scene everywhere."""
    return sample_scene(np.random.default_rng((seed, index)))


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """Draw a scene at random.

    Args:
        rng: source of all choices.
        count: number of objects, 1 to 3; by default drawn with the shares `COUNT_SHARES`.

    Raises:
        ValueError: if `count` is not 1, 2 or 3.
    """
    if count is None:
        count = 1 + int(np.searchsorted(np.cumsum(COUNT_SHARES)[:-1], rng.random(), side="right"))
    if not 1 <= count <= len(COUNT_SHARES):
        raise ValueError(f"a scene holds 1 to {len(COUNT_SHARES)} objects, not {count}")
    objects: list[SceneObject] = []
    while len(objects) < count:
        candidates = (_sample_object(rng) for _ in range(30))
        placed = next((item for item in candidates if _fits(item, objects)), None)
        objects = (
            [*objects, placed] if placed else []
        )  # a layout without room is given up as a whole, so that no size is favoured late
    return Scene(tuple(objects), _pick(BACKGROUNDS, rng), int(rng.integers(1 << 31)))


# ----------------------------------------------------------------------------------------------------------------
# sampling


def _pick(choices: Sequence, rng: np.random.Generator):
    return choices[int(rng.random() * len(choices))]  # twenty times faster than Generator.choice


def _sample_object(rng: np.random.Generator) -> SceneObject:
    colour, size = _pick(tuple(COLOURS), rng), _pick(tuple(SIZES), rng)
    radius = float(rng.uniform(*SIZES[size]))
    margin = radius + 2.0
    x, y = rng.uniform(margin, SCENE_SIZE - margin, 2)
    red, green, blue = np.clip(np.asarray(COLOURS[colour]) + rng.uniform(-10.0, 10.0, 3), 0.0, 255.0)
    phase_x, phase_y = rng.random(2)
    return SceneObject(
        colour=colour,
        texture=_pick(TEXTURES, rng),
        shape=_pick(SHAPES, rng),
        size=size,
        centre=(float(x), float(y)),
        radius=radius,
        rgb=(float(red), float(green), float(blue)),
        rotation=float(rng.uniform(-0.25, 0.25)),
        texture_angle=float(rng.uniform(0.0, np.pi)),
        texture_period=float(rng.uniform(7.0, 9.0)),
        texture_phase=(float(phase_x), float(phase_y)),
    )


def _fits(item: SceneObject, others: Sequence[SceneObject]) -> bool:
    """Whether `item` hides at most a sliver of the others and is not described as one of them is."""
    for other in others:
        distance = np.hypot(item.centre[0] - other.centre[0], item.centre[1] - other.centre[1])
        if distance < 0.9 * (item.radius + other.radius) or item.attributes == other.attributes:
            return False
    return True


# ----------------------------------------------------------------------------------------------------------------
# grammar


def _relations(item: SceneObject, other: SceneObject) -> list[str]:
    dx, dy = item.centre[0] - other.centre[0], item.centre[1] - other.centre[1]
    holds = (dx < -RELATION_MARGIN, dx > RELATION_MARGIN, dy < -RELATION_MARGIN, dy > RELATION_MARGIN)
    return [relation for relation, true in zip(RELATIONS, holds, strict=True) if true]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun_phrase(item: SceneObject, rng: np.random.Generator) -> str:
    """All three attributes of an object, in one of four orders, now and then with its size."""
    size = f"{item.size} " if rng.random() < 0.2 else ""
    form = rng.random()
    if form < 0.5:
        return _with_article(f"{size}{item.texture} {item.colour} {item.shape}")
    if form < 0.8:
        return _with_article(f"{size}{item.colour} {item.texture} {item.shape}")
    if form < 0.9:
        return _with_article(f"{size}{item.colour} {item.shape} that is {item.texture}")
    return _with_article(f"{size}{item.shape} in {item.texture} {item.colour}")


def _full_caption(scene: Scene, rng: np.random.Generator) -> str:
    order = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    names = [_noun_phrase(item, rng) for item in order]
    if rng.random() < 0.15:
        at = int(rng.random() * len(order))
        names[at] += f" {'in' if order[at].zone == 'middle' else 'at'} the {order[at].zone}"
    if len(names) == 1:
        text = names[0]
    else:
        text = f"{names[0]} {_link(order[0], order[1], rng)} {names[1]}"
        text = " and ".join([text, *names[2:]])
    opening = rng.random()
    text = f"there is {text}" if opening < 0.12 else f"a picture of {text}" if opening < 0.2 else text
    return f"{text} on {_with_article(scene.background)} background" if rng.random() < 0.15 else text


def _link(item: SceneObject, other: SceneObject, rng: np.random.Generator) -> str:
    holds = _relations(item, other)
    if holds and rng.random() < 0.4:
        return _pick(holds, rng)
    return _pick(("and", "and", "and", "with", "next to", "beside"), rng)


def _fragment(item: SceneObject, rng: np.random.Generator) -> str:
    """One object by some of its attributes: a bare word, two words, or a phrase with an article."""
    words = [item.texture, item.colour, item.shape]
    form = rng.random()
    if form < 0.45:
        return _pick(words, rng)
    if form < 0.6:
        dropped = int(rng.random() * 3)
        return " ".join(word for position, word in enumerate(words) if position != dropped)
    if form < 0.75:
        return _with_article(f"{_pick(words[:2], rng)} {item.shape}") if rng.random() < 0.6 else _with_article(item.shape)
    if form < 0.85:
        return f"something {_pick((item.texture, item.colour, f'{item.texture} and {item.colour}'), rng)}"
    return f"the {_pick((item.shape, f'{_pick(words[:2], rng)} one', f'{_pick(words[:2], rng)} {item.shape}'), rng)}"
