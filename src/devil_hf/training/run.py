"""A run by recipe: everything is opened and checked, then trained, and the best checkpoint is left in its place."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from devil_hf.build import from_backbone_and_language_model, image_processor_of, merge_lora
from devil_hf.build.lora_devil import LORA_DEFAULTS
from devil_hf.build.sources import select_layers
from devil_hf.checkpoints.identity import frozen_identity, network_identity
from devil_hf.checkpoints.loading import load
from devil_hf.checkpoints.publishing import HUB, PUBLISHERS
from devil_hf.data.captioned import longest_caption
from devil_hf.data.decoding import BadSamples, PairDecoder, PairTable
from devil_hf.data.identity import PairIdentities
from devil_hf.data.pairs import open_pairs
from devil_hf.folders import claimed, need_room, written
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.settings import make, read_yaml
from devil_hf.text_files import read_json
from devil_hf.training.divergence import check_weights
from devil_hf.training.feature_cache import CachedFeatures, cache_bytes, cache_key, cached_features, image_transform, open_cache
from devil_hf.training.features import PooledCaptions, pooled_feature_draws
from devil_hf.training.feed import CaptionStream, ImageTable, sees_with
from devil_hf.training.needed import check_sources
from devil_hf.training.recipe import CHECKPOINT_FOLDER, RECIPE_FILE, Recipe
from devil_hf.training.saving import newest_kept, save_elsewhere, write_checkpoint
from devil_hf.training.tokens import CaptionTokens
from devil_hf.training.trainer import DevilTrainer

logger = logging.get_logger(f"transformers.{__name__}")

DATA_FILE = "data.json"  # in the checkpoints of a run: what its data and its frozen parts were
FROZEN = "the frozen parts"
CONTENT = {FROZEN: "weights, settings, preprocessing or tokenizer"}
# By what is hashed, the fields that say what it is.
DECIDES = {
    "train_data": ("train_data",),
    "validation_data": ("validation_data", "validation_images"),
    FROZEN: (
        *("checkpoint", "backbone", "backbone_revision", "backbone_kwargs", "layers", "class_tokens", "resize"),
        *("language_model", "language_model_revision", "tokenizer_revision"),
    ),
}
ADAM_COPIES = 3  # the trained weights and two moments of each


def train(recipe: Recipe) -> Path:
    """Train by a recipe, on as many processes as it is launched with.

    Returns:
        The folder of the final checkpoint (the best by validation loss where there are validation data), with its processor and
        the recipe.

    Raises:
        OSError: for files and sources that are not there, and when the disk has no room for the run.
        ValueError: for whatever else is wrong with the recipe, before the first step.
        TooManyBadSamples: when more of the data than the recipe allows cannot be used.
        FolderInUse: when another run works in the output folder, or computes the feature cache.
        Diverged: when loss or weights are not finite any more.
    """
    recipe = make(Recipe, vars(recipe))  # one that was built in Python is checked, too
    _check_launch(recipe)
    check_sources(recipe)
    arguments = training_arguments(recipe)
    device, state = arguments.device, PartialState()  # in this order: the arguments choose the backend
    if recipe.processes and state.num_processes != recipe.processes:
        raise ValueError(
            f"the run has {state.num_processes} processes, not the {recipe.processes} that the recipe asks for: launch it "
            f"with `accelerate launch --multi_gpu --num_processes {recipe.processes}` (on a machine without GPUs, too)."
        )
    logger.warning(f"training on {state.num_processes} process{'es' * (state.num_processes > 1)}, {device}")
    with claimed(recipe.output_dir, "a training", state.is_main_process):
        return _train(recipe, arguments, device)


def _train(recipe: Recipe, arguments: TrainingArguments, device: torch.device) -> Path:
    newest = _newest_checkpoint(recipe)
    if recipe.push_to_hub:
        PUBLISHERS[HUB].check_name(recipe.push_to_hub)
        HfApi().whoami()  # a missing or wrong token is an error now, not after the last step
    set_seed(recipe.seed)
    model, processor = build(recipe)
    dataset = open_pairs(recipe.train_data, recipe.seed, shuffle=False)
    data = _known_data(recipe, dataset, newest) | {FROZEN: frozen_identity(model, processor)}
    if newest:
        check_data(recipe, {FROZEN: data[FROZEN]}, Path(newest))
    key = _cache_key(recipe, model, processor, data)
    _check_saving(recipe, model, cache_bytes(Path(recipe.cache_features), key, model, dataset) if key else 0)
    if key:
        open_cache(Path(recipe.cache_features), key, model, dataset)
    longest_caption(model)  # raises where there is no room for one
    torch.nn.Module.to(model, device)
    tokens, validation = CaptionTokens(processor), None
    if recipe.validation_data:  # before features are cached, which may take hours
        validation = kept_validation_features(recipe, model, processor, data["validation_data"], tokens)
    bad_samples = BadSamples(recipe.bad_samples)
    training = _training_data(recipe, model, processor, dataset, bad_samples, key, tokens)
    trainer = DevilTrainer(
        model,
        arguments,
        processor,
        train_dataset=training,
        eval_dataset=validation,
        bad_samples=bad_samples,
        described=recipe.describe_validation,
        files={RECIPE_FILE: recipe.to_yaml(), DATA_FILE: json.dumps(data)},
        tokens=tokens,
        callbacks=[EarlyStoppingCallback(recipe.patience)] if recipe.patience else None,
    )
    trainer.train(resume_from_checkpoint=newest)
    bad_samples.judge()  # a short run reads too few to be judged on the way
    if bad_samples.out_of_sight:
        logger.warning(f"training data: {bad_samples}; the latter were left out")
    return _finish(recipe, trainer)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """What the transformers Trainer has to know of a recipe."""
    validate = bool(recipe.validation_data)
    on_gpu = torch.accelerator.is_available()
    bf16 = recipe.precision == "bf16" or (
        recipe.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    linear = recipe.schedule == "linear"
    return TrainingArguments(
        output_dir=recipe.output_dir,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="polynomial" if linear else "cosine_with_min_lr",
        lr_scheduler_kwargs={"lr_end" if linear else "min_lr": recipe.final_learning_rate},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.gradient_norm,
        eval_strategy="steps" if validate else "no",
        eval_steps=recipe.evaluation_steps,
        save_strategy="steps",
        save_steps=recipe.steps_between_checkpoints,
        save_total_limit=recipe.keep_checkpoints,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not a number has to be seen
        load_best_model_at_end=validate,
        metric_for_best_model="eval_loss" if validate else None,
        greater_is_better=False if validate else None,
        restore_callback_states_from_checkpoint=True,
        dataloader_num_workers=recipe.workers,
        ddp_find_unused_parameters=True,  # a layer that a whole batch hides is not computed
        bf16=bf16,
        use_cpu=not on_gpu,
        seed=recipe.seed,
        report_to=recipe.trackers,
    )


def build(recipe: Recipe) -> tuple[DevilModel, DevilProcessor]:
    """The model that a recipe trains, and its processor."""
    if recipe.checkpoint:
        return _build_on_checkpoint(recipe)
    revision = recipe.language_model_revision or None
    tokenizer = AutoTokenizer.from_pretrained(recipe.language_model, revision=recipe.tokenizer_revision or revision or "main")
    model = from_backbone_and_language_model(
        recipe.backbone,
        recipe.language_model,
        recipe.layers,
        tokenizer=tokenizer,
        backbone_revision=recipe.backbone_revision or None,
        language_model_revision=revision,
        class_tokens=recipe.class_tokens,
        backbone_kwargs=recipe.backbone_kwargs,
        lora=recipe.lora,
        **recipe.model,
    )
    data_config = model.config.backbone_config["data_config"]
    image_processor = image_processor_of(data_config, resize=recipe.resize)
    return model, DevilProcessor(image_processor, tokenizer)


def _build_on_checkpoint(recipe: Recipe) -> tuple[DevilModel, DevilProcessor]:
    loaded, processor = load(recipe.checkpoint, device="cpu")
    config = loaded.config
    if recipe.lora is not None and config.lora is not None and LORA_DEFAULTS | recipe.lora != LORA_DEFAULTS | config.lora:
        raise ValueError(
            f"{recipe.checkpoint} has LoRA adapters already ({config.lora}): leave lora out to train them on, or merge them."
        )
    if recipe.lora is None and not recipe.new_translator:
        return loaded, processor
    fields = recipe.model | ({} if recipe.lora is None else {"lora": recipe.lora})
    settings = config.to_dict() | fields | {"frozen_weights": "embedded"}
    backbone = loaded.backbone if recipe.layers is None else select_layers(loaded.backbone, recipe.layers)
    settings |= {"text_config": config.text_config, "backbone_config": backbone.config}
    known = {option.name for option in dataclasses.fields(type(config))}
    fresh = type(config)(**{name: value for name, value in settings.items() if name in known})
    model = DevilModel(fresh, backbone=backbone, language_model=loaded.language_model)
    if not recipe.new_translator:
        model.translator.load_state_dict(loaded.translator.state_dict())
    return model.eval(), processor


# --------------------------------------------------------------------------------------------------------------- data


def _known_data(recipe: Recipe, dataset: Dataset | IterableDataset, newest: str | None) -> dict[str, str]:
    """`data_hashes`, the same on all processes, checked by `check_data`."""
    found: list[dict[str, str]] = [{}]
    if PartialState().is_main_process:
        found[0] = data_hashes(recipe, dataset)
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    if newest:
        check_data(recipe, found[0], Path(newest))
    return found[0]


def data_hashes(recipe: Recipe, dataset: Dataset | IterableDataset | None = None) -> dict[str, str]:
    """Hashes of what a recipe trains and validates on, by its fields.

    Args:
        dataset: its `train_data`, where they are open.

    Raises:
        OSError, ValueError: for data that cannot be opened.
    """
    opened = open_pairs(recipe.train_data, recipe.seed, shuffle=False) if dataset is None else dataset
    found = {"train_data": PairIdentities(recipe.train_data, opened).all()}
    if recipe.validation_data:
        validation = open_pairs(recipe.validation_data, recipe.seed, shuffle=False)
        if isinstance(validation, Dataset):
            validation = validation.select(range(min(recipe.validation_images, len(validation))))
        found["validation_data"] = PairIdentities(recipe.validation_data, validation).all()
    return found


def check_data(recipe: Recipe, hashes: Mapping[str, str], newest: Path) -> None:
    """Raise a ValueError when the data or frozen parts of a run are not those that its newest checkpoint was trained on.

    Args:
        hashes: see `data_hashes` and `frozen_identity`. What the recipe asks for otherwise than before is not compared.
    """
    file = newest / DATA_FILE
    if not file.is_file():
        return
    before, fields = read_json(file), read_yaml(Recipe, newest)
    for name, now in hashes.items():
        asked_as_before = all(fields[field] == getattr(recipe, field) for field in DECIDES[name])
        if asked_as_before and before.get(name, now) != now:
            raise ValueError(
                f"the {CONTENT.get(name, 'images or captions')} of {name} have changed since {newest}: going on would be another "
                f"run. Give them back, name another --output_dir, or remove {file} to go on with them as they are."
            )


def _cache_key(recipe: Recipe, model: DevilModel, processor: DevilProcessor, data: dict[str, str]) -> dict[str, Any]:
    """What the feature cache depends on; empty without one."""
    if not recipe.cache_features:
        return {}
    drawn = (recipe.views, recipe.draws, recipe.smallest_crop, recipe.cache_seed)
    return cache_key(model, processor, data["train_data"], *drawn)


def _training_data(
    recipe: Recipe,
    model: DevilModel,
    processor: DevilProcessor,
    dataset: Dataset | IterableDataset,
    bad_samples: BadSamples,
    key: dict[str, Any],
    tokens: CaptionTokens,
) -> ImageTable | CaptionStream | CachedFeatures:
    decoder = PairDecoder(bad_samples, recipe.seed, sees_with(processor), tokens.read)
    if key:
        return cached_features(Path(recipe.cache_features), key, model, processor, dataset, decoder, sample_seed=recipe.seed)
    if isinstance(dataset, Dataset):
        if not len(dataset):
            raise ValueError(f"train_data {recipe.train_data} hold not one image with a caption")
        return ImageTable(PairTable(dataset, decoder), recipe.smallest_crop)
    shuffled = open_pairs(recipe.train_data, recipe.seed, shuffle=True, shuffle_buffer=recipe.shuffle_buffer)
    return CaptionStream(cast(IterableDataset, shuffled), decoder, recipe.smallest_crop)


def kept_validation_features(
    recipe: Recipe, model: DevilModel, processor: DevilProcessor, data: str, tokens: CaptionTokens
) -> PooledCaptions:
    """`validation_features`, computed once: they are kept with the feature cache, or in the output folder.

    Args:
        data: hash of the validation data.
        tokens: see `validation_features`.
    """
    state = PartialState()
    key = [data, recipe.validation_data, recipe.validation_images, recipe.bad_samples, model.layer_names]
    backbone = model.config.backbone_config
    key += [backbone["sha256"], network_identity(backbone), image_transform(processor)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
    name = f"validation-{digest}-{state.process_index}-of-{state.num_processes}.safetensors"
    file = _place(name, recipe)
    there = gather_object([file.is_file()])  # all together or not at all: they are counted together
    if all(there):
        with safe_open(file, "pt") as content:
            features = [content.get_tensor(f"layer.{index}") for index in range(len(model.layer_names))]
            return PooledCaptions(features, json.loads(content.metadata()["captions"]), recipe.seed)
    found = validation_features(recipe, model, processor, tokens)
    with written(file) as unfinished:
        tensors = {f"layer.{index}": layer.contiguous() for index, layer in enumerate(found.features)}
        save_file(tensors, unfinished, {"captions": json.dumps([list(texts) for texts in found.captions])})
    return found


def _place(name: str, recipe: Recipe) -> Path:
    """Where a file of validation features is, or else can be: with the feature cache, unless nothing can be written there."""
    kept, own = Path(recipe.cache_features or recipe.output_dir) / name, Path(recipe.output_dir) / name
    return kept if kept.is_file() or os.access(kept.parent, os.W_OK) or not kept.parent.exists() else own


def validation_features(
    recipe: Recipe, model: DevilModel, processor: DevilProcessor, tokens: CaptionTokens | None = None
) -> PooledCaptions:
    """Features of this process's share of the validation images, each whole; every process has at least one of them.

    Args:
        tokens: remembers those of the captions.

    Raises:
        ValueError: when there are fewer validation images than processes.
        TooManyBadSamples: when too many of them cannot be used.
    """
    state = PartialState()
    dataset = open_pairs(recipe.validation_data, recipe.seed, shuffle=False)
    bad_samples = BadSamples(recipe.bad_samples)
    decoder = PairDecoder(bad_samples, recipe.seed, read=(tokens or CaptionTokens(processor)).read)
    rows = itertools.islice(dataset, recipe.validation_images)
    own = itertools.islice(rows, state.process_index, None, state.num_processes)
    captions: list[list[str]] = []

    def batches(size: int = 32):
        while chunk := list(itertools.islice(own, size)):
            samples = [sample for sample in map(decoder, chunk) if sample is not None]
            captions.extend(sample["captions"] for sample in samples)
            if samples:
                images = [sample["image"] for sample in samples]
                yield processor(images=images, return_tensors="pt")["pixel_values"]

    own_batches = batches()
    first = next(own_batches, None)
    if not min(gather_object([first is not None])):  # on every process alike, so that none waits for another
        raise ValueError(
            f"validation_data {recipe.validation_data} hold fewer usable images than the run has processes "
            f"({state.num_processes}): every process needs one."
        )
    features = pooled_feature_draws(
        model,
        itertools.chain([cast(torch.Tensor, first)], own_batches),
        description="validation features",
        progress=state.is_local_main_process,
    )
    bad_samples.judge()
    return PooledCaptions(features, captions, recipe.seed)


# ------------------------------------------------------------------------------------------------- before and after


def _newest_checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to go on from; None at the beginning."""
    folder = Path(recipe.output_dir)
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if newest is None:
        return None
    if not recipe.resume:
        raise ValueError(f"{newest} is there from an earlier run: --resume to go on from it, or name another --output_dir.")
    file = Path(newest) / RECIPE_FILE
    if file.is_file() and (changed := recipe.differences(read_yaml(Recipe, file))):
        logger.warning(f"going on from {newest}, but its recipe had other values of {changed}: this is another run")
    return newest


def _check_launch(recipe: Recipe) -> None:
    """Refuse launchers that shard the weights where there is validation, whose batches differ from process to process."""
    fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    zero_3 = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and stage == "3"
    if recipe.validation_data and (fsdp or zero_3):
        raise ValueError(
            f"{'FSDP' if fsdp else 'DeepSpeed ZeRO-3'} shards the weights, with which validation_data cannot be evaluated: "
            "launch with `accelerate launch --multi_gpu` (each process holds the whole model), or leave validation_data out."
        )


def _is_slim(recipe: Recipe, model: DevilModel) -> bool:
    """Whether the final checkpoint leaves the frozen parts out."""
    return recipe.save == "slim" or (recipe.save == "auto" and not model.parts_without_source)


def _check_saving(recipe: Recipe, model: DevilModel, cache: int = 0) -> None:
    """Raise an error when the run could not be saved as it should be: no such kind of checkpoint, or no room on the disk.

    Args:
        cache: bytes that the feature cache still needs.
    """
    if recipe.save == "slim" and model.parts_without_source:
        raise ValueError("save='slim' needs sources of both frozen parts, which this model does not have: use save='full'")
    if recipe.save == "merged" and model.config.lora is None:
        raise ValueError("save='merged' merges LoRA adapters, but the model has none")
    slim = _is_slim(recipe, model)
    if recipe.push_to_hub:
        try:
            PUBLISHERS[HUB].check_parts(model, slim)
        except ValueError as error:
            raise ValueError(f"push_to_hub={recipe.push_to_hub!r}: {error}. In a recipe that is save='full'.") from error

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    trained = size(model.trainable_state_dict().values())
    frozen = size(model.state_dict().values()) - trained
    kept = frozen if model.parts_without_source else 0
    final = 0 if slim else frozen
    place = Path(recipe.output_dir)
    place.mkdir(parents=True, exist_ok=True)
    # One more than is kept is there while the newest is written; the best one may be kept beside them.
    checkpoints = recipe.keep_checkpoints + 2
    if not recipe.keep_checkpoints:  # all of them, of which some may be there
        checkpoints = -(-recipe.max_steps // recipe.steps_between_checkpoints) - len(list(place.glob("checkpoint-*")))
    needed = max(checkpoints, 1) * (ADAM_COPIES * trained + kept) + trained + final
    what = "all that the run keeps"
    if cache:
        Path(recipe.cache_features).mkdir(parents=True, exist_ok=True)
        if os.stat(recipe.cache_features).st_dev == os.stat(place).st_dev:
            needed, what = needed + cache, f"{what}, of which {cache / 1e9:.1f} GB are cached features,"
    need_room(place, needed, what, "name another --output_dir, or lower --keep_checkpoints (or --draws of cached features)")


def _finish(recipe: Recipe, trainer: DevilTrainer) -> Path:
    """Save what was trained, and push it where the recipe says so."""
    checkpoint = Path(recipe.output_dir) / CHECKPOINT_FOLDER
    model: DevilModel = trainer.accelerator.unwrap_model(trainer.model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if trainer.is_world_process_zero():
        if recipe.save == "merged":
            merge_lora(model)
            state_dict = None
        slim, files = _is_slim(recipe, model), {RECIPE_FILE: recipe.to_yaml()}
        ended = model.state_dict() if recipe.save == "merged" else model.trainable_state_dict()
        check_weights(state_dict or ended, trainer.state.global_step, trainer.remedy)
        try:
            with written(checkpoint) as unfinished:
                write_checkpoint(unfinished, model, trainer.processor, files, slim, state_dict)
        except OSError as error:
            kept = newest_kept(recipe.output_dir)
            save_elsewhere(error, checkpoint, kept, model, trainer.processor, files, not model.parts_without_source)
    trainer.accelerator.wait_for_everyone()  # the others need not wait for the push, which may take long
    if recipe.push_to_hub and trainer.is_world_process_zero():
        PUBLISHERS[HUB].push(checkpoint, recipe.push_to_hub, commit_message="Trained by devil-hf")
    return checkpoint


__all__ = ["build", "check_data", "data_hashes", "train", "training_arguments", "validation_features"]
