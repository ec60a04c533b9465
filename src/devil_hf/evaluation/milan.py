"""The MILANNOTATIONS protocol: labels of units against what people wrote, always beside labels that know nothing of the unit.

BERTScore with MILAN's settings (English, idf, rescaled with the baseline, lower case, all references of a unit), and the caption
metrics. BERTScore is a weak measure of neuron labels: one constant label for all units is reported to beat every method. So the
table has four controls: the best constant label, chosen with the references in hand (of the 20 most frequent texts the one of
the best ROUGE-L); the labels dealt to other units; what the language model says under the null prefix; and one annotator
against the others, as far as people agree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from devil_hf.data.identity import combined, image_identity
from devil_hf.data.milan import open_milan
from devil_hf.data.unit_features import encoded_features
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import CONTROLS, Evaluation
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.text.bertscore import BERT_MODEL, MILAN, BertScoreSettings
from devil_hf.evaluation.text.metrics import CaptionScorer, References, best_constant
from devil_hf.evaluation.units.labels import LabelSettings, label_units, null_label
from devil_hf.evaluation.units.simulation import shuffled_labels
from devil_hf.registry import Registry
from devil_hf.settings import option

logger = logging.get_logger(f"transformers.{__name__}")

# Training is a room beside this one: it puts what trains on `training` units of an evaluator here.
UNIT_TRAINERS: Registry[Callable[["MilanEvaluator"], None]] = Registry("training on units", "devil_hf.training")
LABELS = "labels"
ONE_ANNOTATOR = "one annotator"
COLUMNS = ("bertscore", "bleu_1", "bleu_4", "rouge_l", "cider")


@dataclass(kw_only=True)
class MilanSettings(EvaluationSettings, LabelSettings):
    """Which units, how they are labelled and compared."""

    milan: Path = option("folder of NETWORK/DATASET/annotations.csv", metavar="ROOT")
    split: str = option("such as within-alexnet-imagenet or cnns-to-vit; a wrong one lists all")
    limit: int | None = option("only this many test units", None)
    batch_size: int = option("units at once, per process", 64)
    train_steps: int = option("first train on the split's training units; 0: no", 0)
    learning_rate: float = option("of that training", 1e-4)
    seed: int = option("of that training", 0)
    output_dir: Path = option(
        "labels.jsonl, where stopped labelling goes on, scores.json, and what was trained", Path("devil-milan")
    )
    bert_model: str = option("name or directory for BERTScore; none leaves it out", BERT_MODEL)
    bert_layers: int | None = option("of a directory, how many layers to use (roberta-large: 17)", None)
    bert_baseline: Path | None = option("of a directory, the file of values to rescale by", None)

    def validate(self) -> None:
        """See `EvaluationSettings.validate` and `LabelSettings.validate`."""
        EvaluationSettings.validate(self)
        LabelSettings.validate(self)


class MilanEvaluator(Evaluator):
    """Labels of annotated units, beside labels that know nothing of the unit."""

    name = "neurons"
    summary = "score labels of units on MILANNOTATIONS"
    example = "devil evaluate neurons --milan MILANNOTATIONS --split within-resnet152-imagenet --checkpoint CHECKPOINT"
    Settings = MilanSettings
    records_file = "labels.jsonl"
    unit = "unit"

    def open(self) -> list[str]:
        """The names of the test units."""
        self.training, self.units = open_milan(self.settings.milan, self.settings.split)
        names = list(self.units.names[: self.settings.limit])
        self.positions = {name: at for at, name in enumerate(names)}
        return names

    def prepare(self) -> None:
        """Train on the units of the split, where that was asked for."""
        if self.settings.train_steps:
            UNIT_TRAINERS["translator"](self)

    def decides(self) -> dict[str, Any]:
        """The units and how they are labelled."""
        return {"units": str(Path(self.settings.milan).resolve()), **self.settings.choice()}

    def identity(self, key: str) -> str | None:
        """Of the pictures and masks of a unit."""
        unit = self.units[self.positions[key]]
        return combined([image_identity(unit.images.numpy()), image_identity(unit.masks.numpy())])

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """What `label_units` returns."""
        units = (self.units[self.positions[key]] for key in keys)
        pooled = encoded_features(self.model, self.processor, units)
        return label_units(self.model, self.processor, pooled, **self.settings.choice())

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See `label_scores`."""
        settings = self.settings
        bert = None
        if settings.bert_model != "none":
            bert = BertScoreSettings(settings.bert_model, settings.bert_layers, settings.bert_baseline)
        references = [self.units.summaries[self.positions[key]] for key in rows]
        found = label_scores([row["label"] for row in rows.values()], references, null_label(self.model, self.processor), bert)
        scores = found["scores"]
        noted = {"units": len(rows), "strategy": settings.strategy}
        noted |= {"bertscore": str(bert)} if "bertscore" in scores[LABELS] else {}
        return Evaluation(
            title="Labels of units",
            scores={LABELS: scores.pop(LABELS)},
            controls={name: scores[name] for name in CONTROLS if name in scores},
            dataset={"name": "MILANNOTATIONS", "split": settings.split},
            settings=noted,
            details={
                "baselines": {ONE_ANNOTATOR: scores[ONE_ANNOTATOR]} if ONE_ANNOTATOR in scores else {},
                "texts": found["texts"],
            },
            missing=found["missing"],
        )

    def text(self, evaluation: Evaluation) -> str:
        """The table, in hundredths."""
        rows = evaluation.scores | evaluation.controls | evaluation.details["baselines"]
        return table(rows, COLUMNS, lambda value: f"{100 * value:.1f}", names=CONTROLS)


EVALUATORS.register("neurons", MilanEvaluator)
EVALUATORS.register("milan", MilanEvaluator)


def label_scores(
    labels: Sequence[str],
    references: Sequence[Sequence[str]],
    null: str | None = None,
    bert: BertScoreSettings | None = MILAN,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of labels and of the controls; every text in lower case, references tokenised once for all rows.

    Args:
        labels: one per unit.
        references: what people wrote about each unit, at least one text.
        null: what the language model says under the null prefix (`null_label`); without it, that row is left out.
        bert: which BERTScore; None leaves it out.

    Returns:
        `scores`: row -> metrics, "labels", "constant" (the best label for all units), "shuffled" (dealt to other units), "null"
        and "one annotator" (against the others); `texts` of the rows that say the same of every unit; `missing`: metric or row
        -> why it cannot be had, which a warning says, too.
    """
    if len(labels) != len(references):
        raise ValueError(f"{len(labels)} labels for {len(references)} units with references")
    said, truths = [text.lower() for text in labels], [[text.lower() for text in texts] for texts in references]
    known = References(truths, bert or MILAN)
    rouge = CaptionScorer(known, ["rouge_l"])
    texts = [text for several in truths for text in several] + said
    constant = best_constant([texts], lambda text: rouge([text] * len(truths))["rouge_l"])
    targets = {LABELS: said, "constant": [constant] * len(said)}
    missing = {}
    if sum(map(bool, labels)) > 1:
        targets["shuffled"] = [text.lower() for text in shuffled_labels(labels, seed)]
    else:
        missing["shuffled"] = "fewer than 2 units have a label, so none can be dealt to another unit"
    if null is not None:
        targets["null"] = [null.lower()] * len(said)
    metrics = [*(["bertscore"] if bert else []), "bleu", "rouge_l", "cider"]
    scorer = CaptionScorer(known, metrics)
    rows = {name: scorer(target) for name, target in targets.items()}
    if several := [own for own in truths if len(own) > 1]:
        others = References([own[1:] for own in several], known.bert)
        rows[ONE_ANNOTATOR] = CaptionScorer(others, metrics)([own[0] for own in several])
    for name, row in rows.items():
        for metric, why in row.pop("missing", {}).items():
            missing[f"{name}: {metric}" if any(metric in other for other in rows.values()) else metric] = why
    for name, why in missing.items():
        logger.warning(f"{name} is left out: {why}")
    same = {"constant": constant} | ({} if null is None else {"null": null})
    return {"scores": rows, "texts": same, "missing": missing}
