"""The embedded world: rendered scenes of which everything is known.

A scene holds one to three objects with colour, texture, shape, size and place on one of four kinds of background. It is
drawn with anti-aliasing by numpy alone, with the exact visible mask of each object, and it is described by a small
grammar. A scene is a function of (seed, index), so that any process can make any part of the world, in any order. Most
captions name every object with all three attributes, so that the words of a description of the whole image can be
counted; the rest are fragments about one object ("red", "a striped star"), which is what a single place of an image can
answer.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

SCENE_SIZE = 128  # side of a scene in pixels
TRAINING_WORLD, HELD_OUT_WORLD = 0, 1  # seeds; different seeds share no scene

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
BACKGROUNDS = ("dark", "light", "shaded", "grainy")
ATTRIBUTE_WORDS = {"colour": tuple(COLOURS), "texture": TEXTURES, "shape": SHAPES}
RELATIONS = ("left of", "right of", "above", "below")
GRAMMAR_WORDS = (
    *(
        "a",
        "an",
        "the",
        "and",
        "with",
        "next",
        "to",
        "beside",
        "left",
        "right",
        "of",
        "above",
        "below",
        "there",
        "is",
        "that",
        "in",
        "on",
        "at",
        "top",
        "bottom",
    ),
    *("middle", "background", "something", "one", "picture"),
)
VOCABULARY = (*COLOURS, *TEXTURES, *SHAPES, *SIZES, *BACKGROUNDS, *GRAMMAR_WORDS)

COUNT_SHARES = (0.3, 0.4, 0.3)  # of scenes with one, two and three objects
FRAGMENT_SHARE = 0.2
DARK_TONE = 0.3  # brightness of a texture's second tone relative to the first
RELATION_MARGIN = 16.0  # pixels between two centres from which on a relation is stated


@dataclass(frozen=True)
class SceneObject:
    """One object: its words, and the numbers that drew it.

    Lengths are in pixels of the scene, angles in radians, `x` to the right and `y` down.
    """

    colour: str
    texture: str
    shape: str
    size: str
    centre: tuple[float, float]  # (x, y)
    radius: float
    rgb: tuple[float, float, float]
    rotation: float
    texture_angle: float
    texture_period: float
    texture_phase: tuple[float, float]

    @property
    def attributes(self) -> dict[str, str]:
        """The words that describe the object, by attribute, as in `ATTRIBUTE_WORDS`."""
        return {"colour": self.colour, "texture": self.texture, "shape": self.shape}

    @property
    def zone(self) -> str:
        """Where the object's centre lies on a 3 x 3 division of the scene, such as `top left` or `middle`."""
        x, y = (min(int(3 * value / SCENE_SIZE), 2) for value in self.centre)
        words = [word for word in (("top", "", "bottom")[y], ("left", "", "right")[x]) if word]
        return " ".join(words) or "middle"


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
        return _draw(self)

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
        return [_box(mask) for mask in self.masks]

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
            rng (`np.random.Generator`): Decides wording, order and detail.
            fragment_share (`float`): Share of captions about one object only, often without all of its attributes.
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
            UniquePhrase(word, attribute, i)
            for i, item in enumerate(self.objects)
            for attribute, word in item.attributes.items()
        ]
        return [phrase for phrase in every if counts[phrase.text] == 1]


def make_scene(seed: int, index: int) -> Scene:
    """Make scene `index` of the world with seed `seed`; the same pair gives the same scene everywhere."""
    return sample_scene(np.random.default_rng((seed, index)))


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """Draw a scene at random.

    Args:
        rng (`np.random.Generator`): Source of all choices.
        count (`int`, *optional*): Number of objects, 1 to 3; by default drawn with the shares `COUNT_SHARES`.

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


class ShapesPairs:
    """A sequence of `{"image": PIL image, "caption": str}`, made when asked for.

    Args:
        size (`int`): Number of pairs.
        seed (`int`): Seed of the world; different seeds share no scene.
        fragment_share (`float`): Share of captions about one object only, see [`Scene.caption`].
    """

    def __init__(self, size: int, seed: int = 0, fragment_share: float = FRAGMENT_SHARE):
        if size < 1:
            raise ValueError(f"size {size} is not positive; give the number of pairs")
        self.size, self.seed, self.fragment_share = size, seed, fragment_share

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, PILImage.Image | str]:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0 to {self.size - 1}")
        rng = np.random.default_rng((self.seed, index))
        scene = sample_scene(rng)
        return {"image": PILImage.fromarray(scene.image), "caption": scene.caption(rng, self.fragment_share)}


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


def scene_records(start: int, stop: int, seed: int = 0, captions: int = 5) -> Iterator[dict]:
    """Yield the rows of [`shapes_dataset`] for the scenes from `start` up to `stop`."""
    for index in range(start, stop):
        rng = np.random.default_rng((seed, index))
        scene = sample_scene(rng)
        texts = [scene.caption(rng) for _ in range(captions)]
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


def shapes_dataset(size: int, seed: int = 0, captions: int = 5, streaming: bool = False) -> Dataset | IterableDataset:
    """The world as a `datasets` data set with the columns of `SCENE_FEATURES`.

    Args:
        size (`int`): Number of scenes.
        seed (`int`): Seed of the world; its scenes are those of [`make_scene`] and [`ShapesPairs`].
        captions (`int`): Captions per scene in `captions`; `caption` is the first of them.
        streaming (`bool`): Give an `IterableDataset` that makes rows when they are read, in up to 64 shards for workers
            and nodes;
            otherwise a `Dataset`, written once to the cache of `datasets`.

    Raises:
        ValueError: if `size` or `captions` is not positive.
    """
    if size < 1 or captions < 1:
        raise ValueError(f"size {size} and captions {captions} must both be positive")
    shards = min(size, 64)
    bounds = [size * shard // shards for shard in range(shards + 1)]
    arguments = {"ranges": list(pairwise(bounds)), "seed": seed, "captions": captions}
    if streaming:
        return IterableDataset.from_generator(_records_of_ranges, features=SCENE_FEATURES, gen_kwargs=arguments)
    return Dataset.from_generator(_records_of_ranges, features=SCENE_FEATURES, gen_kwargs=arguments)


def _records_of_ranges(ranges: Sequence[tuple[int, int]], seed: int, captions: int) -> Iterator[dict]:
    for start, stop in ranges:
        yield from scene_records(start, stop, seed, captions)


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
# drawing


def _draw(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    image = _background(scene.background, np.random.default_rng(scene.drawing_seed))
    masks = np.zeros((len(scene.objects), SCENE_SIZE, SCENE_SIZE), dtype=bool)
    for index, item in enumerate(scene.objects):
        rows, columns, coverage, tone = _raster(item)
        patch = image[rows, columns]
        patch += coverage[..., None] * (tone[..., None] * np.asarray(item.rgb, dtype=np.float32) - patch)
        visible = coverage > 0.5
        masks[:index, rows, columns] &= ~visible
        masks[index, rows, columns] = visible
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), masks


def _background(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A background (128, 128, 3), float32, in 0 to 255."""
    tint = rng.uniform(-8.0, 8.0, 3)
    if kind == "dark":
        tone = np.full((1, 1), rng.uniform(15.0, 60.0))
    elif kind == "light":
        tone = np.full((1, 1), rng.uniform(195.0, 240.0))
    elif kind == "shaded":
        angle, steps = rng.uniform(0.0, 2 * np.pi), np.linspace(-0.5, 0.5, SCENE_SIZE)
        tone = rng.uniform(110.0, 140.0) + 95.0 * (np.cos(angle) * steps[None, :] + np.sin(angle) * steps[:, None])
    else:
        tone = rng.uniform(90.0, 160.0) + 26.0 * rng.standard_normal((SCENE_SIZE, SCENE_SIZE), dtype=np.float32)
    image = tone[..., None] + tint
    return np.broadcast_to(image, (SCENE_SIZE, SCENE_SIZE, 3)).astype(np.float32)


def _raster(item: SceneObject) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """Rows and columns that an object touches, and there its coverage (0 to 1) and the brightness of its texture."""
    reach = 1.2 * item.radius + 2.0
    (x, y), last = item.centre, SCENE_SIZE
    rows = slice(max(int(y - reach), 0), min(int(y + reach) + 1, last))
    columns = slice(max(int(x - reach), 0), min(int(x + reach) + 1, last))
    dx = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + np.float32(0.5 - x)
    dy = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    cosine, sine = np.float32(np.cos(item.rotation)), np.float32(np.sin(item.rotation))
    u, v = cosine * dx + sine * dy, cosine * dy - sine * dx
    coverage = np.clip(0.5 - _signed_distance(item.shape, u, v, item.radius), 0.0, 1.0)
    return rows, columns, coverage, _tone(item, u, v)


def _signed_distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels of the points (u, v) from the outline of a shape around the origin, negative inside.

    It is exact at edges and a bound at corners.
    """
    if shape == "circle":
        return np.hypot(u, v) - radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88 * radius
    if shape == "triangle":
        return np.maximum(np.maximum(v, 0.866 * u - 0.5 * v), -0.866 * u - 0.5 * v) - 0.58 * radius
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.maximum(np.minimum(a, b) - 0.34 * radius, np.maximum(a, b) - radius)
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.74 * radius) - 0.27 * radius
    return _star_distance(u, v, 1.15 * radius)


def _star_distance(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """As `_signed_distance`, for a star with five points of which one points up."""
    sector, inner = np.float32(np.pi / 5), np.float32(0.45)
    angle = np.arctan2(u, -v)
    folded = np.abs(angle - 2 * sector * np.round(angle / (2 * sector)))  # 0 on a point's axis, pi / 5 in a notch
    distance = np.hypot(u, v)
    edge = np.asarray(
        [inner * np.cos(sector) - 1.0, inner * np.sin(sector)], dtype=np.float32
    )  # from the point to the notch
    edge /= np.hypot(*edge)
    return (distance * np.cos(folded) - radius) * edge[1] - distance * np.sin(folded) * edge[0]


def _tone(item: SceneObject, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Brightness of an object's texture at the points (u, v) of its own frame, from `DARK_TONE` to 1."""
    if item.texture == "plain":
        return np.ones_like(u + v)
    turns = np.float32(2 * np.pi / item.texture_period)
    cosine, sine = np.float32(np.cos(item.texture_angle)), np.float32(np.sin(item.texture_angle))
    first = turns * (cosine * u + sine * v + np.float32(item.texture_phase[0] * item.texture_period))
    second = turns * (cosine * v - sine * u + np.float32(item.texture_phase[1] * item.texture_period))
    if item.texture == "striped":
        wave = np.cos(first)
    elif item.texture == "dotted":
        wave = 1.0 - 0.86 * (2.0 - np.cos(first) - np.cos(second))  # positive in discs of a quarter period
    else:
        wave = 1.6 * np.cos(0.65 * first) * np.cos(0.65 * second)
    dark = np.clip(0.5 + wave / turns, 0.0, 1.0)  # the slope of a wave at its zero is `turns`: one pixel of transition
    return 1.0 - np.float32(1.0 - DARK_TONE) * dark


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


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
        return (
            _with_article(f"{_pick(words[:2], rng)} {item.shape}") if rng.random() < 0.6 else _with_article(item.shape)
        )
    if form < 0.85:
        return f"something {_pick((item.texture, item.colour, f'{item.texture} and {item.colour}'), rng)}"
    return f"the {_pick((item.shape, f'{_pick(words[:2], rng)} one', f'{_pick(words[:2], rng)} {item.shape}'), rng)}"
