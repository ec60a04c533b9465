"""`devil neurons`: name every unit of a network, and check the names.

Four stages, each of which leaves its result in the output folder, where the next one finds it: `exemplars/` (see
`data/exemplars.py`), `labels.json`, `checks.json`, and `atlas/` (see `report/atlas.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor

from devil_hf.data.exemplars import ExemplarSet, UnitReader, find_exemplars, open_network
from devil_hf.data.images import ImageStream, open_images
from devil_hf.data.unit_features import MODES, pool_units
from devil_hf.evaluation.units.labels import STRATEGIES, label_units
from devil_hf.evaluation.units.simulation import (
    check_constant,
    check_labels,
    check_shuffled,
    check_summary,
    held_out_activations,
    held_out_evidence,
)
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.atlas import write_atlas

STAGES = ("exemplars", "describe", "check", "atlas", "all")


@dataclass
class NeuronsArguments:
    """What `devil neurons` does.

    Args:
        output_dir: folder of all results.
        images: where exemplars are looked for, see `open_images`.
        stage: one of `STAGES`.
        network: timm or transformers id, local directory or module whose units are named; None for the translator's backbone.
        layers: of the network; None for the translator's, or the network's stages.
        directions: linear read-outs (M, C) by layer, which become units.
        direction_biases: (M,) by layer.
        direction_names: M names by layer, for the atlas.
        channels: whether channels are units, too.
        split, column, limit: of the images.
        k, quantile: exemplars per unit, and the quantile of the masks.
        held_out: every n-th image is kept from the exemplars, for the check; 0 where `check_images` are other images.
        check_images: images for the check.
        mode: "pixels" or "features"; None takes "features" where it is possible.
        strategy, candidates, prior_weight, words: see `label_units`.
        carrier: neutral word before words and labels that are scored.
        permutations, alpha, seed: of the check.
    """

    output_dir: str | PathLike
    images: Any = None
    stage: str = "all"
    network: Any = None
    layers: str | int | Sequence[str | int] | None = None
    directions: Mapping[str, Tensor] | None = None
    direction_biases: Mapping[str, Tensor] | None = None
    direction_names: Mapping[str, Sequence[str]] | None = None
    channels: bool = True
    split: str | None = None
    column: str = "image"
    limit: int | None = None
    k: int = 15
    quantile: float = 0.99
    held_out: int = 5
    check_images: Any = None
    mode: str | None = None
    strategy: str = "rerank"
    candidates: int = 5
    prior_weight: float = 0.2
    words: Sequence[str] | None = None
    carrier: str | None = None
    permutations: int = 2_000
    alpha: float = 0.05
    batch_size: int = 32
    workers: int = 0
    seed: int = 0

    def validate(self) -> None:
        """Raise a clear error for what can be seen to be wrong before anything is computed."""
        for value, name, known in (
            (self.stage, "stage", STAGES),
            (self.mode or MODES[0], "mode", MODES),
            (self.strategy, "strategy", STRATEGIES),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {known}")
        if self.stage in ("exemplars", "check", "all") and self.images is None:
            raise ValueError("there are no images: name a folder, a data set, or shapes:COUNT for scenes")
        if self.held_out == 1 or self.held_out < 0:
            raise ValueError(
                f"held_out={self.held_out}: keep every n-th image from the exemplars, n of 2 or more, or 0"
            )
        if self.stage in ("check", "all") and not self.held_out and self.check_images is None:
            raise ValueError("labels are checked on images without exemplars: set held_out, or name check_images")
        if (self.strategy == "words") != bool(self.words):
            raise ValueError('the strategy "words", and it alone, needs words to choose from')


def neurons(arguments: NeuronsArguments, model: DevilModel, processor: DevilProcessor) -> dict:
    """Run a stage, or all of them.

    Returns:
        A summary: the folders, numbers of units and images, and the summary of the check beside its two controls.
    """
    arguments.validate()
    folder = Path(arguments.output_dir)
    stages = STAGES[:-1] if arguments.stage == "all" else (arguments.stage,)
    summary: dict[str, Any] = {"output": str(folder)}
    if PartialState().num_processes > 1:
        model.to(PartialState().device)
    reader, reading = None, None
    if {"exemplars", "check"} & set(stages):
        reader, reading = _reader(arguments, model, processor)
    if "exemplars" in stages:
        images, _ = _images(arguments)
        find_exemplars(
            reader,  # type: ignore[arg-type]
            reading,  # type: ignore[arg-type]
            images,
            folder / "exemplars",
            arguments.k,
            arguments.quantile,
            arguments.batch_size,
            workers=arguments.workers,
        )
    exemplars = ExemplarSet(folder / "exemplars")
    if not PartialState().is_main_process:  # several processes share the pass over the images alone
        return summary
    summary |= {"units": len(exemplars), "images": exemplars.summary["images"], "layers": exemplars.layers}
    if "describe" in stages:
        _describe(arguments, model, processor, exemplars, folder)
    if "check" in stages:
        _check(arguments, model, processor, reader, reading, folder)
    if "atlas" in stages:
        labels = _read(folder / "labels.json", "describe")
        checks = json.loads((folder / "checks.json").read_text()) if (folder / "checks.json").is_file() else None
        if checks is not None and checks["labels"] != [row["label"] for row in labels["units"]]:
            raise ValueError(
                f"{folder / 'checks.json'} checks other labels than labels.json holds: run the check again"
            )
        network = Path(str(exemplars.summary["network"])).name
        title = f"{', '.join(exemplars.layers)} of {network if network != 'None' else 'the network'}"
        page = write_atlas(
            exemplars,
            labels["units"],
            folder / "atlas",
            None if checks is None else checks["units"],
            {"title": title, "labels": labels["settings"], **({} if checks is None else {"check": checks["summary"]})},
            arguments.direction_names,
        )
        summary["atlas"] = str(page)
    for name in ("labels", "checks"):
        if (folder / f"{name}.json").is_file():
            content = json.loads((folder / f"{name}.json").read_text())
            summary[name] = content["settings"] if name == "labels" else content["summary"]
    return summary


def _images(arguments: NeuronsArguments) -> tuple[ImageStream, ImageStream]:
    """Images for exemplars, and others for the check."""
    images = open_images(arguments.images, arguments.split, arguments.column, arguments.limit)
    kept, held = images.split(arguments.held_out) if arguments.held_out else (images, images)
    if arguments.check_images is not None:
        held = open_images(arguments.check_images, arguments.split, arguments.column)
    return kept, held


def _reader(arguments: NeuronsArguments, model: DevilModel, processor: DevilProcessor):
    """The network's units, and its preprocessing."""
    backbone, reading = model.backbone, processor.image_processor
    layers = arguments.layers
    if arguments.network is not None:
        device = next(model.backbone.parameters()).device
        backbone, reading = open_network(arguments.network, arguments.layers, device)
        layers = None
    return UnitReader(backbone, arguments.directions, arguments.direction_biases, arguments.channels, layers), reading


def _describe(
    arguments: NeuronsArguments, model: DevilModel, processor: DevilProcessor, exemplars, folder: Path
) -> None:
    mode = arguments.mode
    if mode is None:
        same = exemplars.summary["weights_sha256"].partition("+")[0] == model.backbone.config["sha256"]
        mode = "features" if same and set(exemplars.layers) <= set(model.layer_names) else "pixels"
    settings = {"mode": mode, "strategy": arguments.strategy}
    if arguments.strategy == "rerank":
        settings |= {"prior_weight": arguments.prior_weight}  # type: ignore[dict-item]
    rows = label_units(
        model,
        processor,
        pool_units(model, processor, exemplars, mode),
        arguments.strategy,
        arguments.candidates,
        arguments.prior_weight,
        arguments.words,
        arguments.carrier,
    )
    _write({"settings": settings, "units": rows}, folder / "labels.json")


def _check(
    arguments: NeuronsArguments,
    model: DevilModel,
    processor: DevilProcessor,
    reader: UnitReader | None,
    reading: DevilImageProcessor | None,
    folder: Path,
) -> None:
    rows = _read(folder / "labels.json", "describe")["units"]
    kept, images = _images(arguments)
    _check_origin(arguments, reader, kept, folder)  # type: ignore[arg-type]
    unit_labels = [row["label"] for row in rows]
    labels = sorted({label for label in unit_labels if label})
    activations = held_out_activations(reader, reading, images, arguments.batch_size)  # type: ignore[arg-type]
    evidence = held_out_evidence(model, processor, images, labels, arguments.batch_size, arguments.carrier)
    if activations.shape[1] != evidence.shape[1] or len(activations) != len(rows):
        raise ValueError(
            f"{tuple(activations.shape)} activations do not fit {evidence.shape[1]} images and {len(rows)} labels: "
            "some images cannot be read, or layers differ from those of the exemplars"
        )
    save_file(
        {"activations": activations, "evidence": evidence},
        folder / "held_out.safetensors",
        {"labels": json.dumps(labels)},
    )
    options: dict[str, Any] = {
        "permutations": arguments.permutations,
        "alpha": arguments.alpha,
        "seed": arguments.seed,
    }
    checks = check_labels(activations, evidence, labels, unit_labels, **options)
    summary = {
        "images": activations.shape[1],
        "alpha": arguments.alpha,
        "permutations": arguments.permutations,
        "labels": check_summary(checks),
        "constant label": check_constant(activations, evidence, labels, unit_labels, **options),
        "shuffled labels": check_shuffled(activations, evidence, labels, unit_labels, **options),
    }
    _write({"summary": summary, "labels": unit_labels, "units": checks}, folder / "checks.json")


def _check_origin(arguments: NeuronsArguments, reader: UnitReader, kept: ImageStream, folder: Path) -> None:
    """Make sure that the exemplars are of the same units, and not of images that the check sees."""
    found = ExemplarSet(folder / "exemplars").summary
    asked = {"weights_sha256": reader.fingerprint, "layers": reader.layers}
    if arguments.check_images is None:
        asked["source"] = kept.name  # holds limit and split, and which images are held out
    different = [
        f"{name} is {found[name]!r}, asked for {value!r}" for name, value in asked.items() if found[name] != value
    ]
    if different:
        raise ValueError(
            f"the exemplars in {folder} cannot be checked like this: {'; '.join(different)}. Name the same images, held_out, "
            "limit, split, network and layers as for the exemplars, or check on other images (check_images)"
        )


def _read(file: Path, stage: str) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: run the stage {stage!r} first")
    return json.loads(file.read_text())


def _write(content: dict, file: Path) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
