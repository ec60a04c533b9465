"""Multiple choice on the shapes world, or on questions of one's own: is it right, and does it know how sure it may be?

Of every scene, an object is asked for its colour and its texture by its shape, and for its shape by its colour, where no other
object has that shape or colour; the choices are all words of the class. Two kinds of questions have no true choice: what colour a
shape has that is not there, and every other question once more, with the truth left out of the choices (where two are left).
Scenes come in two parts. On the later ones the scales are fitted (`calibration.json`: a temperature and the least evidence, for
all layers, each layer, and the whole image), on the first ones they are judged:

* `accuracy`: of questions with an answer, how many are right, none refused; beside chance, and the language model alone.
* `answered`: of questions with an answer, how many are not refused; `refused_absent`, `refused_left_out`: of those without one,
  how many are; `sure_absent`, `sure_left_out`: how many get an answer with a probability above .99 (`refused` and `sure` where a
  file has questions without an answer).
* expected calibration error (ten bins of probability) of questions that are answered, before and after fitting. Of few
  questions even exact probabilities have one: beside it stands the mean error that the same probabilities would have, were they
  exact, and the share of such draws whose error is as large (p), as if questions had nothing to do with each other.

`--questions FILE` asks others: a JSON object on each line, such as {"image": "a.jpg", "question": "a photo of a {}",
"choices": ["dog", "cat"], "answer": "dog"}, with images relative to the file, and null where no choice is true.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from devil_hf.checkpoints.identity import preprocessing_of
from devil_hf.data.identity import file_identity
from devil_hf.data.shapes import ATTRIBUTE_WORDS, Scene
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import CHANCE, Evaluation
from devil_hf.evaluation.tables import table
from devil_hf.questions.choices import (
    ALL,
    CALIBRATION_FILE,
    WHOLE,
    Calibration,
    Question,
    Scale,
    ask_places,
    choice_evidence,
    fit_scale,
    part_hashes,
    read_grid,
)
from devil_hf.questions.grounding import PLACES_TO_A_SIDE
from devil_hf.settings import option
from devil_hf.statistics import Ratio, bootstrap_draws, expected_calibration_error, reliability
from devil_hf.text_files import read_json_lines

SUBJECTS = {"colour": "shape", "texture": "shape", "shape": "colour"}  # what is asked -> by what the object is named
ABSENT = "absent"  # kind of the question about what is not there
LEFT_OUT = "left_out"  # kind of the question whose choices lack the truth
SURE = 0.99  # probability of an answer that nobody would doubt
SIMULATIONS = 200  # answerers with exact probabilities


@dataclass(kw_only=True)
class ChoicesSettings(EvaluationSettings):
    """What `devil evaluate choices` asks."""

    limit: int | None = option("scenes or images that are judged, from the first on", 200)
    fit: int = option("scenes or images after those, on which the scales are fitted", 200, least=2)
    grid: int = option("places to a side of the image", PLACES_TO_A_SIDE, least=1)
    questions: Path | None = option("JSON lines of image, question, choices and answer, instead of scenes", None)
    seed: int = option("of the world; 1 is held out in everything that this package trains", HELD_OUT_WORLD)
    batch_size: int = option("scenes between two records, per process", 8)
    output_dir: Path = option("rows, scores.json, and the scales as calibration.json", Path("devil-choices"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if self.limit is None or self.limit < 2:
            raise ValueError(f"--limit {self.limit}: at least 2 are needed, for an interval")
        if self.grid < 2:
            raise ValueError(f"--grid {self.grid}: at least 2 places to a side; the whole image is asked as well")
        read_grid(self.grid)


@dataclass(frozen=True)
class Exam:
    """A question to an image.

    Args:
        question: with its choices.
        answer: the position of the true one; None where none is.
        kind: class of questions, for the table.
    """

    question: Question
    answer: int | None
    kind: str = ""


def exams(scene: Scene) -> list[Exam]:
    """What a scene is asked."""
    found = []
    for kind, by in SUBJECTS.items():
        words = ATTRIBUTE_WORDS[kind]
        for item in scene.objects:
            name = item.attributes[by]
            if sum(other.attributes[by] == name for other in scene.objects) == 1:
                found.append(Exam(_about(kind, name), words.index(item.attributes[kind]), kind))
                break
    there = scene.words["shape"]
    absent = [shape for shape in ATTRIBUTE_WORDS["shape"] if shape not in there]
    return [*found, Exam(_about("colour", absent[scene.drawing_seed % len(absent)]), None, ABSENT)]


def _about(kind: str, name: str) -> Question:
    return Question(f"the {name} {{}}" if kind == "shape" else f"the {{}} {name}", ATTRIBUTE_WORDS[kind])


def read_exams(file: Path) -> dict[str, list[Exam]]:
    """Questions by image of a file, see the module's docstring.

    Raises:
        OSError: if it cannot be opened.
        ValueError: for a line that is none.
    """
    found: dict[str, list[Exam]] = {}
    for where, fields in read_json_lines(file):
        image, text, choices, answer = (fields.get(name) for name in ("image", "question", "choices", "answer"))
        if not isinstance(image, str) or not isinstance(text, str) or not isinstance(choices, list) or "answer" not in fields:
            raise ValueError(f"{where} needs image, question, choices and answer (null where no choice is true)")
        if not all(isinstance(choice, str) for choice in choices) or answer not in (*choices, None):
            raise ValueError(f"{where}: answer {answer!r} is not one of the choices {choices}")
        try:
            question = Question(text, choices)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        place = str(Path(file).parent / image)
        found.setdefault(place, []).append(Exam(question, None if answer is None else choices.index(answer)))
    return found


@EVALUATORS.register("choices")
class ChoicesEvaluator(Evaluator):
    """Accuracy, refusals and calibration of multiple choice."""

    name = "choices"
    summary = "fit and score the probabilities of multiple choice"
    example = "devil evaluate choices CHECKPOINT --limit 200 --fit 200"
    Settings = ChoicesSettings

    def open(self) -> list[str]:
        """Scenes of the world, or images of the file: those that are judged, then those that are fitted on."""
        wanted = self.settings.limit + self.settings.fit
        self.world = World(wanted, self.settings.seed)
        if self.settings.questions is None:
            return [str(index) for index in range(wanted)]
        self.asked = read_exams(self.settings.questions)
        if len(self.asked) < wanted:
            raise ValueError(
                f"{self.settings.questions} asks {len(self.asked)} images, fewer than --limit {self.settings.limit} and --fit "
                f"{self.settings.fit}: lower them"
            )
        chosen = list(self.asked)[:wanted]
        if missing := [image for image in chosen if not Path(image).is_file()]:
            raise FileNotFoundError(f"{self.settings.questions} asks {len(missing)} images that are not there: {missing[0]}")
        parts = {"limit": chosen[: self.settings.limit], "fit": chosen[self.settings.limit :]}
        for name, images in parts.items():
            if all(exam.answer is None for image in images for exam in self.asked[image]):
                raise ValueError(f"{self.settings.questions}: no question of the images of --{name} has an answer: give some")
        return chosen

    def decides(self) -> dict[str, Any]:
        """The world, or that the images name themselves; and the places."""
        world = self.settings.questions is None
        return {"world": self.settings.seed if world else None, "grid": self.settings.grid}

    def identity(self, key: str) -> str | None:
        """Of an image of the file: its content, and what it is asked."""
        if self.settings.questions is None or key not in self.asked:
            return None
        return f"{file_identity(key)} {[asdict(exam) for exam in self.asked[key]]}"

    def prepare(self) -> None:
        """Every question of the file is one that the language model can read."""
        if self.settings.questions is not None:
            for question in {exam.question for one in self.asked.values() for exam in one}:
                question.tokens(self.processor)

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Per image and question: the evidence of its choices by what is asked, what the language model says, the answer."""
        rows = []
        for key in keys:
            image: Any = key
            if self.settings.questions is None:
                scene = self.world.scene(int(key))
                image, asked = scene.image, exams(scene)
            else:
                asked = self.asked[key]
            features = self.model.extract_features(self.processor(images=image, return_tensors="pt")["pixel_values"])
            names = [None, *self.model.layer_names]
            places = torch.cat([ask_places(self.model, features, self.settings.grid, name) for name in names])
            whole = ask_places(self.model, features, 1)
            rows.append([self._row(exam, places, whole) for exam in asked])
        return rows

    def _row(self, exam: Exam, places: torch.Tensor, whole: torch.Tensor) -> dict[str, Any]:
        tokens = exam.question.tokens(self.processor)
        evidence, habit = choice_evidence(self.model, places, tokens)
        by_name = dict(zip((ALL, *self.model.layer_names), evidence.tolist(), strict=True))
        (by_name[WHOLE],) = choice_evidence(self.model, whole, tokens)[0].tolist()
        return {"kind": exam.kind, "answer": exam.answer, "evidence": by_name, "habit": habit.tolist()}

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See the module's docstring."""
        images = list(rows.values())
        judged, fitted = images[: self.settings.limit], images[self.settings.limit :]
        names = list(images[0][0]["evidence"])
        scales = {}
        for name in names:
            told = [row for image in fitted for row in _with_left_out(image)]
            scales[name] = fit_scale([row["evidence"][name] for row in told], [row["answer"] for row in told])
        self._write(scales, sum(map(len, fitted)))
        draws = bootstrap_draws(len(judged), seed=0)
        asked = [(image, row) for image, one in enumerate(judged) for row in _with_left_out(one)]
        present = [(image, row) for image, row in asked if row["answer"] is not None]
        scores: dict[str, dict[str, float]] = {}
        intervals, details = {}, {}
        for name in names:
            right = _by_image(present, len(judged), lambda row, name=name: np.argmax(row["evidence"][name]) == row["answer"])
            scores[name] = {"accuracy": right.value} | _by_kind(present, lambda row, name=name: row["evidence"][name])
            scores[name] |= _refusals(asked, name, scales[name])
            intervals[name] = {"accuracy": right.interval(draws)}
            details[name] = _calibration([row for _, row in present], name, scales[name])
        chance = {"accuracy": float(np.mean([1 / len(row["habit"]) for _, row in present]))}
        alone = _by_kind(present, lambda row: row["habit"])
        alone["accuracy"] = _by_image(present, len(judged), lambda row: np.argmax(row["habit"]) == row["answer"]).value
        return Evaluation(
            title="Multiple choice",
            scores=scores,
            controls={"null": alone, CHANCE: chance},
            dataset={"name": self._label(), "size": len(judged)},
            settings={"grid": self.settings.grid, "fitted_on": len(fitted), "questions": len(present)},
            details={"intervals": intervals, "calibration": details, "absent": len(asked) - len(present)},
        )

    def _label(self) -> str:
        return self.world.label if self.settings.questions is None else self.settings.questions.name

    def _write(self, scales: dict[str, Scale], questions: int) -> None:
        on = f"{self._label()}, {self.settings.fit} images from number {self.settings.limit} on"
        images = preprocessing_of(self.processor.image_processor)
        found = Calibration(scales, self.settings.grid, on, questions, **part_hashes(self.model), preprocessing=images)
        found.write(Path(self.settings.output_dir) / CALIBRATION_FILE)

    def text(self, evaluation: Evaluation) -> str:
        """The table of answers, and that of probabilities."""
        asked, details = evaluation.settings, evaluation.details
        columns = ["temperature", "least_evidence", "error_before", "error", "error_of_exact_probabilities", "p_of_exact"]
        return (
            f"{evaluation.dataset['name']}, {evaluation.dataset['size']} images, {asked['questions']} questions with an answer, "
            f"{details['absent']} without\n\n{super().text(evaluation)}\n\n"
            f"expected calibration error, scales fitted on {asked['fitted_on']} other images\n\n"
            f"{table(details['calibration'], columns)}{_bounds(details['calibration'])}"
        )


def _with_left_out(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and each that has an answer once more without its true choice: the sentences of the others say what they said."""
    found = list(rows)
    for row in rows:
        at = row["answer"]
        if at is not None and len(row["habit"]) > 2:
            evidence = {name: [*values[:at], *values[at + 1 :]] for name, values in row["evidence"].items()}
            habit = [*row["habit"][:at], *row["habit"][at + 1 :]]
            found.append({"kind": LEFT_OUT, "answer": None, "evidence": evidence, "habit": habit})
    return found


def _bounds(scales: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for scales without a fitted temperature."""
    found = [f"{name} ({one['bound']})" for name, one in scales.items() if one["bound"]]
    return f"\n\ntemperatures that are not fitted, but at their bound: {', '.join(found)}" if found else ""


def _by_image(rows: Sequence[tuple[int, Any]], images: int, value: Any) -> Ratio:
    """The mean over questions of (image, row), with images as the unit of its interval."""
    at = np.array([image for image, _ in rows], dtype=int)
    values = [float(value(row)) for _, row in rows]
    return Ratio(np.bincount(at, values, images), np.bincount(at, minlength=images).astype(float))


def _by_kind(rows: Sequence[tuple[int, Any]], scores_of: Any) -> dict[str, float]:
    """Accuracy by kind of question, where there are kinds."""
    kinds = dict.fromkeys(row["kind"] for _, row in rows if row["kind"])
    right = {kind: [np.argmax(scores_of(row)) == row["answer"] for _, row in rows if row["kind"] == kind] for kind in kinds}
    return {f"accuracy_{kind}": float(np.mean(hits)) for kind, hits in right.items()}


def _refusals(rows: Sequence[tuple[int, Any]], name: str, scale: Scale) -> dict[str, float]:
    """The share of questions with an answer that get one; of each kind of those without, that which gets none, or a sure one."""
    found: dict[str, list[bool]] = {}
    for _, row in rows:
        kept = max(row["evidence"][name]) >= scale.least_evidence
        if row["answer"] is not None:
            found.setdefault("answered", []).append(kept)
            continue
        sure = float(scale.probabilities(torch.tensor(row["evidence"][name])).max()) > SURE
        for about, holds in (("refused", not kept), ("sure", kept and sure)):
            found.setdefault(f"{about}_{row['kind']}".rstrip("_"), []).append(holds)
    return {about: float(np.mean(holds)) for about, holds in found.items()}


def _calibration(rows: Sequence[Any], name: str, scale: Scale) -> dict[str, Any]:
    """Of what is answered: expected calibration error before and after fitting, and of exact probabilities; bins after it."""
    rows = [row for row in rows if max(row["evidence"][name]) >= scale.least_evidence]
    right = np.array([np.argmax(row["evidence"][name]) == row["answer"] for row in rows])
    before, after = (
        np.array([float(one.probabilities(torch.tensor(row["evidence"][name])).max()) for row in rows])
        for one in (Scale(), scale)
    )
    random = np.random.default_rng(0)
    exact = np.array([expected_calibration_error(after, random.random(len(after)) < after) for _ in range(SIMULATIONS)])
    error = expected_calibration_error(after, right)
    return asdict(scale) | {
        "error_before": expected_calibration_error(before, right),
        "error": error,
        "error_of_exact_probabilities": float(exact.mean()),
        "p_of_exact": float(1 + (exact >= error).sum()) / (1 + SIMULATIONS) if len(right) else float("nan"),
        "bins": reliability(after, right).tolist(),
    }


__all__ = ["ChoicesEvaluator", "ChoicesSettings", "Exam", "exams", "read_exams"]
