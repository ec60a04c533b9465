"""`devil evaluate units`: do the labels of units predict what the units do on other images? `units/simulation.py` is the measure.

It checks a `labels.json` of `devil neurons`, or any of its form, on any images, and so takes a network, its units and labels of
whoever named them. The two passes over the images (activations of the units, evidence of the labels) are its two rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from devil_hf.data.images import open_images
from devil_hf.data.unit_reader import UnitReader, open_network
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import CONTROLS, Evaluation
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.units.simulation import (
    FEWEST_PERMUTATIONS,
    check_alpha,
    check_constant,
    check_labels,
    check_shuffled,
    check_summary,
    held_out_activations,
    held_out_evidence,
)
from devil_hf.folders import written
from devil_hf.settings import option, read_layers
from devil_hf.text_files import read_json

ACTIVATIONS, EVIDENCE = "activations", "evidence"
MEASURES = ("pearson", "auprc", "passed")


@dataclass(kw_only=True)
class CheckSettings:
    """Whose units on which images, and how labels are checked: what `devil neurons` and `devil evaluate units` have in common."""

    network: str | None = option("id or directory of the network (default: the checkpoint's own backbone)", None)
    split: str | None = option("of a caption folder or data set", None)
    column: str = option("of a data set, which holds the images", "image")
    permutations: int = option("of the images", 2_000, least=FEWEST_PERMUTATIONS)
    alpha: float = option("false discovery rate", 0.05)
    seed: int = option("of the permutations and of the shuffled labels", 0)

    def validate(self) -> None:
        """Raise a ValueError for what can be seen to be wrong before anything is computed."""
        check_alpha(self.alpha)

    def check(self) -> dict[str, Any]:
        """What decides the numbers of a check."""
        return {name: getattr(self, name) for name in ("permutations", "alpha", "seed")}


@dataclass(kw_only=True)
class UnitsSettings(CheckSettings, EvaluationSettings):
    """Which labels of which units, and how they are checked."""

    labels: Path = option("labels.json of devil neurons", positional=True)
    images: str = option("folder of images without exemplars, caption folder, Hub data set or shapes:COUNT", positional=True)
    layers: list[str] | None = option("of the network, as the labels have them (default: those of the labels)", None)
    carrier: str | None = option('a neutral word read before each label, such as "the"', None)
    output_dir: Path = option("activations, evidence, and scores.json", Path("devil-units"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        EvaluationSettings.validate(self)
        CheckSettings.validate(self)


@EVALUATORS.register("units")
class UnitsEvaluator(Evaluator):
    """The check of labels of units, beside one label for all and labels dealt to other units."""

    name = "units"
    summary = "check labels of units on images that they were not made from"
    example = "devil evaluate units CHECKPOINT devil-neurons/labels.json other-photos"
    Settings = UnitsSettings
    parallel = False
    unit = "pass"

    def open(self) -> list[str]:
        """The labels, and the two passes over the images."""
        if not self.settings.labels.is_file():
            raise FileNotFoundError(f"{self.settings.labels} is not there: `devil neurons` writes it")
        units = checked_units(read_json(self.settings.labels), self.settings.labels)
        self.unit_labels = [row["label"] for row in units]
        self.labels = sorted({label for label in self.unit_labels if label})
        if not self.labels:
            raise ValueError(f"{self.settings.labels}: no unit has a label, so there is nothing to check")
        self.layers = list(dict.fromkeys(row["layer"] for row in units))
        self.images = open_images(self.settings.images, self.settings.split, self.settings.column, self.settings.limit)
        return [ACTIVATIONS, EVIDENCE]

    def prepare(self) -> None:
        """The units of the network, and its preprocessing."""
        network, asked = self.settings.network, self.settings.layers or self.layers
        backbone, self.reading = self.model.backbone, self.processor.image_processor
        layers = read_layers(asked, [] if network else self.model.layer_names)
        if network:
            backbone, self.reading = open_network(network, layers, self.model.device)
            layers = None
        self.reader = UnitReader(backbone, layers=layers)

    def decides(self) -> dict[str, Any]:
        """The units, their labels, and the images."""
        network = {"network": self.reader.known(self.reading), "layers": self.reader.layers}
        return {**network, "labels": self.unit_labels, "images": self.images.name, "carrier": self.settings.carrier}

    def identity(self, key: str) -> str | None:
        """Of the images."""
        return self.images.identity

    def group(self, key: str) -> str:
        """Each pass is recorded when it is done."""
        return key

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The file of each pass, and its shape."""
        settings, folder, found = self.settings, Path(self.settings.output_dir), []
        for key in keys:
            if key == ACTIVATIONS:
                values = held_out_activations(self.reader, self.reading, self.images, settings.batch_size)
            else:
                values = held_out_evidence(
                    self.model, self.processor, self.images, self.labels, settings.batch_size, settings.carrier
                )
            with written(folder / f"{key}.safetensors") as unfinished:
                save_file({key: values}, unfinished)
            found.append({"file": f"{key}.safetensors", "shape": list(values.shape)})
        return found

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See `check_labels`."""
        settings, folder = self.settings, Path(self.settings.output_dir)
        activations, evidence = (load_file(folder / rows[key]["file"])[key] for key in (ACTIVATIONS, EVIDENCE))
        found = check_all(activations, evidence, self.labels, self.unit_labels, **settings.check())
        scores = {name: {measure: row[measure] for measure in MEASURES} for name, row in found["summaries"].items()}
        return Evaluation(
            title="Labels of units, checked",
            scores={"labels": scores.pop("labels")},
            controls=scores,
            dataset={"name": self.images.name, "size": activations.shape[1]},
            settings=settings.check(),
            details={"texts": found["texts"], "labels": self.unit_labels, "units": found["units"]},
        )

    def text(self, evaluation: Evaluation) -> str:
        """The table, and what its columns are."""
        rows = evaluation.scores | evaluation.controls
        return "\n".join(
            [
                f"{len(self.unit_labels)} units on {evaluation.dataset['size']} images of {evaluation.dataset['name']}",
                table(rows, MEASURES, names=CONTROLS),
                "pearson, auprc: means over units with a label; passed: share of all units whose label predicts them",
            ]
        )


def checked_units(content: Any, file: Path) -> list[dict[str, Any]]:
    """The `units` of the content of a `labels.json`: at least `layer` and `label` of each.

    Raises:
        ValueError: for a file of another layout.
    """
    units = content.get("units") if isinstance(content, dict) else None
    if not isinstance(units, list) or not all(
        isinstance(row, dict) and isinstance(row.get("layer"), str) and isinstance(row.get("label"), str) for row in units
    ):
        raise ValueError(f'{file} holds no labels of units: expected {{"units": [{{"layer": ..., "label": ...}}, ...]}}')
    return units


def check_all(
    activations: torch.Tensor, evidence: torch.Tensor, labels: Sequence[str], unit_labels: Sequence[str], **options: Any
) -> dict[str, Any]:
    """The check of every unit's label and its two controls; arguments are those of `check_labels`.

    Returns:
        `units`: what `check_labels` returns; `summaries`: "labels", "constant", "shuffled" (of two labels or more) -> what
        `check_summary` returns; `texts`: the constant label.

    Raises:
        ValueError: for activations of other images than the evidence, or of other units than the labels.
    """
    if activations.shape[1] != evidence.shape[1] or len(activations) != len(unit_labels):
        raise ValueError(
            f"{tuple(activations.shape)} activations do not fit {evidence.shape[1]} images and {len(unit_labels)} labels: some "
            "images cannot be read, or layers differ from those of the labels"
        )
    units = check_labels(activations, evidence, labels, unit_labels, **options)
    constant = check_constant(activations, evidence, labels, unit_labels, **options)
    summaries = {"labels": check_summary(units), "constant": constant}
    text = {"constant": constant.pop("label")}
    if sum(map(bool, unit_labels)) > 1:  # one label cannot be dealt to another unit
        summaries["shuffled"] = check_shuffled(activations, evidence, labels, unit_labels, **options)
    return {"units": units, "summaries": summaries, "texts": text}
