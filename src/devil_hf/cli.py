"""The `devil` command: every verb one call into the library."""

import argparse
import json
import sys
from pathlib import Path
from subprocess import CalledProcessError

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

EPILOG = "Checkpoints are directories or Hub ids; without one, the shapes-world checkpoint of the package answers."


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser(full="train" in argv).parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading weights; training shows its own
    try:
        return arguments.run(arguments) or 0
    except (OSError, ValueError, TypeError, RuntimeError, StrictDataclassError, CalledProcessError) as error:
        if arguments.debug:
            raise
        print(f"devil {arguments.verb}: {error}", file=sys.stderr)
        return 1


def build_parser(full: bool = True) -> argparse.ArgumentParser:
    """The parser; without `full`, `train` has no options yet, whose reading imports half of the ecosystem."""
    parser = argparse.ArgumentParser(prog="devil", description="Ask a vision model what it sees.", epilog=EPILOG)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True)

    quickstart = _verb(
        verbs, "quickstart", run_quickstart, "train, measure and draw a DeViL of the shapes world", "devil quickstart"
    )
    quickstart.add_argument("--output-dir", type=Path, default=Path("devil-quickstart"), help="default: %(default)s")
    quickstart.add_argument(
        "--steps", type=int, default=1_000, help="training steps of 64 captions (default: %(default)s)"
    )
    quickstart.add_argument("--scenes", type=int, default=6_000, help="training scenes (default: %(default)s)")
    quickstart.add_argument("--held-out", type=int, default=500, help="scenes to measure on (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    quickstart.add_argument("--json", action="store_true", help="print the scores as JSON at the end")

    example = "devil describe photo.jpg --checkpoint user/devil-resnet50-opt125m --layers layer3 layer4"
    describe = _verb(verbs, "describe", run_describe, "say what each layer sees in images", example)
    describe.add_argument("images", nargs="+", metavar="IMAGE", help="a file or URL")
    _question(describe)
    describe.add_argument("--locations", nargs="+", metavar="ROW,COLUMN", help='places of each layer\'s grid, or "all"')
    describe.add_argument("--window", type=int, default=1, help="side of the square around each place (default: 1)")
    describe.add_argument("--evidence", action="store_true", help="print what each word owes to the features, in nats")
    describe.add_argument(
        "--guidance", type=float, default=1.0, help="above 1: favour what the features add (default: 1)"
    )
    describe.add_argument("--max-new-tokens", type=int, default=30, help="default: %(default)s")
    describe.add_argument("--num-beams", type=int, default=1, help="default: greedy")
    describe.add_argument("--output", type=Path, help="also draw the image beside the words, into this file")

    example = 'devil attribute photo.jpg "a dog" grass --layers layer3 layer4 --output maps.png'
    attribute = _verb(verbs, "attribute", run_attribute, "map where words come from", example)
    attribute.add_argument("image", metavar="IMAGE", help="a file or URL")
    attribute.add_argument("phrases", nargs="+", metavar="PHRASE")
    _question(attribute)
    attribute.add_argument(
        "--measure", choices=("evidence", "per_token", "sum"), default="evidence", help="default: evidence"
    )
    attribute.add_argument("--combine", choices=("joint", "mean"), help="one map from all the layers")
    attribute.add_argument("--window", type=int, default=1, help="side of the square around each place (default: 1)")
    attribute.add_argument("--carrier", help='a neutral word read before each phrase, such as "the"')
    attribute.add_argument(
        "--output", type=Path, default=Path("maps.png"), help="picture to write (default: %(default)s)"
    )

    demo = _verb(
        verbs, "demo", run_demo, "explore a checkpoint in the browser, by clicking into images", "devil demo --port 7860"
    )
    demo.add_argument(
        "--checkpoint", help="directory or Hub id (default: DEVIL_CHECKPOINT, else the shapes-world checkpoint)"
    )
    demo.add_argument("--device", help="default: cuda where there is one")
    demo.add_argument("--host", help="address to listen on (default: this machine alone)")
    demo.add_argument("--port", type=int, help="default: the first free one from 7860 on")

    example = "devil train --config scripts/recipes/flickr8k_small.yaml --output_dir runs/flickr8k"
    train = _verb(verbs, "train", run_train, "train a translator between your backbone and language model", example)
    if full:
        from devil_hf.training.recipe import add_recipe_options

        add_recipe_options(train)
    return parser


def _verb(verbs, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", help="directory or Hub id (default: the shapes-world checkpoint of the package)"
    )
    parser.add_argument("--layers", nargs="+", help="names or indices of layers (default: every one)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _layers(names: list[str] | None) -> list[str | int] | None:
    return [int(name) if name.lstrip("-").isdigit() else name for name in names] if names else None


def _locations(places: list[str] | None) -> str | list[tuple[int, int]] | None:
    if places is None:
        return None
    if places == ["all"]:
        return "all"
    try:
        pairs = [tuple(int(number) for number in place.split(",")) for place in places]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f'locations {places} are not ROW,COLUMN pairs such as 3,4, nor "all"')
    return [(pair[0], pair[1]) for pair in pairs]


def run_quickstart(arguments: argparse.Namespace) -> None:
    from devil_hf.quickstart import quickstart

    if arguments.steps < 1 or arguments.scenes < 64 or arguments.held_out < 1:
        raise ValueError("quickstart needs at least 1 step, 64 scenes and 1 held-out scene")
    scores = quickstart(arguments.output_dir, arguments.scenes, arguments.steps, arguments.held_out, arguments.seed)
    if arguments.json:
        print(json.dumps(scores))
        return
    checkpoint = arguments.output_dir / "checkpoint"
    print(f"\ndone in {scores['seconds']:.0f} s; the model to use next is {checkpoint}:")
    print(f"  devil describe {arguments.output_dir}/pictures/scene_0.png --checkpoint {checkpoint}")


def run_train(arguments: argparse.Namespace) -> None:
    from devil_hf.training.recipe import recipe_of
    from devil_hf.training.recipe import train

    print(f"checkpoint: {train(recipe_of(arguments))}")


def run_demo(arguments: argparse.Namespace) -> None:
    from devil_hf.demo.app import launch

    launch(arguments.checkpoint, arguments.device, arguments.host, arguments.port)


def run_describe(arguments: argparse.Namespace) -> None:
    locations = _locations(arguments.locations)
    from devil_hf.image_processing_devil import load_images
    from devil_hf.loading import load

    images = [image for path in arguments.images for image in load_images(path)]
    model, processor = load(arguments.checkpoint, arguments.device)
    _state_scope(model)
    output = model.describe(
        **processor(images=images, return_tensors="pt"),
        layers=_layers(arguments.layers),
        locations=locations,
        window=arguments.window,
        evidence=arguments.evidence,
        guidance=arguments.guidance,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
    )
    rows = processor.post_process_descriptions(output, arguments.images)
    if arguments.output:
        from devil_hf.report.figures import layers_figure

        texts: list[list[tuple[str, str]]] = [[] for _ in images]
        for index, row in zip(output.image_index.tolist(), rows, strict=True):
            place = f" {row['location']}" if row["location"] else ""
            texts[index].append((row["layer"] + place, row["description"]))
        layers_figure(images, texts).save(arguments.output)
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        place = "" if row["location"] is None else f" {row['location']}"
        print(f"{row['image']}  {row['layer']}{place}: {row['description']}")
        if arguments.evidence:
            print("    " + "  ".join(f"{word}{value:+.1f}" for word, value in row["words"]))


def run_attribute(arguments: argparse.Namespace) -> None:
    from devil_hf.image_processing_devil import load_images
    from devil_hf.loading import load
    from devil_hf.report.figures import attribution_figure

    (image,) = load_images(arguments.image)
    model, processor = load(arguments.checkpoint, arguments.device)
    _state_scope(model)
    output = model.attribute(
        **processor(images=image, return_tensors="pt"),
        phrases=processor(text=arguments.phrases, carrier=arguments.carrier, return_tensors="pt"),
        layers=_layers(arguments.layers),
        measure=arguments.measure,
        combine=arguments.combine,
        window=arguments.window,
    )
    output.maps = {name: one.cpu() for name, one in output.maps.items()}
    attribution_figure(processor, image, output, arguments.phrases).save(arguments.output)
    if arguments.json:
        print(json.dumps({name: one[0].tolist() for name, one in output.maps.items()}))
        return
    unit = {"evidence": "nats per token over the null prefix", "per_token": "nats per token", "sum": "nats"}
    print(f"highest value and its place, in {unit[arguments.measure]}")
    for name, one in output.maps.items():
        for phrase, values in zip(arguments.phrases, one[0], strict=True):
            row, column = divmod(int(values.argmax()), values.shape[1])
            print(f"{name}  {phrase}: {values.max():+.2f} at ({row}, {column})")
    print(f"maps: {arguments.output}")


def _state_scope(model) -> None:
    if model.config.scope:
        print(f"note: {model.config.scope}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
