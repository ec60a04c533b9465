"""The `devil` command: every verb one call into the library."""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from subprocess import CalledProcessError

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from devil_hf.cli.evaluate import add_evaluate, add_verb, read_layers, state_scope
from devil_hf.settings import hyphenated

EPILOG = "Checkpoints are directories or Hub ids; without one, the shapes-world checkpoint of the package answers."


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = hyphenated(sys.argv[1:] if argv is None else argv)
    arguments = build_parser(full="train" in argv).parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading weights; training shows its own
    try:
        return arguments.run(arguments) or 0
    except (
        OSError,
        ImportError,
        ValueError,
        TypeError,
        RuntimeError,
        StrictDataclassError,
        CalledProcessError,
    ) as error:
        if arguments.debug:
            raise
        print(f"devil {arguments.verb}: {error}", file=sys.stderr)
        return 1


def build_parser(full: bool = True) -> argparse.ArgumentParser:
    """The parser; without `full`, `train` has no options yet, whose reading imports half of the ecosystem."""
    parser = argparse.ArgumentParser(prog="devil", description="Ask a vision model what it sees.", epilog=EPILOG)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True)

    quickstart = add_verb(
        verbs, "quickstart", run_quickstart, "train, measure and draw a DeViL of the shapes world", "devil quickstart"
    )
    quickstart.add_argument("--output-dir", type=Path, default=Path("devil-quickstart"), help="default: %(default)s")
    quickstart.add_argument(
        "--steps", type=int, default=750, help="training steps of 64 captions (default: %(default)s)"
    )
    quickstart.add_argument("--scenes", type=int, default=6_000, help="training scenes (default: %(default)s)")
    quickstart.add_argument("--held-out", type=int, default=500, help="scenes to measure on (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    quickstart.add_argument("--json", action="store_true", help="print the scores as JSON at the end")

    example = "devil describe photo.jpg --checkpoint user/devil-resnet50-opt125m --layers layer3 layer4"
    describe = add_verb(verbs, "describe", run_describe, "say what each layer sees in images", example)
    describe.add_argument("images", nargs="+", metavar="IMAGE", help="a file or URL")
    _question(describe)
    describe.add_argument("--locations", nargs="+", metavar="ROW,COLUMN", help='places of each layer\'s grid, or "all"')
    describe.add_argument("--window", type=int, default=1, help="side of the square around each place (default: 1)")
    describe.add_argument("--evidence", action="store_true", help="print what each word owes to the features, in nats")
    describe.add_argument(
        "--guidance", type=float, default=1.0, help="above 1: favour what the features add (default: 1)"
    )
    describe.add_argument("--max-new-tokens", type=int, default=30, help="default: %(default)s")
    describe.add_argument("--num-beams", type=int, default=1, help="default: greedy; with --grounded the candidates, 8")
    describe.add_argument(
        "--grounded",
        action="store_true",
        help="one description per image, the one whose phrases its places support best",
    )
    describe.add_argument("--output", type=Path, help="also draw the image beside the words, into this file")

    example = 'devil attribute photo.jpg "a dog" grass --layers layer3 layer4 --output maps.png'
    attribute = add_verb(verbs, "attribute", run_attribute, "map where words come from", example)
    attribute.add_argument("image", metavar="IMAGE", help="a file or URL")
    attribute.add_argument("phrases", nargs="+", metavar="PHRASE")
    _question(attribute)
    attribute.add_argument(
        "--measure", choices=("evidence", "per_token", "sum"), default="evidence", help="default: evidence"
    )
    attribute.add_argument("--combine", choices=("informed", "mean", "joint"), help="one map from all the layers")
    attribute.add_argument("--window", type=int, default=1, help="side of the square around each place (default: 1)")
    attribute.add_argument("--carrier", help='a neutral word read before each phrase, such as "the"')
    attribute.add_argument(
        "--output", type=Path, default=Path("maps.png"), help="picture to write (default: %(default)s)"
    )

    _add_neurons(verbs)
    add_evaluate(verbs)

    example = "devil push devil-quickstart/checkpoint user/devil-shapes --scores devil-quickstart/scores.json --dry-run"
    push = add_verb(verbs, "push", run_push, "publish a checkpoint on the Hub, with a card", example)
    push.add_argument("checkpoint", metavar="CHECKPOINT", help="directory")
    push.add_argument("repo_id", metavar="USER/REPO", help="created if need be")
    push.add_argument("--private", action="store_true", default=None, help="only you can see a new repository")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if need be (default: main)")
    push.add_argument("--commit-message", help="default: Upload DeViL checkpoint")
    kind = push.add_mutually_exclusive_group()
    kind.add_argument("--slim", action="store_true", default=None, help="the translator, and the sources of the rest")
    kind.add_argument("--self-contained", dest="slim", action="store_false", help="all weights (default: as it is)")
    push.add_argument("--images", nargs="+", metavar="IMAGE", help="examples for the card, published too")
    push.add_argument("--phrases", nargs="+", default=[], help="words to map (default: what the model says)")
    push.add_argument("--scores", nargs="+", default=[], type=Path, metavar="FILE", help="JSON results of evaluations")
    push.add_argument("--license", help="identifier of the Hub, such as apache-2.0 (default: unknown)")
    push.add_argument("--datasets", nargs="+", default=[], metavar="ID", help="Hub ids of the training data")
    push.add_argument("--data", help="the training data in words")
    push.add_argument("--language", default="en", help="of the descriptions (default: %(default)s)")
    push.add_argument("--space", metavar="USER/SPACE", help="also publish the demo, with this checkpoint")
    push.add_argument("--dry-run", action="store_true", help="show files and card, and send nothing")
    push.add_argument("--output-dir", type=Path, help="with --dry-run: keep the files here, to look at the pictures")
    push.add_argument("--json", action="store_true", help="print JSON")

    example = "devil space user/devil-demo --checkpoint user/devil-shapes"
    space = add_verb(verbs, "space", run_space, "publish the demo as a Space of the Hub", example)
    space.add_argument("space_id", metavar="USER/SPACE", help="created if need be")
    space.add_argument("--checkpoint", metavar="USER/REPO", help="Hub id (default: the embedded shapes world)")
    space.add_argument("--private", action="store_true", default=None, help="only you can see a new Space")
    space.add_argument("--commit-message", help="default: Upload DeViL demo")
    space.add_argument("--dry-run", action="store_true", help="show files and card, and send nothing")
    space.add_argument("--json", action="store_true", help="print JSON")

    demo = add_verb(
        verbs,
        "demo",
        run_demo,
        "explore a checkpoint in the browser, by clicking into images",
        "devil demo --port 7860",
    )
    demo.add_argument(
        "--checkpoint", help="directory or Hub id (default: DEVIL_CHECKPOINT, else the shapes-world checkpoint)"
    )
    demo.add_argument("--device", help="default: cuda where there is one")
    demo.add_argument("--host", help="address to listen on (default: this machine alone)")
    demo.add_argument("--port", type=int, help="default: the first free one from 7860 on")

    example = "devil train --config scripts/recipes/flickr8k_small.yaml --output_dir runs/flickr8k"
    train = add_verb(verbs, "train", run_train, "train a translator between your backbone and language model", example)
    if full:
        from devil_hf.settings import add_options
        from devil_hf.training.recipe import Recipe

        add_options(train, Recipe)
    return parser


def _add_neurons(verbs) -> None:
    example = "devil neurons photos/ --output-dir atlas --checkpoint user/devil-resnet50-opt125m --layers layer4"
    neurons = add_verb(
        verbs, "neurons", run_neurons, "name every unit of a network, check the names, write an atlas", example
    )
    neurons.add_argument(
        "images",
        nargs="?",
        help="folder of images, caption folder, Hub data set, or shapes:COUNT; not needed to describe or for the atlas alone",
    )
    _question(neurons)
    neurons.add_argument("--output-dir", type=Path, default=Path("devil-neurons"), help="default: %(default)s")
    neurons.add_argument("--stage", choices=("exemplars", "describe", "check", "atlas", "all"), default="all")
    neurons.add_argument("--network", help="id or directory of the network (default: the checkpoint's own backbone)")
    neurons.add_argument("--directions", type=Path, help="safetensors or npy file of directions of one layer, as units")
    neurons.add_argument("--tensor", help="name of the tensor in that file, such as W_dec")
    neurons.add_argument("--split", help="of a caption folder or data set")
    neurons.add_argument("--limit", type=int, help="only this many images")
    neurons.add_argument("--exemplars", type=int, default=15, metavar="K", help="per unit (default: %(default)s)")
    neurons.add_argument("--quantile", type=float, default=0.99, help="of the masks (default: %(default)s)")
    neurons.add_argument("--held-out", type=int, default=5, metavar="N", help="check on every N-th image (default: 5)")
    neurons.add_argument("--check-images", help="check on these images instead")
    neurons.add_argument(
        "--mode",
        choices=("pixels", "features"),
        help="re-encode the exemplars by the checkpoint's backbone, or take the unit's own features (default, where possible)",
    )
    neurons.add_argument("--strategy", choices=("greedy", "beam", "rerank", "words"), default="rerank")
    neurons.add_argument("--candidates", type=int, default=5, help="beams to choose from (default: %(default)s)")
    neurons.add_argument("--prior-weight", type=float, default=0.2, help="of the null prefix in rerank (default: 0.2)")
    neurons.add_argument("--words", type=Path, help='file of words, one a line, that --strategy "words" chooses from')
    neurons.add_argument("--permutations", type=int, default=2_000, help="of the check (default: %(default)s)")
    neurons.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    neurons.add_argument(
        "--workers", type=int, default=0, help="processes that read images ahead (default: %(default)s)"
    )


def _question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", help="directory or Hub id (default: the shapes-world checkpoint of the package)"
    )
    parser.add_argument("--layers", nargs="+", help="names or indices of layers (default: every one)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print JSON")


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
    from devil_hf.cli.quickstart import quickstart

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
    from devil_hf.settings import from_namespace
    from devil_hf.training.recipe import Recipe
    from devil_hf.training.run import train

    logging.set_verbosity_warning()  # skipped images are named there
    print(f"checkpoint: {train(from_namespace(Recipe, arguments))}")


def run_push(arguments: argparse.Namespace) -> None:
    from devil_hf.hub.publish import prepare, push
    from devil_hf.hub.spaces import prepare_space, push_space

    if arguments.space:
        with tempfile.TemporaryDirectory() as folder:
            prepare_space(arguments.space, folder, arguments.repo_id)  # its errors come before anything is public
    if arguments.output_dir and not arguments.dry_run:
        raise ValueError("--output-dir keeps the files of a --dry-run: give both, or neither")
    names = ("revision", "slim", "images", "phrases", "scores", "license", "datasets", "data", "language")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            draft = prepare(arguments.checkpoint, arguments.repo_id, arguments.output_dir or folder, **options)
            tree, card = draft.tree(), str(draft.card)
        if arguments.space:
            draft.notes.append(
                f"`devil space {arguments.space} --checkpoint {arguments.repo_id} --dry-run` shows the Space"
            )
        if arguments.json:
            print(json.dumps({"files": tree, "card": card, "notes": draft.notes}))
            return
        print(_listing(tree, card))
        print("\n".join(f"note: {note}" for note in draft.notes), file=sys.stderr)
        return
    options |= {"private": arguments.private, "commit_message": arguments.commit_message}
    urls = {"commit": push(arguments.checkpoint, arguments.repo_id, **options)}
    if arguments.space:
        space = {"private": arguments.private, "commit_message": arguments.commit_message}
        urls["space"] = push_space(arguments.space, arguments.repo_id, **space)
    print(json.dumps({"repo_id": arguments.repo_id} | urls) if arguments.json else "\n".join(urls.values()))


def run_space(arguments: argparse.Namespace) -> None:
    from devil_hf.hub.spaces import prepare_space, push_space

    if arguments.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            draft = prepare_space(arguments.space_id, folder, arguments.checkpoint)
            tree, card = draft.tree(), str(draft.card)
        print(json.dumps({"files": tree, "card": card}) if arguments.json else _listing(tree, card))
        return
    options = {name: getattr(arguments, name) for name in ("private", "commit_message")}
    url = push_space(arguments.space_id, arguments.checkpoint, **options)
    print(json.dumps({"space_id": arguments.space_id, "url": url}) if arguments.json else url)


def _listing(tree: dict[str, int], card: str) -> str:
    files = "\n".join(f"{size:>13,}  {path}" for path, size in tree.items())
    return f"{files}\n{sum(tree.values()):>13,}  bytes in {len(tree)} files; nothing was sent\n\n{card}"


def run_demo(arguments: argparse.Namespace) -> None:
    from devil_hf.demo.app import launch

    launch(arguments.checkpoint, arguments.device, arguments.host, arguments.port)


def run_describe(arguments: argparse.Namespace) -> None:
    locations = _locations(arguments.locations)
    from devil_hf.checkpoints.loading import load
    from devil_hf.model.image_processing_devil import load_images

    images = [image for path in arguments.images for image in load_images(path)]
    model, processor = load(arguments.checkpoint, arguments.device)
    state_scope(model)
    if arguments.grounded:
        _describe_grounded(arguments, images, model, processor)
        return
    output = model.describe(
        **processor(images=images, return_tensors="pt"),
        layers=read_layers(arguments.layers, model.layer_names),
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


def _describe_grounded(arguments: argparse.Namespace, images, model, processor) -> None:
    """One description per image, with the evidence of each phrase in nats."""
    unset = {"locations": None, "window": 1, "evidence": False, "output": None}
    for name, value in unset.items():
        if getattr(arguments, name) != value:
            raise ValueError(f"--grounded describes whole images, phrase by phrase: leave out --{name}")
    if arguments.guidance != 1.0:
        raise ValueError(f"--grounded weighs the places instead: leave out --guidance {arguments.guidance}")
    from devil_hf.questions.grounding import CANDIDATES, describe_grounded

    found = describe_grounded(
        model,
        processor,
        **processor(images=images, return_tensors="pt"),
        layers=read_layers(arguments.layers, model.layer_names),
        candidates=arguments.num_beams if arguments.num_beams > 1 else CANDIDATES,
        max_new_tokens=arguments.max_new_tokens,
    )
    if arguments.json:
        rows = zip(arguments.images, found, strict=True)
        print(json.dumps([{"image": image, **dataclasses.asdict(description)} for image, description in rows]))
        return
    for image, description in zip(arguments.images, found, strict=True):
        print(f"{image}: {description.text}")
        print("    " + "  ".join(f"{phrase.text} {phrase.evidence:+.1f}" for phrase in description.phrases))


def run_attribute(arguments: argparse.Namespace) -> None:
    from devil_hf.checkpoints.loading import load
    from devil_hf.model.image_processing_devil import load_images
    from devil_hf.report.figures import attribution_figure

    (image,) = load_images(arguments.image)
    model, processor = load(arguments.checkpoint, arguments.device)
    state_scope(model)
    output = model.attribute(
        **processor(images=image, return_tensors="pt"),
        phrases=processor(text=arguments.phrases, carrier=arguments.carrier, return_tensors="pt"),
        layers=read_layers(arguments.layers, model.layer_names),
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


def run_neurons(arguments: argparse.Namespace) -> None:
    from devil_hf.checkpoints.loading import load
    from devil_hf.data.directions import read_directions
    from devil_hf.report.neurons import NeuronsArguments, neurons

    words = None
    if arguments.words:
        words = [line.strip() for line in arguments.words.read_text().splitlines() if line.strip()]
    settings = NeuronsArguments(
        output_dir=arguments.output_dir,
        images=arguments.images,
        stage=arguments.stage,
        network=arguments.network,
        split=arguments.split,
        limit=arguments.limit,
        k=arguments.exemplars,
        quantile=arguments.quantile,
        held_out=0 if arguments.check_images else arguments.held_out,
        check_images=arguments.check_images,
        mode=arguments.mode,
        strategy=arguments.strategy,
        candidates=arguments.candidates,
        prior_weight=arguments.prior_weight,
        words=words,
        permutations=arguments.permutations,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    settings.validate()
    model, processor = load(arguments.checkpoint, arguments.device)
    state_scope(model)
    settings.layers = read_layers(arguments.layers, [] if arguments.network else model.layer_names)
    if arguments.directions:
        if not arguments.layers or len(arguments.layers) != 1 or arguments.network:
            raise ValueError("directions belong to one layer of the checkpoint's backbone: name it by --layers")
        from devil_hf.model.backbone_devil import resolve_layers

        (at,) = resolve_layers(settings.layers, model.layer_names)
        name = model.layer_names[at]
        settings.directions = {
            name: read_directions(arguments.directions, model.backbone.channels[at], arguments.tensor)
        }
        settings.channels = False
    summary = neurons(settings, model, processor)
    if arguments.json:
        print(json.dumps(summary))
        return
    for name, value in summary.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
