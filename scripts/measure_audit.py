"""Audit networks that do not tell colours: `python scripts/measure_audit.py --output-dir runs/audit`.

Each is a copy of a checkpoint's backbone that learns from scenes:

* `--blindness filter`: behind a grey filter, to have the features that the checkpoint's own has of the same pictures in colour,
  so that the same translator reads it. The filter stays in front of it when it is audited: colours cannot reach it.
* `--blindness learned`: without any filter, to have of pictures in whatever colours the features that the checkpoint's own has of
  them in grey. Colours of equal brightness are exchanged at random while it learns. It gets colours when it is audited, and has
  to ignore them itself.

Audits of `red` are then repeated on scenes whose colours are equally bright, as
`devil evaluate audit` repeats them: here an absence is right, by construction. That the translator can still read the network is
shown by `striped`.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from devil_hf.checkpoints.loading import load
from devil_hf.data.shapes import sample_scene
from devil_hf.data.worlds import HELD_OUT_WORLD, TRAINING_WORLD
from devil_hf.evaluation.audits import LUMA, painted_scene, repeated_audits
from devil_hf.folders import write_json
from devil_hf.questions.audit import ENCODED, NOT_ENCODED, Audit, audit, figures
from devil_hf.settings import option, parse

REPETITIONS = 100


@dataclass
class MeasureSettings:
    """What to train and to audit."""

    output_dir: Path = option("folder of scores.json", Path("runs/audit"))
    checkpoint: str | None = option("whose translator reads, and whose backbone is copied", None)
    blindness: Literal["filter", "learned"] = option("what keeps the networks from telling colours", "filter")
    learns: Literal["every layer", "first convolution"] = option("colours reach the others through it alone", "every layer")
    networks: int = option("trained, each from another seed", 3, least=1)
    steps: int = option("of training each", 60, least=1)
    batch_size: int = option("scenes a step", 16, least=1)
    learning_rate: float = option("of AdamW, falling to zero", 1e-3)
    limit: int = option("images with the colour in the pool, and as many without it", 1_000)
    images: int = option("with the colour in each audit, and as many without it", 250, least=2)
    threads: int = option("of torch", 1)


class Grey(nn.Module):
    """Turns normalised pixel values grey, in front of a network."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.view(1, 3, 1, 1))
        self.register_buffer("std", std.view(1, 3, 1, 1))
        self.register_buffer("luma", torch.tensor(LUMA, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        grey = ((pixels * self.std + self.mean) * self.luma).sum(dim=1, keepdim=True)
        return (grey - self.mean) / self.std

    def recolour(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """The same pictures (B, 3, H, W) in other colours, as bright as they were: a random matrix mixes the chroma of each."""
        grey = self(pixels)
        chroma = (pixels - grey) * self.std
        mixed = torch.einsum("bij,bjhw->bihw", torch.tensor(rng.normal(0, 0.8, (len(pixels), 3, 3))).float(), chroma)
        return grey + (mixed - (mixed * self.luma).sum(dim=1, keepdim=True)) / self.std


def train_without_colour(settings: MeasureSettings, seed: int):
    """A model whose backbone has learned without colours, see above, and the processor."""
    model, processor = load(settings.checkpoint, device="cpu")
    teacher, filtered = copy.deepcopy(model.backbone), settings.blindness == "filter"
    images = processor.image_processor
    grey = Grey(torch.tensor(images.image_mean), torch.tensor(images.image_std))
    blind = model.backbone if filtered else teacher
    blind.register_forward_pre_hook(lambda module, given: (grey(given[0]), *given[1:]))
    learning = model.backbone
    if settings.learns == "first convolution":
        learning = next(layer for layer in model.backbone.modules() if isinstance(layer, nn.Conv2d))
    weights = [one.requires_grad_() for one in learning.parameters()]
    rng, optimizer = np.random.default_rng((TRAINING_WORLD, seed)), torch.optim.AdamW(weights, settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    losses = []
    for _ in tqdm(range(settings.steps), desc=f"network {seed}"):
        pixels = processor(images=[sample_scene(rng).image for _ in range(settings.batch_size)])["pixel_values"]
        if not filtered:
            pixels = torch.cat([pixels[::2], grey.recolour(pixels[1::2], rng)])  # as they are, too
        with torch.no_grad():
            wanted = teacher(pixels, range(len(model.layer_names)))
        found = model.backbone(pixels, range(len(model.layer_names)))
        loss = sum(
            (one.float() - other.float()).square().mean() / other.float().var() for one, other in zip(found, wanted, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    for one in weights:
        one.requires_grad_(False)
    print(f"network {seed}: features differ by {np.mean(losses[:10]):.3f} at first, {np.mean(losses[-10:]):.3f} in the end")
    return model, processor


def audits(model, processor, settings: MeasureSettings) -> dict[str, Any]:
    """Verdicts of repeated audits of `red`, the area over all images, and what the translator can still say of the network."""
    groups = [[painted_scene(HELD_OUT_WORLD, at, "red", has_it) for at in range(settings.limit)] for has_it in (True, False)]
    present, absent = ([scene.image for scene in group] for group in groups)
    whole = audit(model, processor, Audit(phrase="red", claim=NOT_ENCODED, present=present, absent=absent, probe=True))
    pools, rng = (np.array(whole.present), np.array(whole.absent)), np.random.default_rng(0)
    told = repeated_audits(*pools, settings.images, REPETITIONS, rng)
    striped = [[one.image for one in groups[0] if ("striped" in one.words["texture"]) == has_it] for has_it in (True, False)]
    control = audit(model, processor, Audit(phrase="striped", claim=ENCODED, present=striped[0], absent=striped[1]))
    areas = {"red": whole.words, "a probe of red": whole.probe, "striped": control.words}
    return {"verdicts": told, "areas": {name: figures(area) for name, area in areas.items() if area is not None}}


def main() -> None:
    settings = parse(MeasureSettings, sys.argv[1:], description=__doc__)
    torch.set_num_threads(settings.threads)
    found = {}
    for seed in range(settings.networks):
        found[f"network {seed}"] = audits(*train_without_colour(settings, seed), settings)
        print(f"network {seed}: {found[f'network {seed}']}")
    write_json(settings.output_dir / "scores.json", found)


if __name__ == "__main__":
    main()
