"""Training on annotated units: exemplars pooled per unit, and what people wrote about them, as captions."""

from collections.abc import Sequence

from transformers import TrainingArguments

from devil_hf.data.milan import SeveralUnits
from devil_hf.data.unit_features import encoded_features
from devil_hf.modeling_devil import DevilModel
from devil_hf.processing_devil import DevilProcessor
from devil_hf.training.features import PooledCaptions
from devil_hf.training.trainer import DevilTrainer


def unit_captions(
    model: DevilModel, processor: DevilProcessor, units: SeveralUnits | Sequence, every_caption: bool = False
) -> PooledCaptions:
    """Annotated units as a data set of the common trainer.

    Args:
        units: with summaries, such as the two sides of `open_milan`.
        every_caption: one item per summary (validation) instead of one per unit with a summary drawn each time.
    """
    pooled = encoded_features(model, processor, units)  # type: ignore[arg-type]
    features = [layer[:, None].half() for layer in pooled.features if layer is not None]
    return PooledCaptions(features, [list(unit_summaries) for unit_summaries in _summaries(units)], every_caption)


def train_on_units(
    model: DevilModel, processor: DevilProcessor, units: SeveralUnits | Sequence, arguments: TrainingArguments
) -> DevilTrainer:
    """Train the translator on annotated units with the common trainer, which comes back when it is done.

    Args:
        units: those for training; a checkpoint is never chosen by test units.
    """
    trainer = DevilTrainer(model, arguments, processor, train_dataset=unit_captions(model, processor, units))
    trainer.train()
    model.eval()
    return trainer


def _summaries(units) -> list[tuple[str, ...]]:
    return units.summaries if isinstance(units, SeveralUnits) else [units[at].summaries for at in range(len(units))]
