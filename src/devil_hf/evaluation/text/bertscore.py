"""BERTScore through bert-score, with MILAN's settings: English, idf over the references, rescaled, lower case, best reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from devil_hf.extras import remedy

logger = logging.get_logger(f"transformers.{__name__}")

BERT_MODEL = "roberta-large"  # bert_score's choice for English
BERT_LAYERS = 17


@dataclass(frozen=True)
class BertScoreSettings:
    """Which BERTScore; the defaults are MILAN's.

    Args:
        model: a name that bert_score knows, or a directory.
        layers: of a directory, how many layers to use.
        baseline: of a directory, the file with the values to rescale by (bert_score hands them out, one per model); without
            one, scores of a directory are not rescaled, with a warning.
        idf: weigh words by how rare they are in the references.
        lower_case: of predictions and references.
    """

    model: str | PathLike = BERT_MODEL
    layers: int | None = None
    baseline: str | PathLike | None = None
    idf: bool = True
    lower_case: bool = True

    def __post_init__(self):
        if self.local and self.layers is None:
            raise ValueError(
                f"{self.model} is a directory: say how many of its layers to use (bert_layers; {BERT_LAYERS} for {BERT_MODEL})"
            )

    @property
    def local(self) -> bool:
        """Whether the model is a directory."""
        return Path(self.model).is_dir()


MILAN = BertScoreSettings()


class BertScore:
    """BERTScore against fixed references, with the model loaded once.

    Raises:
        ImportError: without bert-score.
        OSError: if the model cannot be loaded.
    """

    def __init__(self, references: Sequence[Sequence[str]], settings: BertScoreSettings = MILAN):
        from bert_score import BERTScorer

        self.settings = settings
        if settings.local and settings.baseline is None:
            logger.warning_once(f"BERTScore of {settings.model} is not rescaled: there is no baseline file")
        self.references = [[self._case(text) for text in texts] for texts in references]
        options: dict[str, Any] = {"idf_sents": [text for texts in self.references for text in texts]}
        self._scorer = BERTScorer(
            model_type=str(settings.model),
            num_layers=settings.layers,
            lang="en",
            idf=settings.idf,
            rescale_with_baseline=not settings.local or settings.baseline is not None,
            baseline_path=None if settings.baseline is None else str(settings.baseline),
            **(options if settings.idf else {}),
        )

    def __call__(self, predictions: Sequence[str]) -> torch.Tensor:
        """F1 (predictions,) with the best of the references."""
        _, _, f1 = self._scorer.score([self._case(text) for text in predictions], self.references)
        return f1

    def _case(self, text: str) -> str:
        return text.lower() if self.settings.lower_case else text


def bert_remedy(settings: BertScoreSettings, error: Exception) -> str:
    """Why BERTScore cannot be had, and what to do."""
    if isinstance(error, ImportError):
        return f"{error}; install bert-score: {remedy('evaluate')}"
    return (
        f"{settings.model!s} cannot be loaded ({str(error).splitlines()[0]}). Give a local directory of {BERT_MODEL} (with "
        f"{BERT_LAYERS} layers to use, and its baseline file) where the Hub is out of reach"
    )
