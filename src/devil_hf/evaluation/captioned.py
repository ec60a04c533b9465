"""Captioned images to measure on, by a word of the command line: held-out scenes, a caption folder, or any source of a recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import numpy as np
import yaml
from datasets import Image
from PIL import Image as PILImage
from transformers.utils import logging

from devil_hf.data.pairs import open_pairs
from devil_hf.data.shapes import HELD_OUT_WORLD
from devil_hf.data.shapes import Scene
from devil_hf.data.shapes import sample_scene

logger = logging.get_logger(__name__)

SHAPES = "shapes"


@dataclass
class CaptionedImages:
    """Images with what people (or a grammar) say of them.

    Args:
        name: what they are, for people.
        source: what was asked for, as it was written.
        keys: one name per image.
        captions: at least one per image.
        load: the image at a position.
        scenes: of the shapes world, what is known of each image; else empty.
        split: of the source, if it has any.
    """

    name: str
    source: str
    keys: list[str]
    captions: list[list[str]]
    load: Callable[[int], PILImage.Image]
    scenes: list[Scene] = field(default_factory=list)
    split: str | None = None

    def __len__(self) -> int:
        return len(self.keys)


def open_captioned(data: str = SHAPES, split: str | None = None, limit: int = 200) -> CaptionedImages:
    """Open the first `limit` images of `data`.

    Args:
        data: "shapes" or "shapes:SEED" (held-out scenes of the shapes world, whose seed is 1), a caption folder, or a source of
            a recipe in braces, such as "{kind: hub, path: user/data, image_column: image, caption_column: caption}".
        split: of a caption folder.

    Raises:
        FileNotFoundError: for a folder or file that is not there.
        ValueError: for anything else that cannot be read, and for a limit below 2: controls compare images.
    """
    if limit < 2:
        raise ValueError(f"limit {limit}: at least 2 images are needed, to tell what belongs to which")
    if data.partition(":")[0] == SHAPES:
        return held_out_scenes(limit, _seed(data))
    if data.lstrip().startswith("{"):
        source = yaml.safe_load(data)
    else:
        if not Path(data).is_dir():
            raise FileNotFoundError(
                f"{data!r} is no folder; give a caption folder, {SHAPES}, or a source such as '{{kind: hub, path: ...}}'"
            )
        source = {"kind": "folder", "path": data} | ({"split": split} if split else {})
    rows = []
    for row in open_pairs([source], seed=0, shuffle=False):
        if row["problem"] or not row["captions"]:
            logger.warning(f"{row['key']} is left out: {row['problem'] or 'no caption'}")
        else:
            rows.append(row)
        if len(rows) == limit:
            break
    if len(rows) < 2:
        raise ValueError(f"{data} holds {len(rows)} captioned images: at least 2 are needed")
    return CaptionedImages(
        name=Path(str(source.get("path", source["kind"]))).name,
        source=data,
        keys=[row["key"] for row in rows],
        captions=[row["captions"] for row in rows],
        load=lambda at: Image().decode_example(rows[at]["image"]).convert("RGB"),
        split=source.get("split"),
    )


def held_out_scenes(count: int, seed: int = HELD_OUT_WORLD, captions: int = 5) -> CaptionedImages:
    """The first scenes of a world, each with some captions; those of `shapes_dataset` with the same seed."""
    scenes, texts = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        scenes.append(sample_scene(rng))
        texts.append([scenes[-1].caption(rng) for _ in range(captions)])
    keys = [f"scene {seed} {index}" for index in range(count)]
    name = f"{SHAPES}:{seed}"
    return CaptionedImages(name, name, keys, texts, lambda at: PILImage.fromarray(scenes[at].image), scenes=scenes)


def _seed(data: str) -> int:
    _, colon, number = data.partition(":")
    if colon and not number.isdigit():
        raise ValueError(f"{data!r} is neither {SHAPES} nor {SHAPES}:SEED, such as {SHAPES}:{HELD_OUT_WORLD}")
    return int(number) if colon else HELD_OUT_WORLD
