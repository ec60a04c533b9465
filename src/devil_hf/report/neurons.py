"""`devil neurons`: name every unit of a network, and check the names.

Four stages, each of which leaves its result in the output folder, where the next one finds it: `exemplars/` (see
`data/exemplars.py`), `labels.json`, `checks.json`, and `atlas/` (see `report/atlas.py`).
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from devil_hf.checkpoints.identity import known_by, preprocessing_of
from devil_hf.checkpoints.loading import open_checkpoint
from devil_hf.checkpoints.quantised import RoundedDevilModel
from devil_hf.data.directions import read_directions
from devil_hf.data.exemplar_set import ExemplarSet
from devil_hf.data.exemplars import find_exemplars
from devil_hf.data.images import ImageStream, open_images
from devil_hf.data.unit_features import pool_units
from devil_hf.data.unit_reader import UnitReader, open_network
from devil_hf.data.worlds import usual_checkpoint
from devil_hf.evaluation.unit_check import CheckSettings, check_all
from devil_hf.evaluation.units.labels import LabelSettings, label_units
from devil_hf.evaluation.units.simulation import held_out_activations, held_out_evidence
from devil_hf.folders import claimed, write_json, written
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import resolve_layer
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.atlas import write_atlas
from devil_hf.settings import LayerSettings, checked, option, read_layers
from devil_hf.text_files import read_json, text_lines

logger = logging.get_logger(f"transformers.{__name__}")

Stage = Literal["exemplars", "describe", "check", "atlas", "all"]
STAGES = get_args(Stage)


@dataclass(kw_only=True)
class NeuronsSettings(LayerSettings, LabelSettings, CheckSettings):
    """Which units, and how they are named and checked."""

    images: str | None = option(
        "folder of images, caption folder, Hub data set, or shapes:COUNT; not needed to describe or for the atlas alone",
        None,
        positional=True,
    )
    output_dir: Path = option("of exemplars, labels, checks and atlas", Path("devil-neurons"))
    stage: Stage = option("what to do; each stage goes on from the folder of the one before", "all")
    directions: Path | None = option("safetensors or npy file of directions of one layer, as units", None)
    tensor: str | None = option("name of the tensor in that file, such as W_dec", None)
    direction_names: Path | None = option("file of names of the directions, one a line, for the atlas", None)
    channels: bool = option("beside directions, channels are units, too", False)
    limit: int | None = option("only this many images", None, least=1)
    exemplars: int = option("per unit", 15, metavar="K", least=1)
    quantile: float = option("of the masks", 0.99)
    held_out: int = option("check on every N-th image, which is kept from the exemplars", 5)
    check_images: str | None = option("check on these images instead", None)
    mode: Literal["pixels", "features"] | None = option(
        "re-encode the exemplars by the checkpoint's backbone, or take the unit's own features (default, where possible)", None
    )
    batch_size: int = option("images at once", 32, least=1)
    workers: int = option("processes that read images ahead", 0, least=0)

    def validate(self) -> None:
        """Raise a ValueError for what can be seen to be wrong before anything is computed."""
        super().validate()
        CheckSettings.validate(self)
        if self.held_out == 1 or self.held_out < 0:
            raise ValueError(f"held_out={self.held_out}: keep every n-th image from the exemplars, n of 2 or more, or 0")
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile={self.quantile} must lie between 0 and 1, such as 0.99")
        if self.directions and (self.network or len(self.layers or ()) != 1):
            raise ValueError("directions belong to one layer of the checkpoint's backbone: name it by --layers")

    @property
    def stages(self) -> tuple[str, ...]:
        """What there is to do, in its order."""
        return STAGES[:-1] if self.stage == "all" else (self.stage,)


@dataclass
class Objects:
    """What a Python user has at hand instead of naming it in the settings.

    Args:
        images, check_images: PIL images, or whatever `open_images` takes.
        network: module whose units are named.
        directions: linear read-outs (M, C) by layer, which become units; with `channels` of the settings, beside them.
        direction_biases: (M,) by layer.
        direction_names: M names by layer, for the atlas.
    """

    images: Any = None
    check_images: Any = None
    network: Any = None
    directions: Mapping[str, Tensor] | None = None
    direction_biases: Mapping[str, Tensor] | None = None
    direction_names: Mapping[str, Sequence[str]] | None = None


def neurons(
    settings: NeuronsSettings, model: DevilModel | None = None, processor: DevilProcessor | None = None, **objects: Any
) -> dict[str, Any]:
    """Run a stage, or all of them.

    Args:
        model, processor: instead of loading `settings.checkpoint`.
        objects: what `Objects` holds, instead of the settings of the same names.

    Returns:
        A summary: the folders, numbers of units and images, and the summary of the check beside its two controls.
    """
    settings = checked(settings)
    state = PartialState(cpu=settings.device == "cpu" or settings.quantize is not None)  # for all that ask for it later
    with claimed(settings.output_dir, "devil neurons", state.is_main_process):
        return _run_stages(_Run(settings, Objects(**objects), model, processor))


def _run_stages(run: "_Run") -> dict[str, Any]:
    if {"exemplars", "check"} & set(run.settings.stages):
        run.open_reader()
    summary: dict[str, Any] = {"output": str(run.folder)}
    if "exemplars" in run.settings.stages:
        run.find_exemplars()
    exemplars = ExemplarSet(run.folder / "exemplars")
    if not PartialState().is_main_process:  # several processes share the pass over the images alone
        return summary
    summary |= {"units": len(exemplars), "images": exemplars.summary["images"], "layers": exemplars.layers}
    if "describe" in run.settings.stages:
        run.describe(exemplars)
    if "check" in run.settings.stages:
        run.check()
    if "atlas" in run.settings.stages:
        summary["atlas"] = str(run.write_atlas(exemplars))
    for name in ("labels", "checks"):
        if (run.folder / f"{name}.json").is_file():
            content = read_json(run.folder / f"{name}.json")
            summary[name] = content["settings"] if name == "labels" else content["summary"]
    return summary


class _Run:
    """The stages, and what they share: the model, the units' reader and the preprocessing of their network."""

    reader: UnitReader
    reading: DevilImageProcessor

    def __init__(self, settings: NeuronsSettings, objects: Objects, model: DevilModel | None, processor: DevilProcessor | None):
        self.settings, self.objects, self.folder = settings, objects, settings.output_dir
        self.source = settings.images if objects.images is None else objects.images
        self.check_source = settings.check_images if objects.check_images is None else objects.check_images
        self.held_out = settings.held_out if self.check_source is None else 0
        if self.source is None and settings.stage in ("exemplars", "check", "all"):
            raise ValueError("there are no images: name a folder, a data set, or shapes:COUNT for scenes")
        if self.check_source is None and not self.held_out and settings.stage in ("check", "all"):
            raise ValueError("labels are checked on images without exemplars: set held_out, or name check_images")
        if model is None or processor is None:
            usual = usual_checkpoint(settings.images or "")
            model, processor = open_checkpoint(settings.checkpoint or usual, settings.device, settings.quantize)
        if PartialState().num_processes > 1:
            model.to(PartialState().device)
        self.model, self.processor = model, processor

    @functools.cached_property
    def known(self) -> dict[str, Any]:
        """What the model and its processor are known by; of all weights, so that it takes its time."""
        return known_by(self.model, self.processor)

    def reading_of_texts(self) -> dict[str, str]:
        """How the model was rounded, and what stood before the texts, for a record; empty for neither."""
        rounded = {"quantize": "int8"} if isinstance(self.model, RoundedDevilModel) else {}
        return rounded | ({"carrier": self.settings.carrier} if self.settings.carrier else {})

    def images(self) -> tuple[ImageStream, ImageStream]:
        """Images for exemplars, and others for the check."""
        settings = self.settings
        images = open_images(self.source, settings.split, settings.column, settings.limit)
        kept, held = images.split(self.held_out) if self.held_out else (images, images)
        if self.check_source is not None:
            held = open_images(self.check_source, settings.split, settings.column)
        return kept, held

    def open_reader(self) -> None:
        """The network's units, and its preprocessing."""
        network = self.settings.network if self.objects.network is None else self.objects.network
        layers = read_layers(self.settings.layers, [] if network is not None else self.model.layer_names)
        backbone, self.reading = self.model.backbone, self.processor.image_processor
        if network is not None:
            backbone, self.reading = open_network(network, layers, next(self.model.backbone.parameters()).device)
            layers = None
        directions = self.objects.directions
        if self.settings.directions:
            at = resolve_layer(layers[0], self.model.layer_names)  # type: ignore[index]
            read = read_directions(self.settings.directions, backbone.channels[at], self.settings.tensor)
            directions = {self.model.layer_names[at]: read}
        channels = self.settings.channels or not directions
        self.reader = UnitReader(backbone, directions, self.objects.direction_biases, channels, layers)

    def find_exemplars(self) -> None:
        """The stage "exemplars"."""
        settings = self.settings
        find_exemplars(
            self.reader,
            self.reading,
            self.images()[0],
            self.folder / "exemplars",
            settings.exemplars,
            settings.quantile,
            settings.batch_size,
            workers=settings.workers,
        )

    def describe(self, exemplars: ExemplarSet) -> None:
        """The stage "describe": labels.json."""
        mode = self.settings.mode
        if mode is None:
            theirs, ours = exemplars.summary, preprocessing_of(self.processor.image_processor)
            same = theirs["weights_sha256"].partition("+")[0] == self.model.backbone.config["sha256"]
            same = same and set(exemplars.layers) <= set(self.model.layer_names)
            mode = "features" if same and theirs.get("preprocessing") == ours else "pixels"
            if same and mode == "pixels":
                logger.warning(
                    f"the exemplars in {exemplars.folder} are of another preprocessing than the checkpoint's, or of a version "
                    'that does not say all of it: they are encoded again (mode "pixels"); name the mode "features" to take theirs'
                )
        noted: dict[str, Any] = {"mode": mode, "strategy": self.settings.strategy}
        if self.settings.strategy == "rerank":
            noted |= {"prior_weight": self.settings.prior_weight}
        noted |= self.reading_of_texts()
        pooled = pool_units(self.model, self.processor, exemplars, mode)
        rows = label_units(self.model, self.processor, pooled, **self.settings.choice())
        of = {"exemplars": _digest(exemplars)} | self.known
        write_json(self.folder / "labels.json", {"settings": noted, "of": of, "units": rows})

    def check(self) -> None:
        """The stage "check": checks.json, and the numbers that it comes from."""
        settings = self.settings
        found = self.labels(ExemplarSet(self.folder / "exemplars"))
        self.check_model(found)
        rows = found["units"]
        kept, images = self.images()
        self.check_origin(kept)
        unit_labels = [row["label"] for row in rows]
        labels = sorted({label for label in unit_labels if label})
        if not labels:
            raise ValueError(f"no unit in {self.folder / 'labels.json'} has a label to check: go on with the stage 'atlas'")
        activations = held_out_activations(self.reader, self.reading, images, settings.batch_size)
        evidence = held_out_evidence(self.model, self.processor, images, labels, settings.batch_size, settings.carrier)
        outcome = check_all(activations, evidence, labels, unit_labels, **settings.check())
        content = {"activations": activations, "evidence": evidence}
        with written(self.folder / "held_out.safetensors") as unfinished:
            save_file(content, unfinished, {"labels": json.dumps(labels)})
        summaries = outcome["summaries"]
        summary = {
            "images": activations.shape[1],
            "alpha": settings.alpha,
            "permutations": settings.permutations,
            "labels": summaries["labels"],
            "constant label": {"label": outcome["texts"]["constant"], **summaries["constant"]},
        }
        if "shuffled" in summaries:  # of one label there is no other unit to deal it to
            summary["shuffled labels"] = summaries["shuffled"]
        record = {"summary": summary, "of": found["of"], "labels": unit_labels, "units": outcome["units"]}
        write_json(self.folder / "checks.json", record)

    def labels(self, exemplars: ExemplarSet) -> dict[str, Any]:
        """What labels.json holds, which must be of these exemplars."""
        file = self.folder / "labels.json"
        labels = _read(file, "describe")
        if labels.get("of", {}).get("exemplars") != _digest(exemplars):
            raise ValueError(f"{file} holds labels of other exemplars than {exemplars.folder}: run the stage 'describe' again")
        return labels

    def check_model(self, labels: Mapping[str, Any]) -> None:
        """Make sure that labels, and their evidence in the atlas, are of the model that checks them, and read as it reads."""
        before, now = labels["settings"], self.reading_of_texts()
        changed = [name for name in ("quantize", "carrier") if before.get(name) != now.get(name)]
        other = [
            f"was made with {name}={before[name]!r}, not {now.get(name)!r}"
            if name in before
            else f"does not say with which {name} it was made, and {now[name]!r} is asked for"
            for name in changed
        ]
        of = labels["of"]
        if not other and of.get("weights") != self.known["weights"]:
            other = ["was made by a model of other weights"]
        if not other:
            reading = self.known["reading"].items()
            changed = [name for name, value in reading if of.get("reading", {}).get(name) != value]
            other = [f"was made with other {' and '.join(changed)} of the model and its processor"] if changed else []
        if other:
            raise ValueError(
                f"{self.folder / 'labels.json'} {' and '.join(other)}: check with the same, run the stage 'describe' again, or "
                "judge these labels by this model with `devil evaluate units`"
            )

    def check_origin(self, kept: ImageStream) -> None:
        """Make sure that the exemplars are of the same units, and not of images that the check sees."""
        found = ExemplarSet(self.folder / "exemplars").summary
        asked: dict[str, Any] = {"layers": self.reader.layers} | self.reader.known(self.reading)
        if self.check_source is None:
            asked["source"] = kept.name  # holds limit and split, and which images are held out
            asked["images_sha256"] = kept.identity
        other = [name for name, value in asked.items() if found.get(name) != value]
        different = [f"{name} is {found.get(name)!r}, asked for {asked[name]!r}" for name in other]
        if different:
            raise ValueError(
                f"the exemplars in {self.folder} cannot be checked like this: {'; '.join(different)}. Name the same images, "
                "held_out, limit, split, network and layers as for the exemplars, with the same preprocessing, or check on other "
                "images (check_images)"
            )

    def write_atlas(self, exemplars: ExemplarSet) -> Path:
        """The stage "atlas"; returns its page."""
        labels = self.labels(exemplars)
        checks = _read(self.folder / "checks.json", "check") if (self.folder / "checks.json").is_file() else None
        own = [row["label"] for row in labels["units"]]
        if checks is not None and "of" not in checks:
            raise ValueError(f"{self.folder / 'checks.json'} does not say which labels it is of: run the check again")
        if checks is not None and (checks["of"], checks["labels"]) != (labels["of"], own):
            raise ValueError(f"{self.folder / 'checks.json'} checks other labels than labels.json holds: run the check again")
        names = self.objects.direction_names
        if self.settings.direction_names:
            lines = text_lines(self.settings.direction_names)
            names = {exemplars.layers[0]: [line.strip() for line in lines]}
        network = Path(str(exemplars.summary["network"])).name
        title = f"{', '.join(exemplars.layers)} of {network if network != 'None' else 'the network'}"
        about = {"title": title, "labels": labels["settings"]} | ({} if checks is None else {"check": checks["summary"]})
        checked_units = None if checks is None else checks["units"]
        return write_atlas(exemplars, labels["units"], self.folder / "atlas", checked_units, about, names)


def _read(file: Path, stage: str) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: run the stage {stage!r} first")
    return read_json(file)


def _digest(exemplars: ExemplarSet) -> str:
    """Hash of what decided exemplars."""
    return hashlib.sha256(json.dumps(exemplars.summary, sort_keys=True).encode()).hexdigest()


__all__ = ["NeuronsSettings", "Objects", "neurons"]
