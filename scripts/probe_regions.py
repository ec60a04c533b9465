"""How much of what a region is called lies in its features: classifiers of head words, trained on pooled features alone.

    python scripts/probe_regions.py flickr8k:train flickr8k:val --train 3000 --limit 150

A linear map and a network of one hidden layer read what the translator reads (every layer, pooled over the region) and choose
among the head words of the training regions. They need not speak, so they say how far descriptions of regions
(`devil evaluate regions`) could come with these features.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from devil_hf.checkpoints import PHOTOS
from devil_hf.checkpoints.loading import load
from devil_hf.cli.main import bounded
from devil_hf.data.decoding import read_picture
from devil_hf.data.objects import LocalisedImage, open_localised
from devil_hf.data.objects.masks import draw_region
from devil_hf.evaluation.text.head_words import head_word
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import place_weights, pool
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.statistics import bootstrap

WORDS, HIDDEN, STEPS, BATCH = 800, 1024, 1_500, 256


@dataclass
class Regions:
    """Pooled features of regions, per layer (N, C_l), what each is called, and the image that it is of."""

    features: list[Tensor]
    heads: list[set[str | None]]
    image: list[int]


@torch.no_grad()
def read(model: DevilModel, processor: DevilProcessor, examples: list[LocalisedImage]) -> Regions:
    """The regions of images that lie in the crop in every layer."""
    features: list[list[Tensor]] = [[] for _ in model.layer_names]
    heads: list[set[str | None]] = []
    images: list[int] = []
    for number, example in enumerate(tqdm(examples, unit="image")):
        picture = read_picture(example.read)
        size = (picture.height, picture.width)
        masks = processor.masks_to_regions([np.stack([draw_region(example.place(one.parts), size) for one in example.regions])])
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        maps = {layer: one for layer, one in enumerate(model.extract_features(pixels)) if one is not None}
        weights, vanished = place_weights(model.layer_names, maps, None, None, 1, masks, None)
        seen = torch.ones(len(example.regions), dtype=torch.bool) if vanished is None else ~vanished.any(dim=1)
        for layer, one in maps.items():
            features[layer].append(pool(one, weights[layer])[seen])
        heads += [
            {head_word(text) for text in one.phrases} - {None} for one, kept in zip(example.regions, seen, strict=True) if kept
        ]
        images += [number] * int(seen.sum())
    return Regions([torch.cat(layer) for layer in features], heads, images)


def probe(train: Tensor, heads: list[set[str | None]], test: Tensor, hidden: int, seed: int) -> list[str]:
    """The head word that a classifier of standardised features (N, C) chooses for each row of `test`."""
    words = [word for word, _ in Counter(word for own in heads for word in own).most_common(WORDS)]
    at = {word: number for number, word in enumerate(words)}
    wanted = torch.zeros(len(heads), len(words))
    for row, own in enumerate(heads):
        wanted[row, [at[word] for word in own if word in at]] = 1.0
    known = wanted.sum(dim=1) > 0
    train, wanted = train[known], F.normalize(wanted[known], p=1, dim=1)
    mean, spread = train.mean(dim=0), train.std(dim=0) + 1e-4
    torch.manual_seed(seed)
    width = train.shape[1]
    inner = [nn.Dropout(0.2), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.3)] if hidden else []
    network = nn.Sequential(*inner, nn.Linear(hidden or width, len(words)))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(train), (BATCH,))
        loss = F.cross_entropy(network((train[rows] - mean) / spread), wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return [words[index] for index in network.eval()((test - mean) / spread).argmax(dim=1).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_source", help="images with regions to learn from, as `devil evaluate regions` has them")
    parser.add_argument("source", help="others to be judged by")
    parser.add_argument("--checkpoint", default=PHOTOS, help="whose backbone is read (default: %(default)s)")
    parser.add_argument("--train", type=int, default=3_000, help="images to learn from (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="of the others, the first so many")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    model, processor = load(arguments.checkpoint)
    learned = read(model, processor, open_localised(arguments.train_source)[: arguments.train])
    judged = read(model, processor, open_localised(arguments.source)[: arguments.limit])
    print(f"{len(learned.heads)} regions to learn from, {len(judged.heads)} to be judged by")
    layers = {"all layers": list(range(len(model.layer_names)))} | {name: [at] for at, name in enumerate(model.layer_names)}
    for name, chosen in layers.items():
        train, test = (torch.cat([one.features[at] for at in chosen], dim=1) for one in (learned, judged))
        for kind, hidden in {"linear": 0, "one hidden layer": HIDDEN}.items():
            guesses = probe(train, learned.heads, test, hidden, arguments.seed)
            right = np.array([guess in own for guess, own in zip(guesses, judged.heads, strict=True)], dtype=float)
            sums = [np.bincount(judged.image, weights) for weights in (right, np.ones(len(right)))]
            low, high = bootstrap(sums[0], sums[1]) or (right.mean(), right.mean())
            print(f"{name}, {kind}: {right.mean():.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    sys.exit(bounded("probe_regions.py", main))
