"""How a DeViL model is built, saved and loaded.

Two kinds of checkpoint load alike through `from_pretrained`: self-contained ones hold every weight; slim ones hold what was
trained, and name the sources of the frozen parts with revision and a hash of their weights, which is verified on loading.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .backbone_devil import FeatureBackbone, source_state_dict, weights_hash
from .baselines_devil import TRANSLATORS
from .configuration_devil import DevilConfig
from .lora_devil import LORA_NAME, add_lora, lora_layers, merge_lora

logger = logging.get_logger(__name__)

WEIGHTS_FILE = "model.safetensors"
TRAINED_PREFIX = "translator."
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText")


class DevilPreTrainedModel(PreTrainedModel):
    """Building, saving and loading of DeViL models."""

    config_class = DevilConfig
    base_model_prefix = "devil"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = False
    # The Trainer need not count label tokens: the loss is a mean over the batch's own.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["FeatureBackbone", *(translator.__name__ for translator in TRANSLATORS.values())]

    @classmethod
    def from_backbone_and_language_model(
        cls,
        backbone: str | PathLike | nn.Module,
        language_model: str | PathLike | PreTrainedModel,
        layers=None,
        *,
        tokenizer=None,
        class_tokens: bool = False,
        backbone_kwargs: dict | None = None,
        backbone_revision: str | None = None,
        language_model_revision: str | None = None,
        token: str | None = None,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        **config_fields,
    ):
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
        known = {option.name for option in dataclasses.fields(cls.config_class)}
        if unknown := sorted(set(config_fields) - known):
            raise TypeError(f"unknown arguments {unknown}: further arguments are fields of DevilConfig.")
        if isinstance(backbone, FeatureBackbone) and (layers is not None or class_tokens or backbone_kwargs):
            raise ValueError("a FeatureBackbone brings its layers: choose them when building it.")
        if isinstance(language_model, nn.Module) and attn_implementation is not None:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is for a language model that is loaded here."
            )
        dtype = torch.float32 if dtype is None else dtype
        if not isinstance(backbone, FeatureBackbone):
            given = isinstance(backbone, nn.Module)
            backbone = FeatureBackbone.from_source(
                backbone,
                layers,
                revision=backbone_revision,
                token=token,
                class_tokens=class_tokens,
                backbone_kwargs=backbone_kwargs,
            )
            backbone = backbone if given else backbone.to(dtype)
        source = None
        if not isinstance(language_model, nn.Module):
            # The hash is taken in fp32, so that it does not depend on the dtype asked for.
            place = os.path.abspath(language_model) if os.path.isdir(language_model) else str(language_model)
            source = {"source": place, "revision": language_model_revision}
            language_model = _load_language_model(source, token=token, attn_implementation=attn_implementation)
            source["revision"] = _commit_of(source, token) or language_model_revision
            source["sha256"] = weights_hash(language_model)
            nn.Module.to(language_model, dtype)
        check_language_model(language_model)
        text_config = language_model.config
        special = {
            name: config_fields.pop(name, _special_token(name, tokenizer, text_config))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        if special["pad_token_id"] is None:
            special["pad_token_id"] = special["eos_token_id"]
        config = cls.config_class(
            backbone_config=backbone.config,
            text_config=text_config,
            language_model_source=source,
            **special,
            **config_fields,
        )
        model = cls(config, backbone=backbone, language_model=language_model)
        table: Any = language_model.get_input_embeddings().weight
        model.translator.to(device=table.device, dtype=dtype)
        return model.eval()

    def freeze(self) -> "DevilPreTrainedModel":
        """Switch the gradients of the frozen parts off: loading makes every weight trainable again."""
        self.backbone.requires_grad_(False)
        for name, parameter in self.language_model.named_parameters():
            parameter.requires_grad_(LORA_NAME in name)
        return self

    def train(self, mode: bool = True) -> "DevilPreTrainedModel":
        """Switch the mode of what is trained; the frozen parts stay in eval mode (batch-norm statistics, dropout)."""
        super().train(mode)
        self.backbone.eval()
        self.language_model.eval()
        for _, layer in lora_layers(cast(nn.Module, self.language_model)):
            layer.lora_dropout.train(mode)
        return self

    def merge_lora(self) -> "DevilPreTrainedModel":
        """Add the LoRA adapters to the language model's weights, in place; the model can then only be saved self-contained.

        Raises:
            ValueError: for a model without adapters.
        """
        if self.config.lora is None:
            raise ValueError("this model has no LoRA adapters to merge.")
        merge_lora(self.language_model)
        self.config.lora = self.config.language_model_source = None
        return self.freeze()

    def trainable_state_dict(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights that training changes (translator, LoRA), by their names in the whole model.

        Args:
            state_dict: where to take them from, when the model's own tensors are sharded over processes.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {
            name: tensor for name, tensor in state_dict.items() if name.startswith(TRAINED_PREFIX) or LORA_NAME in name
        }

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | PathLike, *, slim: bool = False, state_dict=None, **kwargs
    ):
        """Save a checkpoint with the code that loads it.

        Args:
            slim: leave out the frozen parts and name their sources instead.

        Raises:
            ValueError: for a slim checkpoint of parts that came as modules, without a source to load them from again.
        """
        # This import is also what makes the pipeline's code travel with the checkpoint.
        from .pipeline_devil import CUSTOM_PIPELINES

        config = self.config
        if slim:
            for part in self._parts_without_source():
                raise ValueError(
                    f"a slim checkpoint needs a source of the {part}, but it was given as a module: "
                    "build the model from an id or a directory, or save with slim=False."
                )
            state_dict = self.trainable_state_dict() if state_dict is None else state_dict
        modules = {"AutoConfig": "configuration_devil.DevilConfig"}
        modules |= dict.fromkeys(AUTO_CLASSES, "modeling_devil.DevilModel")
        before, config.frozen_weights = config.frozen_weights, "reference" if slim else "embedded"
        config.auto_map = modules
        config.custom_pipelines = CUSTOM_PIPELINES
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            config.frozen_weights = before

    def _parts_without_source(self) -> list[str]:
        parts = {"backbone": self.config.backbone_config, "language model": self.config.language_model_source}
        return [part for part, entry in parts.items() if not (entry or {}).get("source")]

    @property
    def has_sources(self) -> bool:
        """Whether both frozen parts can be loaded again from where they came, so that a slim checkpoint is possible."""
        return not self._parts_without_source()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        config=None,
        state_dict=None,
        backbone=None,
        language_model=None,
        **kwargs,
    ):
        """Load a self-contained or a slim checkpoint.

        Beside the arguments of every transformers model:

        Args:
            backbone: for a slim checkpoint, where the backbone's weights lie now; for a custom backbone, the module itself.
            language_model: for a slim checkpoint, where the language model's weights lie now, an id or a directory.

        Raises:
            OSError: when the checkpoint or a source of a slim one is not there.
            ValueError: when weights are missing, or are not those that the translator was trained with.
        """
        path = pretrained_model_name_or_path
        report = kwargs.pop("output_loading_info", False)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if not isinstance(config, PreTrainedConfig):
            fields = {f.name for f in dataclasses.fields(cls.config_class)} - {"dtype"}
            overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
            config = cls.config_class.from_pretrained(config or path, **hub, **overrides)
        if isinstance(language_model, nn.Module):
            raise TypeError(
                "language_model must be an id or a directory; a module goes to from_backbone_and_language_model."
            )
        if config.frozen_weights == "embedded" and (language_model or isinstance(backbone, str | PathLike)):
            raise ValueError(f"{path} holds its frozen weights itself: leave backbone and language_model out.")
        if isinstance(backbone, FeatureBackbone):
            backbone = backbone.module
        module = backbone if isinstance(backbone, nn.Module) else None
        if module is not None:
            kwargs["backbone"] = module
        with _told_when_cut(path):
            if path is not None and state_dict is None and config.frozen_weights == "reference":
                frozen = _frozen_weights(config, backbone, language_model, hub.get("token"))
                # Trained weights come last: those of fresh adapters give way to them.
                state_dict = frozen | _trained_weights(path, hub)
            source = None if state_dict is not None else path
            model, info = super().from_pretrained(
                source, *args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs
            )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{path} lacks {len(missing)} weights, {missing[0]} among them: the checkpoint is incomplete."
            )
        model.config.name_or_path = model.name_or_path = str(path)
        model.freeze()
        return (model, info) if report else model


def check_language_model(language_model: Any) -> int:
    """Width of the language model's input embeddings.

    Raises:
        TypeError: when it is no model of transformers.
        ValueError: when it is not a causal language model that reads embeddings.
    """
    name = type(language_model).__name__
    if not isinstance(language_model, PreTrainedModel):
        raise TypeError(f"{name} is no language model of transformers: give an id, a directory, or one that it loaded.")
    if getattr(language_model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder: DeViL needs a causal language model, such as OPT, GPT-2 or Llama."
        )
    if language_model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM.")
    embedding = language_model.get_input_embeddings()
    if not isinstance(embedding, nn.Module) or not hasattr(embedding, "weight"):
        raise ValueError(
            f"{name} has no input embedding table, so it cannot read a prefix: choose another language model."
        )
    return int(embedding.weight.shape[-1])


def _special_token(name: str, tokenizer, text_config) -> int | None:
    token = getattr(tokenizer, name, None)
    token = getattr(text_config, name, None) if token is None else token
    return token[0] if isinstance(token, list | tuple) else token


def _load_language_model(source: Mapping, token=None, **kwargs) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            source["source"], revision=source.get("revision") or "main", token=token, dtype=torch.float32, **kwargs
        )
    except OSError as error:
        raise OSError(
            f"the language model {source['source']!r} (revision {source.get('revision')}) could not be loaded: "
            f"name another place of the same weights with language_model=... ({error})"
        ) from error


def _commit_of(source: Mapping, token: str | None) -> str | None:
    """The commit of a Hub repository, read off the cache into which it was just loaded; None for a directory."""
    if os.path.isdir(source["source"]):
        return None
    file = cached_file(source["source"], "config.json", revision=source["revision"], token=token)
    return extract_commit_hash(file, None)


@contextmanager
def _told_when_cut(path: Any) -> Iterator[None]:
    """Say that the network failed: transformers would say that a file of another name is missing."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        # The client's transport errors are of httpx or httpx2, depending on its version.
        while cause is not None and all(base.__name__ != "TransportError" for base in type(cause).__mro__):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(
            f"loading {path} was cut off by the network ({cause}); load it again: what arrived completely is kept."
        ) from error


def _trained_weights(path: str | PathLike, hub: Mapping) -> dict[str, Tensor]:
    file = cached_file(path, WEIGHTS_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        raise OSError(f"{path} has no {WEIGHTS_FILE}: a slim checkpoint keeps its translator there.")
    return load_file(file)


def _frozen_weights(config, backbone, language_model, token) -> dict[str, Tensor]:
    """Weights of the frozen parts from their sources, verified, by their names in the whole model."""
    vision = source_state_dict(config.backbone_config, backbone, token=token)
    source = dict(config.language_model_source)
    if language_model is not None:
        source |= {"source": str(language_model), "revision": None}
    model = _load_language_model(source, token=token)
    found = weights_hash(model)
    if found != source["sha256"]:
        raise ValueError(
            f"the weights of the language model {source['source']!r} have sha256 {found}, but this checkpoint was trained "
            f"with {source['sha256']}: load the revision {source.get('revision')}, or name the right one with language_model=..."
        )
    if config.lora is not None:
        # The hash is one of the weights without adapters; with them, the same weights have longer names.
        add_lora(model, config.lora)
    named = {f"backbone.{name}": tensor for name, tensor in vision.items()}
    return named | {f"language_model.{name}": tensor for name, tensor in model.state_dict().items()}


__all__ = ["DevilPreTrainedModel", "check_language_model"]
