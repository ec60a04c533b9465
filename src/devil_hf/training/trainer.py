"""One trainer for every translator: the transformers Trainer, with batches, draws and checkpoints that make resuming exact.

Every draw of a step (location and layer dropout, LoRA's dropout) comes from a seed made of the run's seed, the number of the
batch and the process, and what the step reads is a function of the same (`feed.py`): a run that goes on from a checkpoint
cannot tell that it was ever stopped. Checkpoints are written beside their place and moved there when they are whole.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from devil_hf.data.captioned import longest_caption, longest_description
from devil_hf.data.decoding import BadSamples
from devil_hf.evaluation.text.metrics import caption_scores
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.text_files import read_json
from devil_hf.training.divergence import check_loss, check_weights
from devil_hf.training.draws import draw_layer_mask
from devil_hf.training.features import PooledCaptions
from devil_hf.training.feed import CaptionCollator, CaptionStream, StreamLoader, StreamPosition, Table, seed_of, table_loader
from devil_hf.training.progress import Progress
from devil_hf.training.saving import newest_kept, save_elsewhere, write_checkpoint
from devil_hf.training.tokens import CaptionTokens

logger = logging.get_logger(f"transformers.{__name__}")

STAGING_FOLDER = ".unfinished"
SAMPLES_FILE = "descriptions.jsonl"
SAMPLE_IMAGES = 4
SAMPLE_TOKENS = 24


class DevilTrainer(Trainer):
    """Trains the translator, and LoRA where there is one; the frozen parts stay in eval mode and out of the optimiser.

    Every checkpoint is one that `AutoModel.from_pretrained` loads: slim where the frozen parts have sources, else whole.

    Args:
        model: the model to train.
        args: `max_steps` must be given; how data are loaded is decided here, but for the number of workers.
        processing_class: goes into the checkpoints.
        train_dataset: a `Table`, or a `CaptionStream`, each the same on every process.
        eval_dataset: features of validation images, of this process's share of them.
        bad_samples: where bad training samples are counted, to be logged.
        described: images of each process's share that an evaluation describes and scores against their captions.
        files: content by name of files that go into every checkpoint.
        tokens: of captions that were read before, such as when they were checked.

    Raises:
        Diverged: from `train`, when the loss or the weights are not finite any more; checkpoints that were written are finite.
        DiskFull: from `train`, when a checkpoint cannot be written; the one before stays.
    """

    def __init__(
        self,
        model: DevilModel,
        args: TrainingArguments,
        processing_class: DevilProcessor,
        train_dataset: Table | CaptionStream | None = None,
        eval_dataset: PooledCaptions | None = None,
        bad_samples: BadSamples | None = None,
        described: int = 0,
        files: Mapping[str, str] | None = None,
        tokens: CaptionTokens | None = None,
        **kwargs,
    ):
        args.remove_unused_columns = False
        args.ignore_data_skip = True  # the loader begins where it has to
        self.processor = processing_class
        self.collator = CaptionCollator(processing_class, longest_caption(model), tokens)
        self.bad_samples, self.described, self.files = bad_samples, described, dict(files or {})
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=self.collator,
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            **kwargs,
        )
        if self.pop_callback(ProgressCallback) is not None:  # it prints every record as a dictionary
            self.add_callback(Progress())
        self._batch = 0  # micro-batches that this process has trained on
        self._position = StreamPosition()
        self._staging: Path | None = None
        self._shown = torch.zeros(len(model.layer_names), device=args.device)
        self._rows, self._empty_rows, self._clock = 0, torch.zeros((), device=args.device), time.perf_counter()

    # ------------------------------------------------------------------------------------------------- data and draws

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train, from the beginning or from a checkpoint of this trainer; True takes the newest of `output_dir`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(str(self.args.output_dir))
        self._batch, self._position = 0, StreamPosition(self._stream_workers())
        if resume_from_checkpoint:
            folder = Path(str(resume_from_checkpoint))
            state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            self._batch = state.global_step * self.args.gradient_accumulation_steps
            if isinstance(self.train_dataset, CaptionStream):
                self._position = self._read_position(folder)
            if state.global_step >= self.args.max_steps or self._had_stopped(state):
                return self._take_up(folder, state)
        self._clock = time.perf_counter()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _had_stopped(self, state: TrainerState) -> bool:
        """Whether a run had ended for want of gain."""
        saved = cast(dict, state.stateful_callbacks).get("EarlyStoppingCallback")
        return saved is not None and any(
            saved["attributes"]["early_stopping_patience_counter"] >= callback.early_stopping_patience
            for callback in self._early_stopping()
        )

    def _load_callback_state(self) -> None:
        """A checkpoint gives back how long the gain has been waited for; how long it may be is this run's own setting."""
        asked = [one.early_stopping_patience for one in self._early_stopping()]
        super()._load_callback_state()
        for callback, patience in zip(self._early_stopping(), asked, strict=True):
            callback.early_stopping_patience = patience
        self.state.best_model_checkpoint = self._best_checkpoint(self.state)

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]

    def _best_checkpoint(self, state: TrainerState) -> str | None:
        """Where the best checkpoint lies: in the output folder of now, whatever that was called when it was written."""
        if not state.best_global_step:
            return None
        saved, here = (state.best_model_checkpoint, Path(str(self.args.output_dir)) / f"checkpoint-{state.best_global_step}")
        if saved is not None and Path(saved).is_dir() and not (here.is_dir() and here.samefile(saved)):
            return saved  # of another run, which this one goes on from
        if here.is_dir():
            return str(here)
        logger.warning(f"the best checkpoint, of step {state.best_global_step}, is gone; the last weights may stand in for it")
        return None

    def _take_up(self, folder: Path, state: TrainerState) -> None:
        """Load a run that had come to its end."""
        self.state = state
        self._load_from_checkpoint(str(folder))
        state.best_model_checkpoint = self._best_checkpoint(state)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()

    def _stream_workers(self) -> int:
        if not isinstance(self.train_dataset, CaptionStream):
            return 1
        processes, whole = self.args.world_size, self.train_dataset.dataset.num_shards
        if whole % processes:
            logger.warning(
                f"{whole} shards are no multiple of {processes} processes: each process reads all of them and skips what is the "
                "others', which is slow; choose a number of processes that divides that of the shards"
            )
        shards = self.train_dataset.part(self.args.process_index, self.args.world_size).dataset.num_shards
        workers = min(self.args.dataloader_num_workers, shards)
        if workers < self.args.dataloader_num_workers:
            logger.warning(f"{workers} data workers, not {self.args.dataloader_num_workers}: there are {shards} shards")
        return max(workers, 1)

    def _read_position(self, folder: Path) -> StreamPosition:
        file = folder / f"stream_{self.args.process_index}.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}: go on with as many processes as the run had before.")
        content = read_json(file)
        now = (self.args.world_size, self._position.workers)
        if (content["processes"], content["workers"]) != now:
            raise ValueError(
                f"{folder} was written by {content['processes']} processes with {content['workers']} data workers each, "
                f"not by {now[0]} with {now[1]}: a stream goes on exactly with as many as before."
            )
        return StreamPosition.of_state(content)

    def get_train_dataloader(self) -> Any:
        """Batches of this process, from the one that is next on."""
        args, data = self.args, self.train_dataset
        options = {"num_workers": args.dataloader_num_workers, "pin_memory": torch.cuda.is_available()}
        if isinstance(data, CaptionStream):
            options["num_workers"] = min(args.dataloader_num_workers, self._position.workers)
            return StreamLoader(
                data, self.collator, args.train_batch_size, self._position, args.process_index, args.world_size, **options
            )
        return table_loader(
            data,  # type: ignore[arg-type]
            self.collator,
            args.train_batch_size,
            args.seed,
            args.process_index,
            args.world_size,
            self._batch,
            **options,
        )

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One micro-batch, with draws of its own."""
        torch.manual_seed(seed_of(self.args.seed, self._batch, self.args.process_index))
        self._batch += 1
        if (place := inputs.pop("place", None)) is not None:
            self._position.advance(place)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's caption loss, with a layer mask that is drawn here, so that it can be counted."""
        config = self.accelerator.unwrap_model(self.model).config
        rows, layers = len(inputs["input_ids"]), len(self._shown)
        mask = draw_layer_mask(config, rows, layers, self.args.device)
        self._shown += (~mask).sum(dim=0)
        self._empty_rows += mask.all(dim=1).sum()
        self._rows += rows
        return super().compute_loss(model, inputs | {"layer_mask": mask}, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside a training loss, throughput and how often each layer was visible (of this process's rows)."""
        if "loss" in logs:
            check_loss(logs["loss"], self.state.global_step, self.remedy)
        if "loss" in logs and self._rows:
            names = self.accelerator.unwrap_model(self.model).layer_names
            logs |= {f"visible/{name}": share for name, share in zip(names, (self._shown / self._rows).tolist(), strict=True)}
            logs["visible/none"] = (self._empty_rows / self._rows).item()
            now = time.perf_counter()
            logs["images_per_second"] = self._rows * self.args.world_size / (now - self._clock)
            if torch.cuda.is_available():
                logs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            if self.bad_samples is not None and self.bad_samples.read:
                logs["bad_samples"] = self.bad_samples.bad / self.bad_samples.read
            self._shown.zero_()
            self._empty_rows.zero_()
            self._rows, self._clock = 0, now
        if not isinstance(self.train_dataset, CaptionStream):
            batch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            self.state.epoch = self.state.global_step * batch / len(self.train_dataset)  # type: ignore[arg-type]
        super().log(logs, start_time)

    @property
    def remedy(self) -> str:
        """What is left of a training that has diverged, and what to do about it."""
        return (
            f"{newest_kept(str(self.args.output_dir))} Lower learning_rate ({self.args.learning_rate:g}), raise warmup_steps "
            f"({self.args.warmup_steps:g}), or compute in fp32 (precision)"
        )

    # --------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss in nats per token over every caption of all processes; and what the layers add to each image's first caption.

        `loss` is what chooses the checkpoint. `evidence` is the null prefix's loss less that of all layers together,
        `evidence_LAYER` less that of one layer alone, all of them over the same first captions: how they compare with one
        another means something, with `loss` it would not. Where images are described, their caption scores follow.
        """
        data = cast(PooledCaptions, eval_dataset or self.eval_dataset)
        clock, model = time.perf_counter(), cast(DevilModel, self.model).eval()
        pairs = data.every_caption()
        names = self.accelerator.unwrap_model(model).layer_names
        sums = torch.zeros(3 + len(names), 2, dtype=torch.float64, device=self.args.device)  # (which loss, nats and tokens)
        size = self.args.eval_batch_size
        firsts = len(data)  # first captions come first, and share no batch with others
        for start in (*range(0, firsts, size), *range(firsts, len(pairs), size)):
            part = pairs[start : min(start + size, firsts) if start < firsts else start + size]
            batch = self._prepare_inputs(self.collator([self._whole(data, index, text) for index, text in part]))
            _add(sums[0], model, batch)
            if start < firsts:
                _add(sums[1], model, batch)
                for row, mask in enumerate(_masks(len(names), len(part), self.args.device), 2):
                    _add(sums[row], model, batch, mask)
        total = self.accelerator.reduce(sums, "sum")
        losses = (total[:, 0] / total[:, 1]).tolist()
        check_loss(losses[0], self.state.global_step, self.remedy)
        metrics = {"loss": losses[0], "evidence": losses[2] - losses[1]}
        metrics |= {f"evidence_{name}": losses[2] - loss for name, loss in zip(names, losses[3:], strict=True)}
        if self.described:
            metrics |= self._caption_scores(data)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - clock
        self.log(metrics)
        if self.is_world_process_zero():
            self._show_descriptions(data)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock = time.perf_counter()
        return metrics

    def _whole(self, data: PooledCaptions, index: int, text: str) -> dict[str, Any]:
        return {"pooled_features": [layer[index, 0] for layer in data.features], "caption": text}

    def _describe(self, data: PooledCaptions, images: range, layer_mask: Tensor | None = None) -> list[str]:
        """Descriptions of images; with a mask of several times as many rows, of the images again and again."""
        model = self.accelerator.unwrap_model(self.model).eval()
        times = 1 if layer_mask is None else len(layer_mask) // len(images)
        pooled = [layer[list(images), 0].repeat(times, 1).to(self.args.device).float() for layer in data.features]
        length = longest_description(model, SAMPLE_TOKENS)
        tokens = model.decode(model.translate(pooled, layer_mask), max_new_tokens=length)
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _caption_scores(self, data: PooledCaptions) -> dict[str, float]:
        images, size = min(self.described, len(data)), self.args.eval_batch_size
        texts = [
            text for start in range(0, images, size) for text in self._describe(data, range(start, min(start + size, images)))
        ]
        found = gather_object(list(zip(texts, data.captions[:images], strict=True)))
        scores: list[dict[str, float]] = [{}]
        if self.is_world_process_zero():
            scores = [caption_scores([text for text, _ in found], [captions for _, captions in found])]
        if self.args.world_size > 1:
            broadcast_object_list(scores)
        return scores[0]

    def _show_descriptions(self, data: PooledCaptions) -> None:
        """What all layers and each layer alone say of a few validation images, into a file and the trackers."""
        images = range(min(SAMPLE_IMAGES, len(data)))
        names = ["all", *self.accelerator.unwrap_model(self.model).layer_names]
        _, *alone = _masks(len(names) - 1, len(images), self.args.device)
        texts = self._describe(data, images, torch.cat([torch.zeros_like(alone[0]), *alone]))  # in one go
        rows = {name: texts[i * len(images) : (i + 1) * len(images)] for i, name in enumerate(names)}
        captions = [data.captions[i][0] for i in images]
        record = {"step": self.state.global_step, "captions": captions, "descriptions": rows}
        try:
            with (Path(str(self.args.output_dir)) / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            logger.warning(f"{SAMPLES_FILE} lacks the descriptions of step {self.state.global_step}: {error}")
        lines = [f"| {'layer'} | " + " | ".join(captions) + " |", "|---" * (len(images) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(texts) + " |" for name, texts in rows.items()]
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("descriptions", "\n".join(lines), self.state.global_step)
        for name in ("wandb", "trackio"):
            if name in (self.args.report_to or []):
                tracker = __import__(name)
                table = tracker.Table(
                    columns=["layer", "image", "description"],
                    data=[[layer, i, text] for layer, texts in rows.items() for i, text in enumerate(texts)],
                )
                tracker.log({"descriptions": table})

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint beside its place, and move it there when every process has written its part."""
        trained = self.accelerator.unwrap_model(self.model).trainable_state_dict()
        check_weights(trained, self.state.global_step, self.remedy)
        output_dir = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = output_dir / STAGING_FOLDER
        best = self.state.best_model_checkpoint
        if self.is_world_process_zero():
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            whole = self._staging / name
            if isinstance(self.train_dataset, CaptionStream):
                whole.mkdir(parents=True, exist_ok=True)
                content = self._position.state() | {"processes": self.args.world_size}
                (whole / f"stream_{self.args.process_index}.json").write_text(json.dumps(content), encoding="utf-8")
            if self.state.best_global_step == self.state.global_step:
                best = str(output_dir / name)
            self.state.best_model_checkpoint = best
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(whole / "trainer_state.json"))
                shutil.rmtree(output_dir / name, ignore_errors=True)
                os.replace(whole, output_dir / name)
                rotate_checkpoints(
                    output_dir=str(output_dir), save_total_limit=self.args.save_total_limit, best_model_checkpoint=best
                )
            self.accelerator.wait_for_everyone()
        except Exception as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            own: DevilModel = self.accelerator.unwrap_model(self.model)
            slim, kept = not own.parts_without_source, newest_kept(output_dir)
            save_elsewhere(error, output_dir / name, kept, own, self.processor, self.files, slim)
        finally:
            self._staging = None

    def _issue_warnings_after_load(self, load_result) -> None:
        """Slim checkpoints lack the frozen weights, which are where they were; what is trained must all be there."""
        trained = self.accelerator.unwrap_model(self.model).trainable_state_dict()
        wrong = sorted(set(load_result.missing_keys) & set(trained)) + sorted(load_result.unexpected_keys)
        if wrong:
            raise ValueError(f"the checkpoint is not one of this recipe: {len(wrong)} weights differ, {wrong[0]} among them.")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            model: DevilModel = self.accelerator.unwrap_model(self.model)
            write_checkpoint(folder, model, self.processor, self.files, not model.parts_without_source, state_dict)


def _masks(layers: int, rows: int, device):
    """Layer masks (rows, L): everything hidden, then every layer visible alone."""
    hidden = torch.ones(layers, dtype=torch.bool, device=device)
    yield hidden.expand(rows, -1)
    for layer in range(layers):
        mask = hidden.clone()
        mask[layer] = False
        yield mask.expand(rows, -1)


def _add(sums: Tensor, model, batch: dict[str, Any], layer_mask: Tensor | None = None) -> None:
    """Add the summed loss of a batch and the number of its tokens to `sums` (2,)."""
    tokens = batch["attention_mask"].sum()
    if model.config.eos_token_id is not None:
        tokens = tokens + len(batch["input_ids"])
    sums[0] += model(**batch, layer_mask=layer_mask).loss * tokens
    sums[1] += tokens


__all__ = ["DevilTrainer"]
