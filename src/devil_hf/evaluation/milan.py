"""The MILANNOTATIONS protocol: labels of units against what people wrote, always beside labels that know nothing of the unit.

BERTScore with MILAN's settings (English, idf, rescaled with the baseline, lower case, all references of a unit), and the caption
metrics. BERTScore is a weak measure of neuron labels: one constant label for all units is reported to beat every method. So the
table has four controls: the best constant label, chosen with the references in hand (of the 20 most frequent texts the one of
the best ROUGE-L); the labels dealt to other units; what the language model says under the null prefix; and one annotator
against the others, as far as people agree.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from devil_hf.data.exemplar_set import Unit
from devil_hf.data.milan import SeveralUnits
from devil_hf.data.unit_features import encoded_features
from devil_hf.evaluation.records import Records
from devil_hf.evaluation.text.bertscore import BERT_MODEL, BertScore, BertScoreSettings, bert_remedy
from devil_hf.evaluation.text.metrics import caption_scores
from devil_hf.evaluation.units.labels import label_units
from devil_hf.evaluation.units.simulation import shuffled_labels
from devil_hf.model.backbone_devil import weights_hash
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor

LABELS = "labels.jsonl"
UNITS = 64  # labelled before they are written down
logger = logging.get_logger(f"transformers.{__name__}")

COLUMNS = ("bert_score", "bleu_1", "bleu_4", "rouge_l", "cider")
CONSTANTS = 20  # candidates for the constant label


def label_annotated_units(
    model: DevilModel,
    processor: DevilProcessor,
    units: SeveralUnits | Sequence[Unit],
    keys: Sequence[str],
    strategy: str,
    root: str | PathLike,
    output_dir: str | PathLike,
) -> list[dict[str, Any]]:
    """Label units; `output_dir/labels.jsonl` takes them as they come, and a stopped pass goes on there.

    Args:
        keys: a name of each of the first units, by which it is known again; those after them are left out.
        root: where the units lie, part of what the records must agree in.

    Returns:
        What `label_units` returns, one dictionary for each key.

    Raises:
        ValueError: if `output_dir` holds labels by other weights, of another root, or by another strategy.
    """
    decides = {"weights": weights_hash(model), "units": str(Path(root).resolve()), "strategy": strategy}
    records = Records(Path(output_dir) / LABELS, decides)
    missing = [at for at, key in enumerate(keys) if key not in records]
    for begin in range(0, len(missing), UNITS):
        part = missing[begin : begin + UNITS]
        pooled = encoded_features(model, processor, (units[at] for at in part))
        for at, row in zip(part, label_units(model, processor, pooled, strategy), strict=True):
            records.add(keys[at], row)
    return [records[key] for key in keys]


def neuron_table(
    labels: Sequence[str],
    references: Sequence[Sequence[str]],
    null_label: str | None = None,
    bert_model: str | PathLike | None = BERT_MODEL,
    bert_layers: int | None = None,
    bert_baseline: str | PathLike | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Scores of labels and of the controls.

    Args:
        labels: one per unit.
        references: what people wrote about each unit, at least one text.
        null_label: what the language model says under the null prefix (`null_label`); without it, that row is left out.
        bert_model: name or directory of BERTScore's model; None leaves BERTScore out.
        bert_layers, bert_baseline: see `bert_scores`.

    Returns:
        Row name -> metrics; "labels", "constant label", "shuffled labels", "language model only", "one annotator". BERTScore is
        None where its model cannot be had; a warning then says what to do.
    """
    if len(labels) != len(references):
        raise ValueError(f"{len(labels)} labels for {len(references)} units with references")
    targets: dict[str, tuple[list[str], Sequence[Sequence[str]]]] = {"labels": (list(labels), references)}
    targets["constant label"] = ([best_constant(labels, references)] * len(labels), references)
    targets["shuffled labels"] = (shuffled_labels(labels, seed), references)
    if null_label is not None:
        targets["language model only"] = ([null_label] * len(labels), references)
    several = [texts for texts in references if len(texts) > 1]
    if several:
        targets["one annotator"] = ([texts[0] for texts in several], [texts[1:] for texts in several])
    rows: dict[str, dict[str, Any]] = {}
    for name, (texts, truths) in targets.items():
        lowered = [text.lower() for text in texts], [[truth.lower() for truth in several] for several in truths]
        rows[name] = {"bert_score": None} | caption_scores(*lowered)
        if len(set(texts)) == 1:
            rows[name]["text"] = texts[0]
    if bert_model is None:
        return rows
    try:
        for name, (texts, truths) in targets.items():
            scores = bert_scores(texts, truths, bert_model, bert_layers, bert_baseline)
            rows[name]["bert_score"] = float(scores.mean())
    except (OSError, ImportError) as error:
        settings = BertScoreSettings(bert_model, bert_layers, bert_baseline)
        logger.warning(f"BERTScore is left out: {bert_remedy(settings, error)}")
    return rows


def best_constant(labels: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    """Of the most frequent labels and references, the one text that scores the best ROUGE-L when given to every unit."""
    said = [text.lower() for texts in references for text in texts] + [text.lower() for text in labels if text]
    counts = Counter(said)
    candidates = sorted(counts, key=lambda text: (-counts[text], text))[:CONSTANTS]
    lowered = [[text.lower() for text in texts] for texts in references]
    return max(
        candidates, key=lambda text: caption_scores([text] * len(references), lowered, metrics=("rouge_l",))["rouge_l"]
    )


def bert_scores(
    labels: Sequence[str],
    references: Sequence[Sequence[str]],
    model: str | PathLike = BERT_MODEL,
    layers: int | None = None,
    baseline: str | PathLike | None = None,
) -> torch.Tensor:
    """BERTScore F1 (units,) with MILAN's settings; see `devil_hf.evaluation.text.bertscore.BertScoreSettings`."""
    return BertScore(references, BertScoreSettings(model, layers, baseline))(labels)


@torch.no_grad()
def null_label(model: DevilModel, processor: DevilProcessor, max_new_tokens: int = 20) -> str:
    """What the language model says when every layer is hidden."""
    ids = model.decode(model.null_prefix(), max_new_tokens=max_new_tokens)
    return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def table_text(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as text, in hundredths."""
    lines = [f"{'':22}" + "".join(f"{name:>11}" for name in COLUMNS)]
    for name, row in rows.items():
        cells = ["–" if row[column] is None else f"{100 * row[column]:.1f}" for column in COLUMNS]
        lines.append(f"{name:22}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)
