"""How a DeViL model is saved and loaded.

Two kinds of checkpoint load alike through `from_pretrained`: self-contained ones hold every weight; slim ones hold what was
trained, and name the sources of the frozen parts with revision and a hash of their weights, which is verified on loading.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .backbone_devil import FeatureBackbone
from .configuration_devil import DevilConfig

TRAINED_PREFIX = "translator."
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
LORA_NAME = ".lora_"  # in the name of every weight that peft adds
AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText")
ENTRY = "companions_devil"

# Code that not everybody needs, by what needs it; each is one file that imports this model and enters itself here. "slim" (frozen
# parts from their sources), "lora", and translators by their names travel with checkpoints that need them; "training" does not.
COMPANIONS: dict[str, Any] = {}


def companion(need: str) -> Any:
    """The module for what a checkpoint needs beyond the files that always travel; an ImportError where it is not there."""
    if need not in COMPANIONS:
        raise ImportError(f"this checkpoint has no code for {need!r}: pip install devil-hf, and import devil_hf before loading.")
    return COMPANIONS[need]


def write_companions(needs: Sequence[str], folder: Path) -> None:
    """Write the files that a checkpoint needs beside the usual ones, and one that imports them with the model."""
    lines = ['"""The model, with the code that this checkpoint needs beside the files that always travel."""', ""]
    for file in sorted({Path(COMPANIONS[need].__file__) for need in needs}):
        code = file.read_text(encoding="utf-8")
        code = code.replace("from devil_hf.model.", "from .").replace("from devil_hf.build.", "from .")
        (folder / file.name).write_text(code, encoding="utf-8")
        lines.append(f"from .{file.stem} import DevilModel")
    (folder / f"{ENTRY}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    _needs: tuple[str, ...] = ()  # companions that a folder lacks while it is being saved

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
        for module in self.language_model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train(mode)
        return self

    def trainable_state_dict(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights that training changes (translator, LoRA), by their names in the whole model.

        They are taken from `state_dict`, if given: the model's own tensors may be sharded over processes.
        """
        given = (self.state_dict() if state_dict is None else state_dict).items()
        return {name: tensor for name, tensor in given if name.startswith(TRAINED_PREFIX) or LORA_NAME in name}

    def save_pretrained(self, save_directory, *, slim: bool = False, state_dict=None, **kwargs):  # type: ignore[override]
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
            companion("slim")
            if parts := self.parts_without_source:
                raise ValueError(
                    f"a slim checkpoint needs a source of the {parts[0]}, but it was given as a module: "
                    "build the model from an id or a directory, or save with slim=False."
                )
            state_dict = self.trainable_state_dict() if state_dict is None else state_dict
        config.auto_map = {"AutoConfig": "configuration_devil.DevilConfig"}
        config.auto_map |= dict.fromkeys(AUTO_CLASSES, "modeling_devil.DevilModel")
        before, config.frozen_weights = config.frozen_weights, "reference" if slim else "embedded"
        config.custom_pipelines = CUSTOM_PIPELINES
        needs = (config.translator_type, "lora" if config.lora else "", "slim" if slim else "")
        self._needs = tuple(need for need in needs if need in COMPANIONS) if kwargs.get("is_main_process", True) else ()
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
            self._add_companions(save_directory)
        finally:
            config.frozen_weights, self._needs = before, ()

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        self._add_companions(working_dir)  # before `save_pretrained(push_to_hub=True)` sends the folder
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _add_companions(self, folder: str | PathLike) -> None:
        if self._needs:
            write_companions(self._needs, Path(folder))
            self.config.auto_map |= dict.fromkeys(AUTO_CLASSES, f"{ENTRY}.DevilModel")
            self.config.save_pretrained(folder)
            self._needs = ()

    @property
    def parts_without_source(self) -> list[str]:
        """The frozen parts that cannot be loaded again from where they came: a slim checkpoint needs both."""
        parts = {"backbone": self.config.backbone_config, "language model": self.config.language_model_source}
        return [part for part, entry in parts.items() if not (entry or {}).get("source")]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, config=None, state_dict=None, backbone=None, language_model=None, **kwargs
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
            raise TypeError("language_model must be an id or a directory; a module goes to from_backbone_and_language_model.")
        if config.frozen_weights == "embedded" and (language_model or isinstance(backbone, str | PathLike)):
            raise ValueError(f"{path} holds its frozen weights itself: leave backbone and language_model out.")
        backbone = backbone.module if isinstance(backbone, FeatureBackbone) else backbone
        if isinstance(backbone, nn.Module):
            kwargs["backbone"] = backbone
        with _told_when_cut(path):
            if path is not None and state_dict is None and config.frozen_weights == "reference":
                state_dict = companion("slim").slim_state_dict(path, config, backbone, language_model, hub)
            source = None if state_dict is not None else path
            model, info = super().from_pretrained(
                source, *args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs
            )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{path} lacks {len(missing)} weights, {missing[0]} among them: the checkpoint is incomplete.")
        model.config.name_or_path = model.name_or_path = str(path)
        model.freeze()
        return (model, info) if report else model


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
