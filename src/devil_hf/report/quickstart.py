"""`devil quickstart`: the whole life of a DeViL in a few minutes, on the embedded shapes world.

A new translator is trained from scratch between the shipped frozen parts, saved, loaded again in a fresh process, measured on
held-out scenes, and shown in pictures. Everything is what a user would write for a network of their own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments, set_seed

from devil_hf.build import from_backbone_and_language_model
from devil_hf.checkpoints import SCOPE
from devil_hf.checkpoints.loading import load
from devil_hf.data.shapes import ATTRIBUTE_WORDS
from devil_hf.data.worlds import HELD_OUT_WORLD, TRAINING_WORLD, World
from devil_hf.evaluation.results import CHANCE, fingerprint
from devil_hf.evaluation.shapes import (
    describe_scenes,
    pixel_values,
    play_pointing,
    pointing_scores,
    word_maps,
    word_scores,
)
from devil_hf.model.backbone_devil import FeatureBackbone
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.figures import attribution_figure, layers_figure, locations_figure
from devil_hf.training.features import PooledCaptions, pooled_feature_draws
from devil_hf.training.trainer import DevilTrainer

# The translator of the embedded checkpoint, and what makes training leave the plateau where the prefix is ignored.
TRANSLATOR: dict[str, Any] = {
    "prefix_length": 8,
    "translator_width": 128,
    "translator_depth": 3,
    "translator_heads": 4,
    "translator_feed_forward": 512,
    "normalize_features": True,
    "layer_dropout": 0.3,
    "location_schedule": "log_uniform",
    "null_probability": 0.05,
    "max_caption_tokens": 40,
}


def quickstart(
    output_dir: str | Path, scenes: int = 6_000, steps: int = 750, held_out: int = 500, seed: int = 0
) -> dict:
    """Train, save, reload in a fresh process, measure and draw.

    Args:
        output_dir: gets `checkpoint/` (the model, to use next), `scores.json` and `pictures/`.
        scenes: training scenes.
        steps: training steps of 64 captions.
        held_out: scenes of another world that the scores are measured on.

    Returns:
        The content of `scores.json`.
    """
    began = time.perf_counter()
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    shipped, processor = load(device="cpu")
    model = train_translator(
        shipped.backbone, shipped.language_model, processor, output_dir / "training", scenes, steps, seed
    )
    checkpoint = output_dir / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    command = [
        sys.executable,
        "-m",
        "devil_hf.report.quickstart",
        str(checkpoint),
        str(output_dir),
        "--held-out",
        str(held_out),
    ]
    subprocess.run(command, check=True)
    file = output_dir / "scores.json"
    scores = json.loads(file.read_text())
    scores["weights"] = fingerprint(model)
    scores["seconds"] = round(time.perf_counter() - began, 1)
    file.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def train_translator(
    backbone: FeatureBackbone,
    language_model: PreTrainedModel,
    processor: DevilProcessor,
    training_dir: str | Path,
    scenes: int,
    steps: int,
    seed: int = 0,
    learning_rate: float = 2e-3,
) -> DevilModel:
    """Train a new translator between frozen parts on scenes of the shapes world; the model comes back on the CPU."""
    set_seed(seed)
    model = from_backbone_and_language_model(
        backbone, language_model, tokenizer=processor.tokenizer, scope=SCOPE, **TRANSLATOR
    )
    dataset = shapes_features(model, processor, scenes)
    arguments = TrainingArguments(
        output_dir=str(training_dir),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=1e-6,
        max_grad_norm=1.0,
        logging_steps=max(steps // 20, 1),
        save_strategy="no",
        seed=seed,
        report_to=[],
        dataloader_num_workers=0,
    )
    DevilTrainer(model, arguments, processor, train_dataset=dataset).train()
    return model.cpu().eval()


def shapes_features(
    model: DevilModel,
    processor: DevilProcessor,
    scenes: int,
    draws: int = 8,
    captions: int = 8,
    world: int = TRAINING_WORLD,
) -> PooledCaptions:
    """Pooled features of the first `scenes` scenes of a world, each with several location draws and captions."""
    texts: list[list[str]] = []
    source = World(scenes, world)

    def batches(size: int = 64):
        for start in range(0, scenes, size):
            pictures = []
            for index in range(start, min(start + size, scenes)):
                scene, said = source.captioned(index, captions)
                pictures.append(scene.image)
                texts.append(said)
            yield processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")[
                "pixel_values"
            ]

    features = pooled_feature_draws(model, batches(), draws, "features of training scenes", -(-scenes // 64))
    return PooledCaptions(features, texts)


# ------------------------------------------------------------------------------------------------------------- measuring


def measure(
    model: DevilModel, processor: DevilProcessor, scenes: int = 500, pointing_scenes: int = 150, batch_size: int = 50
) -> dict:
    """Scores on held-out scenes: F1 of the words by layer and attribute, and the pointing game.

    The pointing game asks every location of every layer, so it takes the first `pointing_scenes` of the scenes only.
    `devil evaluate shapes` asks more.

    Returns:
        `{"description_f1": {"all" or layer: {attribute: F1}}, "pointing": {layer or combination: {attribute: share}},
        "chance_pointing": share, "pointing_phrases": {attribute: how many}}`.
    """
    world = list(World(scenes, HELD_OUT_WORLD).scenes())
    said: list[dict[str, str]] = []
    played: list[list[dict]] = []
    for start in tqdm(range(0, scenes, batch_size), desc="held-out scenes", unit="batch", leave=False):
        batch = world[start : start + batch_size]
        features = model.extract_features(pixel_values(processor, batch))
        said += describe_scenes(model, processor, features)
        several = [at for at, scene in enumerate(batch[: max(pointing_scenes - start, 0)]) if len(scene.objects) > 1]
        if several:
            asked = [cast(Tensor, maps)[several] for maps in features]
            played += play_pointing(word_maps(model, processor, asked), [batch[at] for at in several])
    truths = [scene.words for scene in world]
    words = {name: word_scores([texts[name] for texts in said], truths) for name in said[0]}
    pointing = {name: _rounded(row) for name, row in pointing_scores(played).items()}
    pointing.pop(CHANCE, None)
    phrases = [phrase for row in played for phrase in row]
    chances = [chance for phrase in phrases for _, chance in phrase["games"].values()]
    return {
        "description_f1": {n: _rounded({a: one["f1"] for a, one in row.items()}) for n, row in words.items()},
        "pointing": pointing,
        "chance_pointing": round(float(np.mean(chances)), 4) if chances else 0.0,
        "pointing_phrases": {a: sum(phrase["attribute"] == a for phrase in phrases) for a in ATTRIBUTE_WORDS},
    }


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in row.items()}


def score_table(scores: dict) -> str:
    """The scores as text: a row per layer."""
    attributes = list(ATTRIBUTE_WORDS)
    header = f"{'':12}" + "".join(f"{a:>10}" for a in attributes)
    lines = ["F1 of the words in descriptions of held-out scenes", header]
    lines += [
        f"{name:12}" + "".join(f"{row[a]:10.3f}" for a in attributes) for name, row in scores["description_f1"].items()
    ]
    lines += ["", "pointing game, for words that one object of several has", header]
    lines += [
        f"{name:12}" + "".join(f"{row[a]:10.3f}" if a in row else f"{'':10}" for a in attributes)
        for name, row in scores["pointing"].items()
    ]
    chance = scores["chance_pointing"]
    lines.append(f"{'chance':12}" + f"{chance:10.3f}" * len(attributes))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- showing


def draw_pictures(
    model: DevilModel, processor: DevilProcessor, folder: Path, scenes: int = 3, say: Callable[[str], None] = print
) -> list[Path]:
    """Pictures of held-out scenes: what each layer says, maps per phrase and layer, descriptions by location."""
    folder.mkdir(parents=True, exist_ok=True)
    several = [scene for scene in World(40, HELD_OUT_WORLD).scenes() if len(scene.objects) > 1]
    written = []

    def write(picture: Image.Image, name: str) -> None:
        picture.save(folder / name)
        written.append(folder / name)

    images = [Image.fromarray(scene.image) for scene in several[:scenes]]
    inputs = processor(images=images, return_tensors="pt")
    output = model.describe(**inputs, max_new_tokens=40)
    texts = processor.batch_decode(output.sequences, skip_special_tokens=True)
    rows: list[list[tuple[str, str]]] = [[] for _ in images]
    for row, text in enumerate(texts):
        rows[int(output.image_index[row])].append((output.layer_of(row), text))
    for scene, layer_texts in zip(several, rows, strict=False):
        objects = ", ".join(" ".join(item.attributes.values()) for item in scene.objects)
        say("\n".join([f"  {'(truth)':12} {objects}", *(f"  {layer:12} {text}" for layer, text in layer_texts), ""]))
    write(layers_figure(images, rows), "layers.png")
    for index, (image, scene) in enumerate(zip(images, several, strict=False)):
        write(image, f"scene_{index}.png")
        words = list(dict.fromkeys(word for item in scene.objects for word in item.attributes.values()))
        one = processor(images=image, return_tensors="pt")
        maps = model.attribute(**one, phrases=processor(text=words, return_tensors="pt"))
        write(attribution_figure(processor, image, maps, words), f"maps_{index}.png")
        layer = model.layer_names[-2]
        dense = model.describe(**one, layers=layer, locations="all", max_new_tokens=12)
        cells = processor.batch_decode(dense.sequences, skip_special_tokens=True)
        places = [tuple(place) for place in dense.locations.tolist()]
        grid = (maps.maps[layer].shape[-2], maps.maps[layer].shape[-1])
        figure = locations_figure(processor, image, dict(zip(places, cells, strict=True)), grid, layer)
        write(figure, f"locations_{index}.png")
    return written


def report(checkpoint: Path, output_dir: Path, held_out: int, say: Callable[[str], None] = print) -> dict:
    """Load `checkpoint`, describe, measure and draw; writes `scores.json` and `pictures/` into `output_dir`."""
    began = time.perf_counter()
    model, processor = load(checkpoint)
    say("What each layer says about held-out scenes:\n")
    pictures = draw_pictures(model, processor, output_dir / "pictures", say=say)
    scores = measure(model, processor, held_out)
    say(score_table(scores))
    scores["seconds"] = round(time.perf_counter() - began, 1)
    (output_dir / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    say("\npictures: " + ", ".join(str(picture) for picture in pictures))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure and draw a checkpoint of the shapes world.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--held-out", type=int, default=500)
    arguments = parser.parse_args()
    report(arguments.checkpoint, arguments.output_dir, arguments.held_out)


if __name__ == "__main__":
    main()
