"""BERTScore through bert-score, with MILAN's settings: English, idf over the references, rescaled, lower case, best reference.

Where its model is on this machine, nothing is asked of the Hub; where it is not, the Hub is asked once before anything is loaded,
so that nobody waits for a dozen retries of each file of a model that cannot be had.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
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


@cache
def kept_folder(model: str) -> tuple[Path | None, str | None]:
    """The folder of a model of the Hub that is on this machine, None if it has to be fetched; and why that is impossible.

    Asked once per process and model.
    """
    with suppress(OSError):
        folder = Path(snapshot_download(model, local_files_only=True))
        if (folder / "config.json").is_file() and [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]:
            return folder, None
    if is_offline_mode():
        return None, "it is not on this machine, and HF_HUB_OFFLINE forbids to fetch it"
    try:
        HfApi().model_info(model, timeout=10)
    except Exception as error:  # whatever the client raises: its transport errors are no OSError
        return None, f"it is not on this machine, and the Hub does not give it: {str(error).splitlines()[0]}"
    return None, None


class BertScore:
    """BERTScore against fixed references, with the model loaded once.

    Raises:
        ImportError: without bert-score.
        KeyError: for a name that bert-score does not know.
        OSError: if the model cannot be had.
    """

    def __init__(self, references: Sequence[Sequence[str]], settings: BertScoreSettings = MILAN):
        from bert_score import BERTScorer
        from bert_score.utils import model2layers

        self.settings = settings
        if settings.local and settings.baseline is None:
            logger.warning_once(f"BERTScore of {settings.model} is not rescaled: there is no baseline file")
        self.references = [[self._case(text) for text in texts] for texts in references]
        options: dict[str, Any] = {"idf_sents": [text for texts in self.references for text in texts]}
        name, layers = str(settings.model), settings.layers
        if not settings.local:
            layers = layers or model2layers[name]
            folder, reason = kept_folder(name)
            if reason:
                raise OSError(reason)
            name = str(folder or name)
        self._scorer = BERTScorer(
            model_type=name,
            num_layers=layers,
            lang="en",
            idf=settings.idf,
            rescale_with_baseline=not settings.local or settings.baseline is not None,
            baseline_path=self._baseline(),
            **(options if settings.idf else {}),
        )

    def __call__(self, predictions: Sequence[str]) -> torch.Tensor:
        """F1 (predictions,) with the best of the references."""
        _, _, f1 = self._scorer.score([self._case(text) for text in predictions], self.references)
        return f1

    def _baseline(self) -> str | None:
        """The file of values to rescale by: the given one, or that of the model's name, which bert-score has."""
        import bert_score

        if self.settings.local and self.settings.baseline is None:
            return None
        packaged = Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{self.settings.model}.tsv"
        file = Path(self.settings.baseline or packaged)
        if not file.is_file():
            raise FileNotFoundError(f"{file}, the values to rescale by, is not there")
        return str(file)

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
