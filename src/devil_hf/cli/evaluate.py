"""`devil evaluate`: what a checkpoint says, measured against ground truth."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from devil_hf.cli.verb import VERBS, Verb
from devil_hf.settings import JsonSettings, option, read_layers


@dataclass(kw_only=True)
class EvaluateSettings(JsonSettings):
    """What every evaluation has."""

    checkpoint: str | None = option(
        "directory, Hub id, or name of a shipped one (default: shapes)", None, positional=True
    )
    device: str | None = option("default: cuda where there is one", None)


@dataclass(kw_only=True)
class CaptionsSettings(EvaluateSettings):
    """Captions of images, and how they are described and compared."""

    checkpoint: str = option("directory, Hub id, or shapes: the shipped one", positional=True)
    source: str = option("caption folder, shapes:COUNT, or YAML file of sources", positional=True)
    split: str | None = option("of a caption folder; look at a test split once", None)
    metrics: list[str] | None = option("bleu meteor rouge_l cider spice bertscore (default: all of them)", None)
    limit: int | None = option("only this many images from the beginning", None)
    batch_size: int = option("images at once, per process", 32)
    guidance: float = option("above 1: favour what the features add", 1.0)
    num_beams: int = option("1 is greedy", 1)
    max_new_tokens: int = option("at most so many tokens", 30)
    seed: int = option("of the shuffled control", 0)
    output_dir: Path = option(
        "of predictions.jsonl, where a stopped run goes on, and scores.json", Path("devil-captions")
    )
    bert_model: str = option("name or directory", "roberta-large")
    bert_layers: int | None = option("of a directory, how many layers to use (roberta-large: 17)", None)
    bert_baseline: Path | None = option("of a directory, the file of values to rescale by", None)


@dataclass(kw_only=True)
class MapsSettings(EvaluateSettings):
    """Localised phrases, and how they are mapped."""

    source: str = option(
        "shapes:COUNT[:SEED], COCO instances JSON, VOC folder, or folder of YOLO labels", "shapes:150", positional=True
    )
    images: Path | None = option("folder of the images, where it is not the usual one", None)
    names: str | None = option("class names of YOLO labels: data.yaml, a text file, or FILE#KEY in JSON or YAML", None)
    limit: int | None = option("only this many images", None)
    layers: list[str] | None = option("names or indices of layers (default: every one)", None)
    carrier: str = option('neutral word read before each phrase; "" for none', "the")
    windows: list[str] = option(
        "pool the square of this odd side around each place of a layer, where its own grid is finer than what it knows; "
        "an index below zero needs the form --windows=-1=3",
        [],
        metavar="LAYER=SIDE",
    )
    joint: bool = option("also maps of all layers asked together", True)
    boards: int = option("of 2, 3 and 4 images, for the multi-object game", 40)
    captions: list[str] = option(
        "captions of the training: class names that fewer than --seen of their images name are reported apart",
        [],
        metavar="FOLDER:SPLIT",
    )
    seen: int = option("images", 10)
    gradcam: bool = option("also Grad-CAM of the backbone's classifier", False)
    class_names: Path | None = option("of that classifier, one a line (default: ImageNet's)", None)
    seed: int = option("of boards, random orders and intervals", 0)
    output_dir: Path = option("maps, records, scores.json and maps.png; goes on where it stopped", Path("devil-maps"))


@dataclass(kw_only=True)
class ControlsSettings(EvaluateSettings):
    """Captioned images, and what is asked of them."""

    data: str = option(
        "its held-out scenes, shapes:COUNT[:SEED], caption folder, YAML file of sources, or a source "
        'such as "{kind: hub, path: user/data, image_column: image, caption_column: caption}"',
        "shapes",
    )
    split: str | None = option("of a caption folder", None)
    limit: int = option("only the first images", 200)
    phrases: list[str] | None = option("words to map (default: frequent words of the captions)", None)
    layers: list[str] | None = option("layers to map (default: those with at most 256 places)", None)
    map_images: int = option("images to map", 50)
    max_new_tokens: int = option("at most so many tokens", 30)
    batch_size: int = option("images at once", 32)
    seed: int = option("of orders and noise", 0)
    output_dir: Path = option("scores, descriptions and maps; a stopped run goes on from there", Path("devil-controls"))


@dataclass(kw_only=True)
class MilanSettings(EvaluateSettings):
    """Which units, how they are labelled and compared."""

    milan: Path = option("folder of NETWORK/DATASET/annotations.csv", metavar="ROOT")
    split: str = option("such as within-alexnet-imagenet or cnns-to-vit; a wrong one lists all")
    limit: int | None = option("only this many test units", None)
    train_steps: int = option("first train on the split's training units; 0: no", 0)
    learning_rate: float = option("of that training", 1e-4)
    seed: int = option("of that training", 0)
    output_dir: Path = option(
        "labels.jsonl, where stopped labelling goes on, scores.json, and what was trained", Path("devil-milan")
    )
    strategy: Literal["greedy", "beam", "rerank"] = option("how a label is chosen", "rerank")
    bert_model: str = option("name or directory for BERTScore; none leaves it out", "roberta-large")
    bert_layers: int | None = option("of a directory, how many layers to use (roberta-large: 17)", None)
    bert_baseline: Path | None = option("of a directory, the file of values to rescale by", None)


def run_evaluate_captions(arguments: Any) -> None:
    from accelerate import PartialState

    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.data.specifications import caption_sources
    from devil_hf.evaluation.captions import caption_table, evaluate_captions
    from devil_hf.evaluation.text.bertscore import BertScoreSettings
    from devil_hf.evaluation.text.metrics import ALL_METRICS, check_metrics

    metrics = arguments.metrics or ALL_METRICS
    check_metrics(metrics)
    bert = BertScoreSettings(arguments.bert_model, arguments.bert_layers, arguments.bert_baseline)
    sources = caption_sources(arguments.source, arguments.split)
    PartialState(cpu=arguments.device == "cpu")
    model, processor = open_checkpoint(arguments.checkpoint, arguments.device)
    content = evaluate_captions(
        model,
        processor,
        sources,
        arguments.output_dir,
        metrics,
        arguments.limit,
        arguments.batch_size,
        arguments.seed,
        bert,
        guidance=arguments.guidance,
        num_beams=arguments.num_beams,
        max_new_tokens=arguments.max_new_tokens,
    )
    if content:
        print(json.dumps(content) if arguments.json else caption_table(content))


def run_evaluate_maps(arguments: Any) -> None:
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.data.objects import open_localised
    from devil_hf.data.worlds import parse_world
    from devil_hf.evaluation.maps.collecting import MapSettings, collect_maps
    from devil_hf.evaluation.maps.gradcam import ClassMapper, read_class_names
    from devil_hf.evaluation.maps.scores import as_results, maps_table, named_in_captions, score_maps
    from devil_hf.evaluation.results import fingerprint
    from devil_hf.report.localisation import localisation_figure

    for name, least in (("limit", 1), ("boards", 0), ("seen", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    examples = open_localised(arguments.source, arguments.images, arguments.names)[: arguments.limit]
    seen = None
    if arguments.captions:
        seen = named_in_captions(
            {phrase for one in examples for phrase in one.groups}, arguments.captions, arguments.seen
        )
    model, processor = open_checkpoint(arguments.checkpoint, arguments.device)
    layers = tuple(read_layers(arguments.layers, model.layer_names) or ())
    windows = read_windows(arguments.windows, layers, model.layer_names)
    settings = MapSettings(
        layers, arguments.carrier or None, arguments.joint, arguments.boards, arguments.seed, windows
    )
    classes = None
    if arguments.gradcam:
        classes = ClassMapper(model, read_class_names(arguments.class_names) if arguments.class_names else None)
    source = {"source": arguments.source}
    source |= {name: str(value) for name in ("images", "names") if (value := getattr(arguments, name))}
    keys, records = collect_maps(model, processor, examples, source, arguments.output_dir, settings, classes)
    rows = {key: records[key] for key in keys}
    content = score_maps(rows, arguments.output_dir, seen, seed=arguments.seed)
    noted: dict[str, Any] = {"carrier": arguments.carrier, "seed": arguments.seed, "images": len(examples)}
    if windows:
        noted["windows"] = windows
    noted["tolerance"] = "half a cell of a map's own grid, chance that of the finest"
    world = parse_world(arguments.source)
    results = as_results(content, world.label if world else arguments.source, noted) | {"weights": fingerprint(model)}
    (arguments.output_dir / "scores.json").write_text(json.dumps(results, indent=1) + "\n")
    localisation_figure(processor, examples, rows, arguments.output_dir).save(arguments.output_dir / "maps.png")
    print(json.dumps(results) if arguments.json else maps_table(content))
    print(f"scores, maps and picture: {arguments.output_dir}", file=sys.stderr)


def run_evaluate_controls(arguments: Any) -> int:
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.data.captioned import open_captioned
    from devil_hf.evaluation.controls import UNTRUSTED, control_table, run_controls

    data = open_captioned(arguments.data, arguments.split, arguments.limit)
    model, processor = open_checkpoint(arguments.checkpoint, arguments.device)
    result = run_controls(
        model,
        processor,
        data,
        arguments.output_dir,
        phrases=arguments.phrases,
        layers=read_layers(arguments.layers, model.layer_names),
        map_images=arguments.map_images,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    print(json.dumps(result) if arguments.json else control_table(result))
    return 0 if result["verdict"]["passed"] else UNTRUSTED


def run_evaluate_neurons(arguments: Any) -> None:
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.data.milan import open_milan
    from devil_hf.evaluation.milan import label_annotated_units, neuron_table, null_label, table_text
    from devil_hf.evaluation.results import fingerprint

    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} leaves nothing to label; give at least 1, or none")
    train, test = open_milan(arguments.milan, arguments.split)
    model, processor = open_checkpoint(arguments.checkpoint, arguments.device)
    folder = arguments.output_dir
    if arguments.train_steps:
        from transformers import TrainingArguments

        from devil_hf.training.units import train_on_units

        settings = TrainingArguments(
            output_dir=str(folder),
            max_steps=arguments.train_steps,
            per_device_train_batch_size=64,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=arguments.train_steps // 20,
            save_strategy="no",
            logging_steps=max(arguments.train_steps // 20, 1),
            report_to=[],
            use_cpu=arguments.device == "cpu",
            seed=arguments.seed,
        )
        train_on_units(model, processor, train, settings).save_model(str(folder / "checkpoint"))
    count = min(arguments.limit or len(test), len(test))
    units = label_annotated_units(
        model, processor, test, test.names[:count], arguments.strategy, arguments.milan, folder
    )
    rows = neuron_table(
        [unit["label"] for unit in units],
        test.summaries[:count],
        null_label(model, processor),
        None if arguments.bert_model == "none" else arguments.bert_model,
        arguments.bert_layers,
        arguments.bert_baseline,
    )
    content = {
        "title": "Labels of units",
        "dataset": {"name": "MILANNOTATIONS", "split": arguments.split},
        "settings": {"units": count, "strategy": arguments.strategy},
        "scores": rows,
        "weights": fingerprint(model),
    }
    (folder / "scores.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content) if arguments.json else table_text(rows))
    print(f"scores and labels: {folder}", file=sys.stderr)


def read_windows(typed: Sequence[str], layers: Sequence[str | int], known: Sequence[str]) -> dict[str, int]:
    """Windows as typed, LAYER=SIDE, by the layer's full name.

    Args:
        layers: names or indices of the layers that are asked; none for all.
        known: the names of all layers.

    Raises:
        ValueError: for one that is not LAYER=SIDE, names no layer that is asked, names one twice, or has an even side.
    """
    from devil_hf.model.pooling_devil import resolve_layers

    asked = [known[index] for index in resolve_layers(list(layers) or None, list(known))]
    windows: dict[str, int] = {}
    for text in typed:
        name, equals, side = text.rpartition("=")
        if not equals or not side.isdigit() or int(side) % 2 == 0:
            raise ValueError(f"--windows {text} is not LAYER=SIDE with an odd side, such as {asked[0]}=3")
        (index,) = resolve_layers(read_layers([name], known), list(known))
        layer = known[index]
        if layer not in asked or layer in windows:
            reason = "was given twice" if layer in windows else f"is not asked (asked: {', '.join(asked)})"
            raise ValueError(f"--windows {text}: layer {layer!r} {reason}")
        windows[layer] = int(side)
    return windows


SUBJECTS = {
    "neurons": Verb(
        "neurons",
        "score labels of units on MILANNOTATIONS",
        "devil evaluate neurons --milan MILANNOTATIONS --split within-resnet152-imagenet --checkpoint CHECKPOINT",
        lambda: MilanSettings,
        run_evaluate_neurons,
    ),
    "captions": Verb(
        "captions",
        "score what each layer says on captions",
        "devil evaluate captions user/devil-resnet50-opt125m flickr8k --split test --output-dir scores/flickr8k",
        lambda: CaptionsSettings,
        run_evaluate_captions,
    ),
    "maps": Verb(
        "maps",
        "score attribution maps against masks and boxes",
        "devil evaluate maps CHECKPOINT coco/annotations/instances_val2017.json --carrier a --limit 500",
        lambda: MapsSettings,
        run_evaluate_maps,
    ),
    "controls": Verb(
        "controls",
        "test whether it is the features that speak; exit code 0: trusted, 3: not trusted, 1: error",
        "devil evaluate controls CHECKPOINT --data flickr8k --split val --limit 100",
        lambda: ControlsSettings,
        run_evaluate_controls,
    ),
}


def subjects() -> Mapping[str, Verb]:
    """The evaluations: every entry of the registry of evaluators."""
    from devil_hf.evaluation.evaluator import EVALUATORS, run_and_print

    return SUBJECTS | {
        name: Verb(
            name,
            one.summary,
            one.example,
            partial(getattr, one, "Settings"),
            partial(run_and_print, name),
        )
        for name, one in EVALUATORS.items()
    }


VERBS.register(
    "evaluate",
    Verb(
        "evaluate",
        "measure a checkpoint against ground truth",
        "devil evaluate shapes CHECKPOINT",
        subjects=subjects,
    ),
)
