"""`devil neurons`: a name for every unit of a network, a check of the names, and an atlas."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from devil_hf.cli.verb import VERBS, LayerSettings, Verb, read_layers, show, state_scope
from devil_hf.settings import option


@dataclass(kw_only=True)
class NeuronsSettings(LayerSettings):
    """Which units, and how they are named and checked."""

    images: str | None = option(
        "folder of images, caption folder, Hub data set, or shapes:COUNT; not needed to describe or for the atlas alone",
        None,
        positional=True,
    )
    output_dir: Path = option("of exemplars, labels, checks and atlas", Path("devil-neurons"))
    stage: Literal["exemplars", "describe", "check", "atlas", "all"] = option("what to do", "all")
    network: str | None = option("id or directory of the network (default: the checkpoint's own backbone)", None)
    directions: Path | None = option("safetensors or npy file of directions of one layer, as units", None)
    tensor: str | None = option("name of the tensor in that file, such as W_dec", None)
    split: str | None = option("of a caption folder or data set", None)
    limit: int | None = option("only this many images", None)
    exemplars: int = option("per unit", 15, metavar="K")
    quantile: float = option("of the masks", 0.99)
    held_out: int = option("check on every N-th image", 5, metavar="N")
    check_images: str | None = option("check on these images instead", None)
    mode: Literal["pixels", "features"] | None = option(
        "re-encode the exemplars by the checkpoint's backbone, or take the unit's own features (default, where possible)",
        None,
    )
    strategy: Literal["greedy", "beam", "rerank", "words"] = option("how a label is chosen", "rerank")
    candidates: int = option("beams to choose from", 5)
    prior_weight: float = option("of the null prefix in rerank", 0.2)
    words: Path | None = option('file of words, one a line, that --strategy "words" chooses from', None)
    permutations: int = option("of the check", 2_000)
    batch_size: int = option("images at once", 32)
    workers: int = option("processes that read images ahead", 0)


def run_neurons(arguments: NeuronsSettings) -> None:
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
        from devil_hf.model.pooling_devil import resolve_layers

        (at,) = resolve_layers(settings.layers, model.layer_names)
        name = model.layer_names[at]
        settings.directions = {
            name: read_directions(arguments.directions, model.backbone.channels[at], arguments.tensor)
        }
        settings.channels = False
    summary = neurons(settings, model, processor)
    show(arguments, summary, "\n".join(f"{name}: {value}" for name, value in summary.items()))


VERBS.register(
    "neurons",
    Verb(
        "neurons",
        "name every unit of a network, check the names, write an atlas",
        "devil neurons photos/ --output-dir atlas --checkpoint user/devil-resnet50-opt125m --layers layer4",
        lambda: NeuronsSettings,
        run_neurons,
    ),
)
