"""A new model from pretrained parts, one with another backbone, and a plain one from one with adapters."""

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from devil_hf.build.lora_devil import check_lora, lora_layers
from devil_hf.build.preprocessing import image_processor_of
from devil_hf.build.slim_devil import load_language_model
from devil_hf.build.sources import backbone_from_source
from devil_hf.model.backbone_devil import FeatureBackbone
from devil_hf.model.checkpoint_devil import weights_hash
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor

logger = logging.get_logger(f"transformers.{__name__}")


def from_backbone_and_language_model(
    backbone: str | PathLike | nn.Module,
    language_model: str | PathLike | PreTrainedModel,
    layers: str | int | Sequence[str | int] | None = None,
    *,
    tokenizer: Any = None,
    class_tokens: bool = False,
    backbone_kwargs: dict | None = None,
    backbone_revision: str | None = None,
    language_model_revision: str | None = None,
    token: str | None = None,
    attn_implementation: str | None = None,
    dtype: torch.dtype | None = None,
    **config_fields: Any,
) -> DevilModel:
    """Put an untrained translator between a pretrained backbone and a pretrained language model.

    Args:
        backbone: a timm or transformers id, a local directory of either, or an already built module.
        language_model: an id, a local directory, or an already built causal language model.
        layers: names or indices of the backbone's layers; None chooses its stages (four blocks of a ViT).
        tokenizer: the language model's tokenizer; its special tokens win over those of the model's configuration.
        class_tokens: also read each ViT layer's class token, as a layer of its own.
        backbone_kwargs: further arguments of the backbone's architecture (`pad_type="same"`, `img_size=...`).
        dtype: of the translator and of parts loaded here (None: fp32); modules keep the dtype and device they have, and
            are frozen as they are.
        config_fields: fields of `DevilConfig`.

    Raises:
        TypeError: for arguments that are no field of `DevilConfig`.
        ValueError: for arguments that an already built module cannot follow.
    """
    known = {option.name for option in dataclasses.fields(DevilConfig)}
    if unknown := sorted(set(config_fields) - known):
        raise TypeError(f"unknown arguments {unknown}: further arguments are fields of DevilConfig.")
    check_lora(config_fields.get("lora") or {})
    if isinstance(backbone, FeatureBackbone) and (layers is not None or class_tokens or backbone_kwargs):
        raise ValueError("a FeatureBackbone brings its layers: choose them when building it.")
    if isinstance(language_model, nn.Module) and attn_implementation is not None:
        raise ValueError(f"attn_implementation={attn_implementation!r} is for a language model that is loaded here.")
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(backbone, FeatureBackbone):
        given = isinstance(backbone, nn.Module)
        options: dict[str, Any] = {"class_tokens": class_tokens, "backbone_kwargs": backbone_kwargs}
        backbone = backbone_from_source(backbone, layers, revision=backbone_revision, token=token, **options)
        backbone = backbone if given else backbone.to(dtype)
    source = None
    if not isinstance(language_model, nn.Module):
        language_model, source = _sourced_language_model(language_model, language_model_revision, token, attn_implementation)
        nn.Module.to(language_model, dtype)
    _check_language_model(language_model)
    parts = {"text_config": language_model.config, "language_model_source": source}
    fields = parts | _special_tokens(tokenizer, language_model.config) | config_fields
    if fields["pad_token_id"] is None:
        fields["pad_token_id"] = fields["eos_token_id"]
    config = DevilConfig(backbone_config=backbone.config, **fields)
    model = DevilModel(config, backbone=backbone, language_model=language_model)
    model.translator.to(device=model.get_input_embeddings().weight.device, dtype=dtype)
    return model.eval()


def _sourced_language_model(
    source: str | PathLike, revision: str | None, token: str | None, attn_implementation: str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A language model in fp32, with its source: the hash does not depend on the dtype asked for."""
    place = os.path.abspath(source) if os.path.isdir(source) else str(source)
    language_model, commit = load_language_model(place, revision, attn_implementation, token=token)
    return language_model, {"source": place, "revision": commit, "sha256": weights_hash(language_model)}


def _check_language_model(language_model: Any) -> None:
    """Raise an error for what is no causal language model of transformers that reads embeddings."""
    name = type(language_model).__name__
    if not isinstance(language_model, PreTrainedModel):
        raise TypeError(f"{name} is no language model of transformers: give an id, a directory, or one that it loaded.")
    if getattr(language_model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder: DeViL needs a causal language model, such as OPT, GPT-2 or Llama.")
    if language_model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM.")
    embedding = language_model.get_input_embeddings()
    if not isinstance(embedding, nn.Module) or not hasattr(embedding, "weight"):
        raise ValueError(f"{name} has no input embedding table, so it cannot read a prefix: choose another language model.")


def _special_tokens(tokenizer: Any, text_config: Any) -> dict[str, int | None]:
    """BOS, EOS and padding of the tokenizer, else of the language model."""
    found: dict[str, int | None] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name, None)
        token = getattr(text_config, name, None) if token is None else token
        token = token[0] if isinstance(token, list | tuple) else token
        found[name] = None if token is not None and token < 0 else token  # -1 stands for none in some configurations
    return found


def merge_lora(model: DevilModel) -> DevilModel:
    """Add the LoRA adapters to the language model's weights, in place; the model can then only be saved self-contained.

    Raises:
        ValueError: for a model without adapters.
    """
    if model.config.lora is None:
        raise ValueError("this model has no LoRA adapters to merge.")
    language_model: Any = model.language_model
    for name, layer in list(lora_layers(language_model)):
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(language_model.get_submodule(parent), child, layer.get_base_layer())
    del language_model.peft_config
    model.config.lora = model.config.language_model_source = None
    model.freeze()
    return model


def with_backbone(
    model: DevilModel, processor: DevilProcessor, weights: str | PathLike | nn.Module
) -> tuple[DevilModel, DevilProcessor]:
    """The same translator and language model behind another network with the same features, and the processor of its images.

    Args:
        weights: a safetensors file of the backbone's weights; a folder or Hub id of timm or transformers; or a network. The
            layers that the translator reads are looked for by name, and must be as wide.

    Raises:
        OSError: for weights that cannot be read.
        ValueError: for weights of another architecture, and for layers that are not there or not as wide.
    """
    own = model.backbone
    if not isinstance(weights, nn.Module) and str(weights).endswith(".safetensors"):
        backbone = copy.deepcopy(own)
        backbone.module.load_state_dict(_read_weights(Path(weights), own.module.state_dict()))
    else:
        if isinstance(weights, FeatureBackbone):
            backbone = weights
        else:
            backbone = backbone_from_source(weights, own.layers)
            processor = DevilProcessor(image_processor_of(backbone.config["data_config"]), processor.tokenizer)
        wanted = dict(zip(own.layers, own.channels, strict=True))
        found = dict(zip(backbone.layers, backbone.channels, strict=True))
        if found != wanted:
            raise ValueError(f"the translator reads layers of so many channels: {wanted}, but this network has {found}.")
    shared = {id(part): part for part in (model.language_model, model.translator, own)}
    twin = copy.deepcopy(model, shared)
    twin.backbone = backbone.to(model.device)
    return twin.eval(), processor


def _read_weights(file: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names that a network has; those of a head that the network has not are left out."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        found = {name.removeprefix("backbone.").removeprefix("module."): one for name, one in load_file(file).items()}
    except SafetensorError as error:
        raise OSError(f"{file} is no safetensors file: {error}") from error
    for name, own in wanted.items():
        if name not in found or found[name].shape != own.shape:
            has = f"is of shape {tuple(found[name].shape)}" if name in found else "is not there"
            raise ValueError(f"{file} holds another architecture: {name} {has}, and must be of shape {tuple(own.shape)}.")
    if beside := sorted(found.keys() - wanted.keys()):
        logger.warning(f"{file}: {len(beside)} weights are of no part that is read, {beside[0]} among them")
    return {name: found[name] for name in wanted}
