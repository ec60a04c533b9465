"""`devil evaluate`: what a checkpoint says, measured against ground truth."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_evaluate(verbs) -> None:
    """Add `evaluate` and its subjects."""
    example = "devil evaluate neurons --milan MILANNOTATIONS --split within-resnet152-imagenet --checkpoint CHECKPOINT"
    evaluate = add_verb(verbs, "evaluate", None, "measure a checkpoint against ground truth", example)
    subjects = evaluate.add_subparsers(dest="subject", required=True)
    neurons = add_verb(subjects, "neurons", run_evaluate_neurons, "score labels of units on MILANNOTATIONS", example)
    neurons.add_argument(
        "--milan", type=Path, required=True, metavar="ROOT", help="folder of NETWORK/DATASET/annotations.csv"
    )
    neurons.add_argument(
        "--split", required=True, help="such as within-alexnet-imagenet or cnns-to-vit; a wrong one lists all"
    )
    neurons.add_argument("--checkpoint", help="directory or Hub id")
    neurons.add_argument("--limit", type=int, help="only this many test units")
    neurons.add_argument(
        "--train-steps", type=int, default=0, help="first train on the split's training units (default: no)"
    )
    neurons.add_argument("--learning-rate", type=float, default=1e-4, help="of that training (default: %(default)s)")
    neurons.add_argument("--seed", type=int, default=0, help="of that training (default: %(default)s)")
    neurons.add_argument(
        "--output-dir",
        type=Path,
        default=Path("devil-milan"),
        help="labels.jsonl, where stopped labelling goes on, scores.json, and what was trained (default: %(default)s)",
    )
    neurons.add_argument("--strategy", choices=("greedy", "beam", "rerank"), default="rerank")
    neurons.add_argument(
        "--bert-model", default="roberta-large", help="name or directory for BERTScore; none leaves it out"
    )
    neurons.add_argument("--bert-layers", type=int, help="of a directory, how many layers to use (roberta-large: 17)")
    neurons.add_argument("--bert-baseline", type=Path, help="of a directory, the file of values to rescale by")
    neurons.add_argument("--device", help="default: cuda where there is one")
    neurons.add_argument("--json", action="store_true", help="print JSON")
    _add_captions(subjects)
    _add_maps(subjects)
    _add_controls(subjects)
    _add_shapes(subjects)


def _add_captions(subjects) -> None:
    example = "devil evaluate captions user/devil-resnet50-opt125m flickr8k --split test --output-dir scores/flickr8k"
    captions = add_verb(subjects, "captions", run_evaluate_captions, "score what each layer says on captions", example)
    add_caption_options(captions)


def add_caption_options(captions: argparse.ArgumentParser) -> None:
    """The options of `devil evaluate captions`, which scripts/evaluate.py has as well."""
    captions.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or Hub id; embedded: the package's own")
    captions.add_argument("source", metavar="SOURCE", help="caption folder, shapes:COUNT, or YAML file of sources")
    captions.add_argument("--split", help="of a caption folder; look at a test split once")
    captions.add_argument(
        "--metrics", nargs="+", help="bleu meteor rouge_l cider spice bertscore (default: all of them)"
    )
    captions.add_argument("--limit", type=int, help="only this many images from the beginning")
    captions.add_argument("--batch-size", type=int, default=32, help="images at once, per process (default: 32)")
    captions.add_argument("--guidance", type=float, default=1.0, help="default: %(default)s")
    captions.add_argument("--num-beams", type=int, default=1, help="default: greedy")
    captions.add_argument("--max-new-tokens", type=int, default=30, help="default: %(default)s")
    captions.add_argument("--seed", type=int, default=0, help="of the shuffled control (default: %(default)s)")
    captions.add_argument(
        "--output-dir",
        type=Path,
        default=Path("devil-captions"),
        help="of predictions.jsonl, where a stopped run goes on, and scores.json (default: %(default)s)",
    )
    captions.add_argument("--bert-model", default="roberta-large", help="name or directory (default: %(default)s)")
    captions.add_argument("--bert-layers", type=int, help="of a directory, how many layers to use (roberta-large: 17)")
    captions.add_argument("--bert-baseline", type=Path, help="of a directory, the file of values to rescale by")
    captions.add_argument("--device", help="default: cuda where there is one")
    captions.add_argument("--json", action="store_true", help="print JSON")


def run_evaluate_captions(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from devil_hf.checkpoints.loading import load
    from devil_hf.data.sources import named_sources
    from devil_hf.evaluation.captions import caption_table, evaluate_captions
    from devil_hf.evaluation.text.bertscore import BertScoreSettings
    from devil_hf.evaluation.text.metrics import ALL_METRICS, check_metrics

    metrics = arguments.metrics or ALL_METRICS
    check_metrics(metrics)
    bert = BertScoreSettings(arguments.bert_model, arguments.bert_layers, arguments.bert_baseline)
    sources = named_sources(arguments.source, arguments.split)
    PartialState(cpu=arguments.device == "cpu")
    model, processor = load(None if arguments.checkpoint == "embedded" else arguments.checkpoint, arguments.device)
    state_scope(model)
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


def _add_maps(subjects) -> None:
    example = "devil evaluate maps CHECKPOINT coco/annotations/instances_val2017.json --carrier a --limit 500"
    maps = add_verb(subjects, "maps", run_evaluate_maps, "score attribution maps against masks and boxes", example)
    maps.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="default: the shapes-world checkpoint of the package"
    )
    maps.add_argument(
        "source",
        nargs="?",
        default="shapes:150",
        metavar="SOURCE",
        help="shapes:COUNT[:SEED], COCO instances JSON, VOC folder, or folder of YOLO labels (default: %(default)s)",
    )
    maps.add_argument("--images", type=Path, help="folder of the images, where it is not the usual one")
    maps.add_argument("--names", help="class names of YOLO labels: data.yaml, a text file, or FILE#KEY in JSON or YAML")
    maps.add_argument("--limit", type=int, help="only this many images")
    maps.add_argument("--layers", nargs="+", help="names or indices of layers (default: every one)")
    maps.add_argument(
        "--carrier", default="the", help='neutral word read before each phrase; "" for none (default: %(default)s)'
    )
    maps.add_argument(
        "--windows",
        nargs="+",
        default=[],
        metavar="LAYER=SIDE",
        help="pool the square of this odd side around each place of a layer, where its own grid is finer than what it knows; "
        "an index below zero needs the form --windows=-1=3",
    )
    maps.add_argument(
        "--no-joint", dest="joint", action="store_false", help="leave out maps of all layers asked together"
    )
    maps.add_argument(
        "--boards", type=int, default=40, help="of 2, 3 and 4 images, for the multi-object game (default: %(default)s)"
    )
    maps.add_argument(
        "--captions",
        nargs="+",
        default=[],
        metavar="FOLDER:SPLIT",
        help="captions of the training: class names that fewer than --seen of their images name are reported apart",
    )
    maps.add_argument("--seen", type=int, default=10, help="default: %(default)s images")
    maps.add_argument("--gradcam", action="store_true", help="also Grad-CAM of the backbone's classifier")
    maps.add_argument("--class-names", type=Path, help="of that classifier, one a line (default: ImageNet's)")
    maps.add_argument(
        "--seed", type=int, default=0, help="of boards, random orders and intervals (default: %(default)s)"
    )
    maps.add_argument(
        "--output-dir",
        type=Path,
        default=Path("devil-maps"),
        help="maps, records, scores.json and maps.png; goes on where it stopped (default: %(default)s)",
    )
    maps.add_argument("--device", help="default: cuda where there is one")
    maps.add_argument("--json", action="store_true", help="print JSON")


def run_evaluate_maps(arguments: argparse.Namespace) -> None:
    from devil_hf.checkpoints.loading import load
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
    model, processor = load(arguments.checkpoint, arguments.device)
    state_scope(model)
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


def _add_controls(subjects) -> None:
    controls = add_verb(
        subjects,
        "controls",
        run_evaluate_controls,
        "test whether it is the features that speak; exit code 0: trusted, 3: not trusted, 1: error",
        "devil evaluate controls CHECKPOINT --data flickr8k --split val --limit 100",
    )
    controls.add_argument("checkpoint", nargs="?", help="directory or Hub id (default: the shapes-world checkpoint)")
    controls.add_argument(
        "--data",
        default="shapes",
        help='"shapes" (default: its held-out scenes), shapes:COUNT[:SEED], caption folder, YAML file of sources, or a source '
        'such as "{kind: hub, path: user/data, image_column: image, caption_column: caption}"',
    )
    controls.add_argument("--split", help="of a caption folder")
    controls.add_argument("--limit", type=int, default=200, help="only the first images (default: %(default)s)")
    controls.add_argument("--phrases", nargs="+", help="words to map (default: frequent words of the captions)")
    controls.add_argument("--layers", nargs="+", help="layers to map (default: those with at most 256 places)")
    controls.add_argument("--map-images", type=int, default=50, help="images to map (default: %(default)s)")
    controls.add_argument("--max-new-tokens", type=int, default=30, help="default: %(default)s")
    controls.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    controls.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    controls.add_argument(
        "--output-dir",
        type=Path,
        default=Path("devil-controls"),
        help="scores, descriptions and maps; a stopped run goes on from there (default: %(default)s)",
    )
    controls.add_argument("--device", help="default: cuda where there is one")
    controls.add_argument("--json", action="store_true", help="print JSON")


def run_evaluate_controls(arguments: argparse.Namespace) -> int:
    from devil_hf.checkpoints.loading import load
    from devil_hf.data.captioned import open_captioned
    from devil_hf.evaluation.controls import UNTRUSTED, control_table, run_controls

    data = open_captioned(arguments.data, arguments.split, arguments.limit)
    model, processor = load(arguments.checkpoint, arguments.device)
    state_scope(model)
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


def _add_shapes(subjects) -> None:
    shapes = add_verb(
        subjects,
        "shapes",
        run_evaluate_shapes,
        "measure what each layer knows of the shapes world, where every answer is known exactly",
        "devil evaluate shapes CHECKPOINT --output-dir devil-shapes",
    )
    shapes.add_argument("checkpoint", nargs="?", help="directory or Hub id (default: the shapes-world checkpoint)")
    shapes.add_argument("--limit", type=int, default=300, help="held-out scenes (default: %(default)s)")
    shapes.add_argument("--seed", type=int, default=1, help="of the world (default: %(default)s, which is held out)")
    shapes.add_argument("--batch-size", type=int, default=25, help="default: %(default)s")
    shapes.add_argument(
        "--output-dir",
        type=Path,
        default=Path("devil-shapes"),
        help="scores, answers and the figure; a stopped run goes on from there (default: %(default)s)",
    )
    shapes.add_argument("--device", help="default: cuda where there is one")
    shapes.add_argument("--json", action="store_true", help="print JSON")


def run_evaluate_shapes(arguments: argparse.Namespace) -> None:
    from devil_hf.checkpoints.loading import load
    from devil_hf.evaluation.shapes import ground_truth, knowledge_panels, knowledge_table
    from devil_hf.report.figures import knowledge_figure

    model, processor = load(arguments.checkpoint, arguments.device)
    state_scope(model)
    result = ground_truth(
        model,
        processor,
        arguments.output_dir,
        scenes=arguments.limit,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    picture = arguments.output_dir / "layers.png"
    knowledge_figure(*knowledge_panels(result), "What each layer knows").save(picture, optimize=True)
    print(json.dumps(result) if arguments.json else f"{knowledge_table(result)}\n\nfigure: {picture}")


def run_evaluate_neurons(arguments: argparse.Namespace) -> None:
    from devil_hf.checkpoints.loading import load
    from devil_hf.data.milan import open_milan
    from devil_hf.evaluation.milan import label_annotated_units, neuron_table, null_label, table_text
    from devil_hf.evaluation.results import fingerprint

    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} leaves nothing to label; give at least 1, or none")
    train, test = open_milan(arguments.milan, arguments.split)
    model, processor = load(arguments.checkpoint, arguments.device)
    state_scope(model)
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


def add_verb(verbs, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    """A verb of the command line whose help ends with an example."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def read_layers(names: list[str] | None, known: Sequence[str]) -> list[str | int] | None:
    """Layers as typed: a name wins over an index, since some networks name their layers by numbers."""
    if names is None:
        return None
    return [int(name) if name not in known and name.lstrip("-").isdigit() else name for name in names]


def read_windows(typed: Sequence[str], layers: Sequence[str | int], known: Sequence[str]) -> dict[str, int]:
    """Windows as typed, LAYER=SIDE, by the layer's full name.

    Args:
        layers: names or indices of the layers that are asked; none for all.
        known: the names of all layers.

    Raises:
        ValueError: for one that is not LAYER=SIDE, names no layer that is asked, names one twice, or has an even side.
    """
    from devil_hf.model.backbone_devil import resolve_layers

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


def state_scope(model) -> None:
    """Say what a checkpoint knows, where it says so."""
    if model.config.scope:
        print(f"note: {model.config.scope}", file=sys.stderr)
