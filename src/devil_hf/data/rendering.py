"""How a scene of the shapes world is drawn: anti-aliased shapes with textures on a background, by numpy alone.

Every shape is a signed distance, so that coverage, the exact visible mask and the picture follow from one formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SCENE_SIZE = 128  # side of a scene in pixels
BACKGROUNDS = ("dark", "light", "shaded", "grainy")
DARK_TONE = 0.3  # brightness of a texture's second tone relative to the first


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


def draw_objects(objects: Sequence[SceneObject], background: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw objects on a background, later ones on top of earlier ones.

    Args:
        objects: what to draw.
        background: one of `BACKGROUNDS`.
        seed: decides the tint, brightness and grain of the background.

    Returns:
        The picture, uint8 (128, 128, 3), and the visible pixels of each object, bool (objects, 128, 128).
    """
    image = _background(background, np.random.default_rng(seed))
    masks = np.zeros((len(objects), SCENE_SIZE, SCENE_SIZE), dtype=bool)
    for index, item in enumerate(objects):
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
    edge = np.asarray([inner * np.cos(sector) - 1.0, inner * np.sin(sector)], dtype=np.float32)  # from the point to the notch
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


def box_around(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) around the pixels of a mask, right and bottom exclusive; zeros for none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
