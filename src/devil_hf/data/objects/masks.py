"""Where an object is, as data, and its mask, drawn when it is needed.

A part is a dictionary that JSON can hold:

    {"box": [left, top, right, bottom]}                      in continuous pixels, or with "shares": true in shares of the image
    {"polygons": [[x, y, x, y, ...], ...]}                   the same
    {"runs": [...] or "...", "size": [height, width]}        COCO's run-length codes, down the columns, plain or packed
    {"classes": "file.png", "index": 12}                     pixels of this value
    {"scene": [seed, index], "object": 0}                    an object of the shapes world

A region is `{"parts": [...], "size": [height, width] or None}`: the union of its parts. pycocotools fills polygons, with its
convention (a pixel belongs to a polygon that holds its centre, to a tenth of a pixel), so that figures compare with COCO's own.
It never gets a packed code, nor a number that it cannot hold: where these are damaged, it ends the process.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from devil_hf.data.shapes import Scene, make_scene
from devil_hf.extras import needs

Part = Mapping[str, Any]
FARTHEST = 10**6  # pixels from the origin, and of all edges together, of polygons; pycocotools fills the memory beyond
PACKED_BITS, LAST_BITS = 5, 60  # of a packed run-length code: in a character, and in a number


def draw_region(region: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask of a region, bool of `size` (height, width).

    Raises:
        ValueError: if the parts were drawn on an image of another size, are of an unknown kind, or damaged.
        OSError: if a mask file cannot be opened.
        MissingExtraError: for polygons without pycocotools.
    """
    drawn = region.get("size")
    if drawn is not None and tuple(drawn) != size:
        raise ValueError(f"the image is {size} pixels (height, width), but its objects were drawn on {tuple(drawn)}")
    union = np.zeros(size, dtype=bool)
    for part in region["parts"]:
        try:
            union |= _draw(part, size)
        except (TypeError, KeyError, IndexError, OverflowError) as error:
            raise ValueError(f"a part of an object is damaged ({error!r}): {dict(part)!s:.80}") from error
    return union


def _draw(part: Part, size: tuple[int, int]) -> np.ndarray:
    scale = np.array(size[::-1]) if part.get("shares") else 1
    if "box" in part:
        return box_mask((np.reshape(part["box"], (2, 2)) * scale).ravel().tolist(), size)
    if "polygons" in part:
        return polygon_mask([np.reshape(outline, (-1, 2)) * scale for outline in part["polygons"]], size)
    if "runs" in part:
        return _runs_mask(part, size)
    if "classes" in part:
        return _class_mask(part, size)
    if "scene" in part:
        return _scene(*part["scene"]).masks[part["object"]]
    raise ValueError(f"a part of an object is one of box, polygons, runs, classes and scene, not {dict(part)!s:.80}")


def box_mask(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie in a box (left, top, right, bottom), bool of `size` (height, width)."""
    left, top, right, bottom = box
    rows, columns = (np.arange(edge) + 0.5 for edge in size)
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None]


def polygon_mask(outlines: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The union of polygons (points, 2) of (x, y) in continuous pixels, bool of `size` (height, width)."""
    needs("pycocotools", "evaluate")
    from pycocotools import mask as coco

    # Of fewer than three points nothing is inside; pycocotools would read two of them as a box.
    points = [np.asarray(outline, dtype=float) for outline in outlines if len(outline) > 2]
    for outline in points:
        edges = np.abs(outline - np.roll(outline, 1, axis=0)).sum()
        if not np.abs(outline).max() <= FARTHEST or not edges <= FARTHEST:
            raise ValueError("an outline of an object lies far outside of the image, or holds what is no number")
    flat = [outline.ravel().tolist() for outline in points]
    if not flat:
        return np.zeros(size, dtype=bool)
    return coco.decode(coco.merge(coco.frPyObjects(flat, *size))).view(bool)


def _runs_mask(code: Part, size: tuple[int, int]) -> np.ndarray:
    if tuple(code["size"]) != size:
        raise ValueError(f"a run-length code of size {code['size']} does not fit an image of {size} (height, width)")
    runs = _unpacked(code["runs"]) if isinstance(code["runs"], str) else code["runs"]
    if sum(runs) != size[0] * size[1] or min(runs) < 0:
        raise ValueError(f"a run-length code of {sum(runs)} pixels does not fit an image of {size} (height, width)")
    values = np.arange(len(runs)) % 2 == 1  # a run of background comes first
    return np.repeat(values, runs).reshape(size[::-1]).T


def _unpacked(text: str) -> list[int]:
    """The runs of COCO's packed code: numbers of five bits a character, from the fourth on the difference to the last but one."""
    runs: list[int] = []
    value = bits = 0
    for code in (ord(character) - 48 for character in text):
        if not 0 <= code < 2 ** (PACKED_BITS + 1) or bits > LAST_BITS:
            raise ValueError("a packed run-length code holds a character that it cannot hold, or a number without an end")
        value |= (code & 31) << bits
        bits += PACKED_BITS
        if not code & 32:  # the number's last character, whose highest bit is the sign
            value -= (code & 16) << (bits - PACKED_BITS + 1)
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = bits = 0
    if bits:
        raise ValueError("a packed run-length code ends in the middle of a number")
    return runs


def runs_of(mask: np.ndarray) -> dict[str, Any]:
    """The part that draws a mask (height, width) again."""
    flat = np.asarray(mask, dtype=bool).T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return {"runs": np.diff(edges, prepend=0, append=flat.size).tolist(), "size": list(mask.shape)}


def _class_mask(part: Part, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(part["classes"]) as picture:
            classes = np.asarray(picture)
    except OSError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything
        raise ValueError(f"{part['classes']} cannot be read as an image: {error}") from error
    if classes.shape != size:
        raise ValueError(f"{part['classes']} is {classes.shape} pixels, its image {size} (height, width)")
    return classes == part["index"]


@lru_cache(maxsize=4)  # the phrases of a scene are drawn one after the other
def _scene(seed: int, index: int) -> Scene:
    return make_scene(seed, index)


def covers_nothing(parts: Sequence[Part]) -> bool:
    """Whether it is plain without drawing that parts cover no pixel: boxes without an area, and polygons of two points."""
    return all(
        ("box" in part and (part["box"][2] <= part["box"][0] or part["box"][3] <= part["box"][1]))
        or ("polygons" in part and all(len(outline) < 6 for outline in part["polygons"]))
        for part in parts
    )


def pack_region(region: Mapping[str, Any]) -> bytes:
    """A region as the bytes of a row; `unpack_region` reads them."""
    return json.dumps(region, separators=(",", ":")).encode()


def unpack_region(content: bytes) -> dict[str, Any]:
    """The region of a row's bytes."""
    return json.loads(content)


__all__ = [
    "Part",
    "box_mask",
    "covers_nothing",
    "draw_region",
    "pack_region",
    "polygon_mask",
    "runs_of",
    "unpack_region",
]
