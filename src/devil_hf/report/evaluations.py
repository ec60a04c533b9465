"""Pictures of results, one per evaluator that has one: the driver of `devil evaluate` draws them into its output folder."""

from pathlib import Path

from devil_hf.evaluation.choices import ChoicesEvaluator
from devil_hf.evaluation.emergence import EmergenceEvaluator
from devil_hf.evaluation.evaluator import FIGURES
from devil_hf.evaluation.knowledge import knowledge_panels
from devil_hf.evaluation.localisation import MapsEvaluator
from devil_hf.evaluation.results import Evaluation
from devil_hf.evaluation.shapes import QUESTIONS, ShapesEvaluator
from devil_hf.report.emergence import depths_figure
from devil_hf.report.knowledge import knowledge_figure
from devil_hf.report.localisation import localisation_figure
from devil_hf.report.reliability import reliability_figure


@FIGURES.register("shapes")
def draw_knowledge(run: ShapesEvaluator, evaluation: Evaluation) -> None:
    """`layers.png`: what each layer knows, where every question was asked."""
    if set(run.settings.questions) == set(QUESTIONS):
        picture = knowledge_figure(*knowledge_panels(evaluation.details), evaluation.title)
        picture.save(Path(run.settings.output_dir) / "layers.png", optimize=True)


@FIGURES.register("maps")
def draw_maps(run: MapsEvaluator, evaluation: Evaluation) -> None:
    """`maps.png`: maps of some phrases beside the truth."""
    folder = Path(run.settings.output_dir)
    localisation_figure(run.processor, run.examples, run.recorded, folder).save(folder / "maps.png")


@FIGURES.register("choices")
def draw_reliability(run: ChoicesEvaluator, evaluation: Evaluation) -> None:
    """`reliability.png`: how often answers are right, against how sure they are."""
    found = evaluation.details["calibration"]
    notes = {name: f"calibration error {one['error']:.3f}" for name, one in found.items()}
    picture = reliability_figure({name: one["bins"] for name, one in found.items()}, notes, "Multiple choice, after fitting")
    picture.save(Path(run.settings.output_dir) / "reliability.png", optimize=True)


@FIGURES.register("emergence")
def draw_emergence(run: EmergenceEvaluator, evaluation: Evaluation) -> None:
    """`emergence.png`: groups of phrases against depth."""
    picture = depths_figure(evaluation.details["depths"], evaluation.dataset["name"])
    picture.save(Path(run.settings.output_dir) / "emergence.png", optimize=True)
