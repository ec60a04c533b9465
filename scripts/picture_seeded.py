"""Draw what a checkpoint says of images that a seed picks, and where it finds their phrases, without showing the images.

    python scripts/picture_seeded.py flickr8k:val --output photos_seeded.png

For pictures of data that may not be passed on: instead of the photograph there are the map of each phrase (of its two largest
regions, the default combination, evidence in nats per token), the region as people drew it, and the words.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from devil_hf.checkpoints import PHOTOS
from devil_hf.checkpoints.loading import load
from devil_hf.cli.main import bounded
from devil_hf.data.decoding import read_picture
from devil_hf.data.objects import LocalisedImage, Region, open_localised
from devil_hf.data.objects.masks import draw_region
from devil_hf.evaluation.maps.collecting import DEFAULT_COMBINATION
from devil_hf.evaluation.maps.measures import enlarge
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.colours import INK, MUTED, PAPER, TRUTH
from devil_hf.report.drawing import GAP, MARGIN, color_bar, fit, write
from devil_hf.report.figures import UNITS
from devil_hf.report.overlays import colorize, outline

TILE, TEXT = 128, 300
PHRASES = 2
Mapped = tuple[str, np.ndarray, np.ndarray]  # a phrase, its map, and the mask of its region


def largest_regions(example: LocalisedImage, size: tuple[int, int]) -> list[tuple[Region, np.ndarray]]:
    """The largest regions with different first phrases, and their masks of `size`."""
    drawn = [(one, draw_region(example.place(one.parts), size)) for one in example.regions]
    drawn.sort(key=lambda pair: -pair[1].sum())
    first = {one.phrases[0].lower(): (one, mask) for one, mask in reversed(drawn)}
    return sorted(first.values(), key=lambda pair: -pair[1].sum())[:PHRASES]


@torch.no_grad()
def said(model: DevilModel, processor: DevilProcessor, example: LocalisedImage) -> tuple[str, list[Mapped]]:
    """The description of an image by all layers with three beams, and phrase, map and mask of its regions, at a tile's size."""
    image = read_picture(example.read)
    regions = largest_regions(example, (image.height, image.width))
    features = model.extract_features(processor(images=image, return_tensors="pt")["pixel_values"])
    (words,) = processor.batch_decode(model.generate(feature_maps=features, num_beams=3), skip_special_tokens=True)
    phrases = [one.phrases[0] for one, _ in regions]
    text = processor(text=phrases, return_tensors="pt")
    found = model.attribute(phrases=text, feature_maps=features, combine=DEFAULT_COMBINATION).maps[DEFAULT_COMBINATION]
    maps = found[0].cpu().numpy()
    masks = processor.masks_to_regions([np.stack([mask for _, mask in regions])])[0].numpy() >= 0.5
    small = [np.asarray(Image.fromarray(mask).resize((TILE, TILE), Image.Resampling.NEAREST)) for mask in masks]
    return words.strip(), [(p, enlarge(m, (TILE, TILE)), mask) for p, m, mask in zip(phrases, maps, small, strict=True)]


def outlined(values: np.ndarray, mask: np.ndarray, limit: float) -> Image.Image:
    """A map in colours with the edge of a region."""
    pixels = colorize(values, (-limit, limit))
    pixels[outline(mask)] = TRUTH
    return Image.fromarray(pixels)


def figure(lines: list[tuple[str, str, list[Mapped]]]) -> Image.Image:
    """A line for each image: its name and what is said of it, then the maps of its phrases."""
    limit = max(max(float(values.max()) for _, _, maps in lines for _, values, _ in maps), 0.1)
    columns, step = 2, TILE + 24 + GAP
    width = TEXT + PHRASES * (TILE + GAP)
    sheet = Image.new("RGB", (2 * MARGIN + columns * (width + GAP), 2 * MARGIN + -(-len(lines) // columns) * step + 60), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (key, words, maps) in enumerate(lines):
        left, top = MARGIN + number % columns * (width + GAP), MARGIN + number // columns * step
        write(draw, (left, top + 22), key, 11, MUTED)
        size, text = fit(words, TEXT - GAP, TILE - 24, (17, 15, 13))
        write(draw, (left, top + 42), text, size, INK)
        for column, (phrase, values, mask) in enumerate(maps):
            at = left + TEXT + column * (TILE + GAP)
            size, text = fit(phrase, TILE, 20, (13, 11, 9))
            write(draw, (at, top), text[0], size, INK)
            sheet.paste(outlined(values, mask, limit), (at, top + 22))
    sheet.paste(color_bar((-limit, limit), UNITS["evidence"]), (MARGIN, sheet.height - MARGIN - 50))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="images with regions, such as a folder of Flickr30k Entities, FOLDER:SPLIT")
    parser.add_argument("--checkpoint", default=PHOTOS, help="directory, Hub id, or name of a shipped one (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="that picks them (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    arguments = parser.parse_args()
    examples = open_localised(arguments.source)
    picked = np.random.default_rng(arguments.seed).choice(len(examples), min(arguments.count, len(examples)), replace=False)
    model, processor = load(arguments.checkpoint)
    lines = []
    for index in picked:
        words, maps = said(model, processor, examples[int(index)])
        lines.append((Path(examples[int(index)].key).stem, words, maps))
        print(f"{lines[-1][0]}: {words}", flush=True)
    figure(lines).save(arguments.output, optimize=True)


if __name__ == "__main__":
    sys.exit(bounded("picture_seeded.py", main))
