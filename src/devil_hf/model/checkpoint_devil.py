"""How a DeViL model is saved and loaded, with LoRA adapters or without.

Two kinds of checkpoint load alike through `from_pretrained`: self-contained ones hold every weight; slim ones hold what was
trained, and name the sources of the frozen parts with revision and a hash of their weights, which is verified on loading.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, is_peft_available

from .backbone_devil import FeatureBackbone, source_state_dict, weights_hash
from .configuration_devil import LORA_DEFAULTS, DevilConfig
from .translator_devil import translator_class

if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

WEIGHTS_FILE = "model.safetensors"
TRAINED_PREFIX = "translator."
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
LORA_NAME = ".lora_"  # in the name of every weight that peft adds
AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText")


class DevilPreTrainedModel(PreTrainedModel):
    """Saving and loading of DeViL models."""

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

    def trainable_state_dict(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights that training changes (translator, LoRA), by their names in the whole model.

        They are taken from `state_dict`, if given: the model's own tensors may be sharded over processes.
        """
        given = (self.state_dict() if state_dict is None else state_dict).items()
        return {name: tensor for name, tensor in given if name.startswith(TRAINED_PREFIX) or LORA_NAME in name}

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
            for part in self.parts_without_source:
                raise ValueError(
                    f"a slim checkpoint needs a source of the {part}, but it was given as a module: "
                    "build the model from an id or a directory, or save with slim=False."
                )
            state_dict = self.trainable_state_dict() if state_dict is None else state_dict
        config.auto_map = {"AutoConfig": "configuration_devil.DevilConfig"}
        config.auto_map |= dict.fromkeys(AUTO_CLASSES, "modeling_devil.DevilModel")
        before, config.frozen_weights = config.frozen_weights, "reference" if slim else "embedded"
        config.custom_pipelines = CUSTOM_PIPELINES
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
            save_code = getattr(translator_class(config.translator_type), "save_code", None)
            if save_code is not None:
                place = save_code(str(save_directory))
                config.auto_map |= dict.fromkeys(AUTO_CLASSES, f"{place}.DevilModel")
                config.save_pretrained(save_directory)
        finally:
            config.frozen_weights = before

    @property
    def parts_without_source(self) -> list[str]:
        """The frozen parts that cannot be loaded again from where they came: a slim checkpoint needs both."""
        parts = {"backbone": self.config.backbone_config, "language model": self.config.language_model_source}
        return [part for part, entry in parts.items() if not (entry or {}).get("source")]

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
                download = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
                frozen = _frozen_weights(config, backbone, language_model, **download)
                file = cached_file(path, WEIGHTS_FILE, _raise_exceptions_for_missing_entries=False, **hub)
                if file is None:
                    raise OSError(f"{path} has no {WEIGHTS_FILE}: a slim checkpoint keeps its translator there.")
                # Trained weights come last: those of fresh adapters give way to them.
                state_dict = frozen | load_file(file)
            source = None if state_dict is not None else path
            model, info = super().from_pretrained(
                source, *args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs
            )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{path} lacks {len(missing)} weights, {missing[0]} among them: the checkpoint is incomplete."
            )
        model.config.name_or_path = model.name_or_path = str(path)
        model.freeze()
        return (model, info) if report else model


def add_lora(language_model: nn.Module, lora: Mapping[str, Any]) -> None:
    """Inject adapters into a language model, in place; one that has them already is left as it is.

    Not by `add_adapter` of transformers, after which the language model saves its adapters alone.

    Args:
        lora: `rank`, `alpha`, `dropout` and `target_modules` (names of linear layers, or peft's `"all-linear"`); what is
            left out is 8, 16, 0 and the attention projections that peft names for this family of language models, or every
            linear layer but the head for a family that it does not know.

    Raises:
        ImportError: when peft is not installed.
    """
    if not is_peft_available():
        raise ImportError("this model has LoRA adapters, which need peft: pip install peft")
    if next(lora_layers(language_model), None) is not None:
        return
    full = LORA_DEFAULTS | dict(lora)
    family = getattr(language_model.config, "model_type", "")
    targets = full["target_modules"] or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(family, "all-linear")
    config = LoraConfig(
        r=full["rank"],
        lora_alpha=full["alpha"],
        lora_dropout=full["dropout"],
        target_modules=targets if isinstance(targets, str) else list(targets),
        # Transposed linear layers, as in GPT-2, would otherwise be met with a warning.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in language_model.modules()),
    )
    inject_adapter_in_model(config, language_model)


def lora_layers(language_model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer with an adapter."""
    if is_peft_available():
        yield from ((name, part) for name, part in language_model.named_modules() if isinstance(part, LoraLayer))


def load_language_model(source: Mapping, **kwargs) -> PreTrainedModel:
    """The language model of `{"source", "revision"}`, in fp32; an OSError that names the remedy where it cannot be loaded."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            source["source"], revision=source.get("revision") or "main", dtype=torch.float32, **kwargs
        )
    except OSError as error:
        raise OSError(
            f"the language model {source['source']!r} (revision {source.get('revision')}) could not be loaded: "
            f"name another place of the same weights with language_model=... ({error})"
        ) from error


@contextmanager
def _told_when_cut(path: Any) -> Iterator[None]:
    """Say that the network failed: transformers would say that a file of another name is missing."""
    try:
        yield
    except Exception as error:
        cause: Any = error
        # The client's transport errors are of httpx or httpx2, depending on its version.
        while cause is not None and "TransportError" not in [base.__name__ for base in type(cause).__mro__]:
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(f"loading {path} was cut off by the network ({cause}); load it again to go on.") from error


def _frozen_weights(config, backbone, language_model, **download) -> dict[str, Tensor]:
    """Weights of the frozen parts from their sources, verified, by their names in the whole model."""
    vision = source_state_dict(config.backbone_config, backbone, **download)
    source = dict(config.language_model_source)
    if language_model is not None:
        source |= {"source": str(language_model), "revision": None}
    model = load_language_model(source, **download)
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
