"""Captioned images to measure on, by a word of the command line: held-out scenes, a caption folder, or any source of a recipe."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image as PILImage

from devil_hf.data.decoding import BadSamples, PairDecoder
from devil_hf.data.identity import pair_identity
from devil_hf.data.pairs import REGION_KINDS, open_pairs
from devil_hf.data.shapes import Scene
from devil_hf.data.specifications import caption_sources, named_sources
from devil_hf.data.worlds import SHAPES, World
from devil_hf.model.modeling_devil import DevilModel


@dataclass
class CaptionedImages:
    """Images with what people (or a grammar) say of them.

    Args:
        name: what they are, for people.
        source: what was read: the world, or the sources as JSON.
        keys: one name per image.
        captions: at least one per image.
        load: the image at a position.
        scenes: of the shapes world, what is known of each image; else empty.
        split: of the source, if it has any.
        identities: a hash of each image with its captions; none where the keys say it.
    """

    name: str
    source: str
    keys: list[str]
    captions: list[list[str]]
    load: Callable[[int], PILImage.Image]
    scenes: list[Scene] = field(default_factory=list)
    split: str | None = None
    identities: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


def longest_caption(model: DevilModel) -> int:
    """Tokens of a caption that are read, in training and in evaluation: the configured number, or what the context has room for.

    Raises:
        ValueError: when the context has no room for a caption at all.
    """
    config = model.config
    if config.context_length is None:
        return config.max_caption_tokens
    room = config.context_length - config.prefix_length - 2  # BOS and EOS
    if room < 1:
        raise ValueError(
            f"a prefix of {config.prefix_length} leaves no room for captions in a context of {config.context_length}: "
            "choose a shorter prefix_length."
        )
    return min(config.max_caption_tokens, room)


def longest_description(model: DevilModel, wanted: int) -> int:
    """Tokens that a description may have: as many as are wanted, or as the context has room for behind BOS and prefix."""
    config = model.config
    return wanted if config.context_length is None else max(min(wanted, config.context_length - config.prefix_length - 1), 1)


def open_captioned(data: str = SHAPES, split: str | None = None, limit: int = 200) -> CaptionedImages:
    """Open the first `limit` images of `data`.

    Args:
        data: "shapes" (`limit` held-out scenes) or "shapes:COUNT[:SEED]", a caption folder, a YAML file of sources, or one
            source of a recipe in braces, such as "{kind: hub, path: user/data, image_column: image, caption_column: caption}".
        split: of a caption folder; sources name their own.

    Raises:
        ValueError: for what cannot be read, for a split of anything but a folder, and for fewer than two images: controls
            compare images.
    """
    if limit < 2:
        raise ValueError(f"limit {limit}: at least 2 images are needed, to tell what belongs to which")
    sources = caption_sources(data, split, limit)
    if any(source.get("kind") in REGION_KINDS for source in sources):
        raise ValueError(f"{data} names regions, but whole images are described here: name captioned images")
    if [source.get("kind") for source in sources] == [SHAPES]:
        return captioned_scenes(World(sources[0]["size"], sources[0]["seed"]).first(limit))
    rows: dict[str, dict] = {}
    decode = PairDecoder(BadSamples(limit=1.0))
    for row in open_pairs(sources, seed=0, shuffle=False):
        usable = decode(row)  # an image that is broken is found now, and not in the middle of the work
        if usable is not None:
            rows[row["key"] if row["key"] not in rows else f"{row['key']} ({len(rows)})"] = row | {"captions": usable["captions"]}
        if len(rows) == limit:
            break
    if len(rows) < 2:
        raise ValueError(f"{data} holds {len(rows)} images with captions that can be used: at least 2 are needed")
    encoded = list(rows.values())
    dataset = named_sources(sources)

    def load(at: int) -> PILImage.Image:
        usable = decode(encoded[at])
        if usable is None:
            raise OSError(f"image {encoded[at]['key']} of {data} cannot be read any more: give it back, and run the same again")
        return usable["image"]

    return CaptionedImages(
        name=dataset["name"],
        source=json.dumps(sources, default=str),
        keys=list(rows),
        captions=[row["captions"] for row in encoded],
        load=load,
        split=dataset.get("split"),
        identities=[pair_identity(row) for row in encoded],
    )


def captioned_scenes(world: World, captions: int = 5) -> CaptionedImages:
    """The scenes of a world, each with some captions; those of `world_dataset`."""
    scenes, texts = zip(*(world.captioned(index, captions) for index in range(len(world))), strict=True)
    keys = [f"scene {world.seed} {index}" for index in range(len(world))]

    def load(at: int) -> PILImage.Image:
        return PILImage.fromarray(scenes[at].image)

    return CaptionedImages(world.label, world.label, keys, list(texts), load, scenes=list(scenes))
