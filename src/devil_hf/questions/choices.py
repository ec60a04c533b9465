"""Multiple choice: which of several answers the features support, with a probability that can be checked, or none of them.

A question is a sentence as captions have it, with a mark where the choice stands ("the {} square"): the language models that
describe images have read captions, not questions. For the sentence s_c of each choice c, and the places r = 1 ... R that tile
the image,

    evidence(c) = [log (1/R) sum_r p(s_c | place r) - log p(s_c | null prefix)] / tokens of s_c
    p(c) = softmax over choices of evidence(c) / temperature

A pooled feature of a whole image knows that there is red, and a square, but hardly what is what; a place shows one thing, so
the sentence is read at a place that nobody names. `grid=1` asks the whole image instead. Where no choice has the least
evidence, nothing is answered, and there are no probabilities: the words before and after the mark count, too, so that of a scene
without a square no square gets a colour. Choices that are all false of what is there are harder to refuse, since the rest of the
sentence is true. The temperature is fitted on other images (Guo et al., 2017; `devil evaluate choices`), on questions whose
choices hold the truth; of others, and of images unlike those, it says nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from devil_hf.checkpoints.identity import preprocessing_of
from devil_hf.extras import needs
from devil_hf.folders import write_json
from devil_hf.model.checkpoint_devil import weights_hash
from devil_hf.model.image_processing_devil import SETTINGS, DevilImageProcessor, ImageSource
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import Layers, read_number, resolve_layers
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.grounding import PLACES_TO_A_SIDE, tile_regions
from devil_hf.questions.phrases import unknown_phrases
from devil_hf.text_files import read_json

MARK = "{}"
NOT_ENCODED = "not encoded"
ALL, WHOLE = "all", "whole"  # scales: all layers at places, all layers of the whole image; others are of a layer at places
COLDEST, HOTTEST = 0.02, 50.0  # bounds of a fitted temperature: where every answer is right, none is the best
AT_BOUND = 1e-6  # nats per question by which a fitted temperature must be better than a bound
# why a fit ended at its bound
NONE_WRONG, NONE_BETTER = "no answer, or too few, clearly wrong", "no answer better than chance"
UNLIKELY = 0.05  # a temperature that makes answers less likely than this share of the likeliest is refuted by them
FINEST_GRID = 64  # places to a side
CALIBRATION_FILE = "calibration.json"  # beside a checkpoint


@dataclass(frozen=True)
class Question:
    """A sentence with the choices that may complete it.

    Args:
        text: with one mark `{}` where the choice stands; without one, it is continued by the choice.
        choices: two or more.

    Raises:
        TypeError: for what is no text.
        ValueError: for an empty text or choice, several marks, fewer than two choices, and two that are equal.
    """

    text: str
    choices: Sequence[str]

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f'question {self.text!r:.100} is no text: give a sentence such as "the {MARK} square"')
        if not self.text.strip():
            raise ValueError(f'question {self.text!r} is empty: give a sentence such as "the {MARK} square", or "{MARK}" alone')
        if self.text.count(MARK) > 1:
            raise ValueError(f"question {self.text!r} has several marks {MARK}: leave one, where the choice stands")
        if isinstance(self.choices, str) or not isinstance(self.choices, Sequence) or len(self.choices) < 2:
            raise ValueError(f"choices {self.choices!r:.100}: give at least two, to choose from")
        if strange := [choice for choice in self.choices if not isinstance(choice, str)]:
            raise TypeError(f"choice {strange[0]!r:.100} is no text: give words")
        object.__setattr__(self, "choices", tuple(" ".join(choice.split()) for choice in self.choices))
        if not all(self.choices):
            raise ValueError(f"choices {list(self.choices)} hold an empty one: leave it out")
        if twice := sorted({choice for choice in self.choices if self.choices.count(choice) > 1}):
            raise ValueError(f"choices {twice} are given twice: leave one of each")

    @property
    def before(self) -> str:
        """The words that stand before the choice."""
        return self.text.partition(MARK)[0].strip()

    @property
    def sentences(self) -> list[str]:
        """The sentence of each choice."""
        text = self.text if MARK in self.text else f"{self.text} {MARK}"
        return [" ".join(text.replace(MARK, choice).split()) for choice in self.choices]

    def tokens(self, processor: DevilProcessor) -> dict[str, Tensor]:
        """The sentences as phrase tensors (K, T).

        Raises:
            ValueError: for words that the language model does not know, and choices that it cannot tell apart.
        """
        if strange := unknown_phrases(processor, self.choices):
            raise ValueError(f"choice {strange[0]!r} holds words that the language model does not know: choose others")
        if unknown_phrases(processor, self.sentences):
            raise ValueError(f"question {self.text!r} holds words that the language model does not know: choose others")
        phrases = dict(processor(text=self.sentences, return_tensors="pt"))
        rows = phrases["input_ids"].masked_fill(phrases["attention_mask"] == 0, -1).tolist()
        for at, row in enumerate(rows):
            if (first := rows.index(row)) != at:
                pair = f"{self.choices[first]!r} and {self.choices[at]!r}"
                raise ValueError(f"choices {pair} are the same tokens to the language model: leave one of them out")
        return phrases


@dataclass(frozen=True)
class Scale:
    """How evidence becomes an answer.

    Args:
        temperature: nats per token by which probabilities of choices differ by a factor of e.
        least_evidence: nats per token that the best choice must have.
        bound: why no temperature could be fitted, `NONE_WRONG` (it is then the highest that such answers do not refute) or
            `NONE_BETTER` (it is `HOTTEST`); None where one was.
    """

    temperature: float = 1.0
    least_evidence: float = 0.0
    bound: str | None = None

    def __post_init__(self) -> None:
        if not all(type(value) in (int, float) for value in (self.temperature, self.least_evidence)):
            raise ValueError(f"temperature {self.temperature!r} and least evidence {self.least_evidence!r} must be numbers")
        if not COLDEST <= self.temperature <= HOTTEST:
            raise ValueError(f"temperature {self.temperature} must lie between {COLDEST} and {HOTTEST}")
        if not math.isfinite(self.least_evidence):
            raise ValueError(f"least evidence {self.least_evidence} must be finite")
        if self.bound not in (None, NONE_WRONG, NONE_BETTER):
            raise ValueError(f"bound {self.bound!r} must be {NONE_WRONG!r}, {NONE_BETTER!r}, or null")

    def probabilities(self, evidence: Tensor) -> Tensor:
        """(..., K) of evidence (..., K)."""
        return (evidence / self.temperature).softmax(dim=-1)


@dataclass(frozen=True)
class Calibration:
    """Scales that were fitted for one network and its translator.

    Args:
        scales: by what is asked: `ALL` layers at places, each layer at places, and all layers of the `WHOLE` image.
        grid: places to a side of the image.
        fitted_on: which images.
        questions: how many.
        translator, backbone: hashes of their weights.
        preprocessing: of the images, as `preprocessing_of` has it; None in files of before, which do not say it.
    """

    scales: dict[str, Scale]
    grid: int
    fitted_on: str
    questions: int
    translator: str
    backbone: str
    preprocessing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        texts, numbers = (self.fitted_on, self.translator, self.backbone), (self.questions, self.grid)
        if not all(isinstance(one, str) for one in texts) or not all(type(one) is int and one > 0 for one in numbers):
            raise ValueError(f"{texts} must be texts, and {numbers} whole numbers")
        if not isinstance(self.preprocessing, dict | None):
            raise ValueError(f"preprocessing {self.preprocessing!r:.80} must be an object, or null")
        read_grid(self.grid)

    @classmethod
    def read(cls, file: str | PathLike) -> "Calibration":
        """Of a JSON file, as `write` makes it.

        Raises:
            OSError: if it cannot be opened.
            ValueError: if it is no such file.
        """
        content = read_json(file)
        try:
            scales = {}
            for name, one in content.pop("scales").items():
                if missing := [key.name for key in fields(Scale) if key.name not in one]:
                    raise ValueError(f"the scale {name!r} has no {missing[0]}")
                scales[str(name)] = Scale(**one)
            return cls(scales=scales, **content)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file} is no calibration ({error}): make one with devil evaluate choices") from error

    @classmethod
    def beside(cls, checkpoint: str | PathLike) -> "Calibration | None":
        """The one that stands beside the weights of a directory or a Hub id; None where there is none."""
        file = cached_file(str(checkpoint), CALIBRATION_FILE, _raise_exceptions_for_missing_entries=False)
        return None if file is None else cls.read(file)

    def write(self, file: str | PathLike) -> None:
        """Write it as JSON."""
        write_json(file, asdict(self))

    def check(self, model: DevilModel, processor: DevilProcessor) -> None:
        """Raise a ValueError where the model has another translator or network than those that this was fitted for, or the
        processor makes other pixel values of an image."""
        if self.preprocessing is not None:
            fitted_on = preprocessing_of(DevilImageProcessor()) | self.preprocessing  # what a file does not say is as usual
            images = preprocessing_of(processor.image_processor)
            changed = [name for name in SETTINGS if fitted_on[name] != images[name]]
            if changed:
                different = "; ".join(f"{name} {fitted_on[name]!r:.80}, not {images[name]!r}" for name in changed)
                raise ValueError(
                    f"the calibration is of another preprocessing than this checkpoint's ({different}): fit one by devil "
                    "evaluate choices, or load it as it was"
                )
        for part, own in part_hashes(model).items():
            if own != (fitted := getattr(self, part)):
                dtype = next(getattr(model, part).parameters()).dtype
                raise ValueError(
                    f"the calibration is of another {part} ({fitted:.8}) than this checkpoint's ({own:.8}), or of another "
                    f"precision than {str(dtype).removeprefix('torch.')}: fit one by devil evaluate choices, or load it as it was"
                )

    def scale(self, visible: Sequence[int], names: Sequence[str], grid: int) -> Scale | None:
        """The scale for layers at positions `visible` of `names` and `grid` places to a side; None where none was fitted."""
        every = len(visible) == len(names)
        if grid == self.grid:
            return self.scales.get(ALL if every else names[visible[0]] if len(visible) == 1 else "")
        return self.scales.get(WHOLE) if grid == 1 and every else None


def part_hashes(model: DevilModel) -> dict[str, str]:
    """SHA-256 of the weights of the "translator" and of the "backbone", in single precision."""
    parts = {"translator": model.translator, "backbone": model.backbone.module}
    return {
        part: weights_hash({name: tensor.float() for name, tensor in module.state_dict().items()})
        for part, module in parts.items()
    }


def read_grid(grid: int) -> int:
    """Places to a side of the image; a ValueError for less than 1, and for more than any feature map tells apart."""
    if (grid := read_number(grid, "grid", 1)) > FINEST_GRID:
        raise ValueError(f"grid={grid}: at most {FINEST_GRID} places to a side, such as {PLACES_TO_A_SIDE}")
    return grid


@dataclass(frozen=True)
class Answer:
    """What an image says to a question.

    Args:
        choice: the likeliest; None where the features support none of them.
        probabilities: of each choice, given that one of them is true; None where nothing is answered.
        evidence: of the sentence of each choice, in nats per token over the null prefix.
        habit: of each choice, the probability that the language model alone gives it, without features.
        least_evidence: what the best choice had to have.
        calibrated: whether the probabilities are of a temperature that was fitted for these layers and places.
        bound: of the scale, why none could be fitted.
    """

    choice: str | None
    probabilities: dict[str, float] | None
    evidence: dict[str, float]
    habit: dict[str, float]
    least_evidence: float
    calibrated: bool = field(default=False)
    bound: str | None = None

    @property
    def text(self) -> str:
        """The choice, or `NOT_ENCODED`."""
        return NOT_ENCODED if self.choice is None else self.choice

    def as_record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {"answer": self.text, **asdict(self)}


@torch.no_grad()
def ask(
    model: DevilModel,
    processor: DevilProcessor,
    images: ImageSource | None,
    question: str,
    choices: Sequence[str],
    layers: Layers = None,
    grid: int | None = None,
    least_evidence: float | None = None,
    calibration: Calibration | None = None,
    feature_maps: Sequence[Tensor | None] | None = None,
) -> list[Answer]:
    """Ask images a question with given answers.

    Args:
        images: anything that the processor accepts; None where `feature_maps` stand for them.
        question: a sentence as captions have it, with one mark `{}` where the choice stands ("the {} square"); without one, it
            is continued by the choice.
        choices: two or more.
        layers: those that are asked together, by name or index; None for all.
        grid: places to a side of the image, 1 for the whole image; None for the calibration's, or 4.
        least_evidence: nats per token below which the answer is "not encoded"; None for the calibration's, or 0.
        calibration: None divides evidence by 1, and so promises nothing of the probabilities.
        feature_maps: (B, C_l, H_l, W_l) per layer, of `model.extract_features`, instead of images.

    Returns:
        An answer per image.

    Raises:
        ValueError: for a question or choices that are none, see `Question`, a grid that is too fine, a calibration for another
            translator or network, and both images and feature maps, or neither.
    """
    asked = Question(question, choices)
    usual = calibration.grid if calibration else PLACES_TO_A_SIDE
    grid = read_grid(usual if grid is None else grid)
    tokens = asked.tokens(processor)
    if (images is None) == (feature_maps is None):
        raise ValueError("give images, or the feature_maps of an earlier call, and not both")
    visible = resolve_layers(layers, model.layer_names)
    scale = None
    if calibration is not None:
        calibration.check(model, processor)
        scale = calibration.scale(visible, model.layer_names, grid)
    pixels = None if images is None else processor(images=images, return_tensors="pt")["pixel_values"]
    features = model.read_features(pixels, feature_maps, visible)
    evidence, habit = choice_evidence(model, ask_places(model, features, grid, visible), tokens)
    least = (scale or Scale()).least_evidence if least_evidence is None else least_evidence
    chances = (scale or Scale()).probabilities(evidence)
    alone = habit.softmax(dim=-1)

    def named(values: Tensor) -> dict[str, float]:
        return dict(zip(asked.choices, values.tolist(), strict=True))

    bound = None if scale is None else scale.bound
    fitted, answers = scale is not None and bound is None, []
    for one, chance in zip(evidence, chances, strict=True):
        supported = bool(one.max() >= least)
        choice, probabilities = (asked.choices[int(chance.argmax())], named(chance)) if supported else (None, None)
        answers.append(Answer(choice, probabilities, named(one), named(alone), least, fitted and supported, bound))
    return answers


def ask_places(model: DevilModel, feature_maps: Sequence[Tensor | None], grid: int, layers: Layers = None) -> Tensor:
    """Prefixes (B, grid * grid, k, D_lm) of the tiles of images, from feature maps (B, C_l, H_l, W_l) per layer."""
    if grid == 1:
        return model.ask(layers=layers, feature_maps=feature_maps)[:, None]
    shown = next(maps for maps in feature_maps if maps is not None)
    regions = tile_regions(grid, shown.shape[-1] / shown.shape[-2]).to(shown.device).expand(len(shown), -1, -1, -1)
    return model.ask(layers=layers, regions=regions, feature_maps=feature_maps).unflatten(0, (len(shown), -1))


@torch.no_grad()
def choice_evidence(model: DevilModel, places: Tensor, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Evidence (B, K) of sentences, nats per token, at prefixes of places (B, R, k, D_lm); their log-probabilities (K,) alone.

    Args:
        tokens: of K sentences, see `Question.tokens`.
    """
    prefix = torch.cat([places.flatten(0, 1).float(), model.null_prefix().float()])
    log_probs = model.score_prefix(prefix, tokens).sum(dim=-1).cpu()  # (B * R + 1, K)
    of_places, null = log_probs[:-1].unflatten(0, places.shape[:2]), log_probs[-1]
    mean = of_places.logsumexp(dim=1) - math.log(places.shape[1])
    return (mean - null) / tokens["attention_mask"].sum(dim=-1), null


def fit_scale(evidence: Sequence[Sequence[float]], answers: Sequence[int | None]) -> Scale:
    """The temperature that makes true answers likeliest, and the least evidence that tells questions with an answer from others.

    Where every answer is right, the colder the likelier, and a single wrong one among many says little of how cold. So where the
    true answers are at least `UNLIKELY` times as likely at `COLDEST` as at their best, no temperature is fitted: the scale says
    so, and has the highest one under which they are at least `UNLIKELY` times as likely as at `COLDEST`.

    Args:
        evidence: of the choices of each question.
        answers: which of them is true; None where none is. The least evidence is where the share of questions without an
            answer that stays below it, less that of those with one, is highest; 0 where all have one.

    Raises:
        ValueError: where no question has an answer.
        MissingExtraError: without scipy.
    """
    needs("scipy", "evaluate")
    from scipy.optimize import brentq, minimize_scalar

    answered = [(torch.tensor(one), answer) for one, answer in zip(evidence, answers, strict=True) if answer is not None]
    if not answered:
        raise ValueError("no question has an answer: there is nothing to fit a temperature on")
    width = max(len(one) for one, _ in answered)
    padded = torch.stack([torch.nn.functional.pad(one, (0, width - len(one)), value=-math.inf) for one, _ in answered]).double()
    true = torch.tensor([answer for _, answer in answered])

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(padded / math.exp(log_temperature), true))

    found = minimize_scalar(loss, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded")
    absent = [max(one) for one, answer in zip(evidence, answers, strict=True) if answer is None]
    least = _between([float(one.max()) for one, _ in answered], absent) if absent else 0.0
    low, high = math.log(COLDEST), math.log(HOTTEST)
    if loss(high) <= found.fun + AT_BOUND:
        return Scale(HOTTEST, least, NONE_BETTER)
    margin = -math.log(UNLIKELY) / len(answered)
    if loss(low) > found.fun + margin:
        return Scale(math.exp(found.x), least)
    allowed = loss(low) + margin
    highest = high if loss(high) <= allowed else brentq(lambda at: loss(at) - allowed, low, high)
    return Scale(min(max(math.exp(highest), COLDEST), HOTTEST), least, NONE_WRONG)


def _between(present: Sequence[float], absent: Sequence[float]) -> float:
    """The level at which the share of `absent` below it, less that of `present`, is highest; the middle of all such levels."""
    levels = torch.tensor(sorted({*present, *absent})).double()
    middles = (levels[1:] + levels[:-1]) / 2
    if not len(middles):
        return float(levels[0])
    below = [torch.tensor(values).double()[:, None] < middles for values in (absent, present)]
    gain = below[0].double().mean(dim=0) - below[1].double().mean(dim=0)
    return float(middles[gain >= gain.max() - 1e-12].median())


__all__ = [
    "Answer",
    "Calibration",
    "Question",
    "Scale",
    "ask",
    "ask_places",
    "choice_evidence",
    "fit_scale",
    "part_hashes",
    "read_grid",
]
