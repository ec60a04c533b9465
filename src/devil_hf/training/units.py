"""Training on annotated units: exemplars pooled per unit, and what people wrote about them, as captions."""

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainingArguments

from devil_hf.data.milan import SeveralUnits
from devil_hf.data.unit_features import encoded_features
from devil_hf.evaluation.milan import UNIT_TRAINERS, MilanEvaluator
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.training.features import PooledCaptions
from devil_hf.training.trainer import DevilTrainer


def unit_captions(model: DevilModel, processor: DevilProcessor, units: SeveralUnits | Sequence) -> PooledCaptions:
    """Annotated units as a data set of the common trainer; silent ones, which show nothing, are left out.

    Args:
        units: with summaries, such as the two sides of `open_milan`.
    """
    pooled = encoded_features(model, processor, units)  # type: ignore[arg-type]
    keep = ~pooled.silent
    features = [layer[keep, None].half() for layer in pooled.features if layer is not None]
    texts = [list(own) for own, kept in zip(_summaries(units), keep.tolist(), strict=True) if kept]
    return PooledCaptions(features, texts)


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


@UNIT_TRAINERS.register("translator")
def train_before_evaluation(run: MilanEvaluator) -> None:
    """What `devil evaluate neurons --train-steps` does first; the checkpoint is kept in its output folder."""
    asked, folder = run.settings, Path(run.settings.output_dir)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=asked.train_steps,
        per_device_train_batch_size=64,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=asked.train_steps // 20,
        save_strategy="no",
        logging_steps=max(asked.train_steps // 20, 1),
        report_to=[],
        use_cpu=asked.device == "cpu",
        seed=asked.seed,
    )
    train_on_units(run.model, run.processor, run.training, arguments).save_model(str(folder / "checkpoint"))


def _summaries(units) -> list[tuple[str, ...]]:
    return units.summaries if isinstance(units, SeveralUnits) else [units[at].summaries for at in range(len(units))]


__all__ = ["train_before_evaluation", "train_on_units", "unit_captions"]
