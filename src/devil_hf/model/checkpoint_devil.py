"""How a DeViL model is saved and loaded.

Two kinds of checkpoint load alike through `from_pretrained`: self-contained ones hold every weight; slim ones hold what was
trained, and name the sources of the frozen parts with revision and a hash of their weights, which is verified on loading.
"""

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules import module as registration
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .backbone_devil import FeatureBackbone
from .configuration_devil import DevilConfig

TRAINED_PREFIX = "translator."
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
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
    entry = '"""The model, with the code that this checkpoint needs beside the files that always travel."""\n\n'
    entry += "from .configuration_devil import DevilConfig\n"
    for file in sorted({Path(COMPANIONS[need].__file__) for need in needs}):
        code = file.read_text(encoding="utf-8")
        code = code.replace("from devil_hf.model.", "from .").replace("from devil_hf.build.", "from .")
        (folder / file.name).write_text(code, encoding="utf-8")
        entry += f"from .{file.stem} import DevilModel\n"
    (folder / f"{ENTRY}.py").write_text(entry, encoding="utf-8")


def weights_hash(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every persistent tensor, sorted by name."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: str | PathLike, variant: str | None = None, **hub: Any) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of a checkpoint, mapped into memory; an OSError for missing and damaged ones."""
    end, optional = f".{variant}" if variant else "", {"_raise_exceptions_for_missing_entries": False} | hub
    files = [cached_file(path, f"model{end}.safetensors", **optional)]
    if files == [None]:
        index = cached_file(path, f"model.safetensors.index{end}.json", **optional)
        if index is None:
            raise OSError(f"{path} has neither model{end}.safetensors nor an index of such files: there are no weights to load.")
        try:
            names = sorted({str(name) for name in json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            names = []
        if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise OSError(f"{index} is no list of safetensors files beside it: download or copy the checkpoint again.")
        files = [cached_file(path, name, **hub) for name in names]
    weights: dict[str, Tensor] = {}
    for file in map(str, files):
        try:
            weights |= load_file(file)
        except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
            raise OSError(f"{file} is cut or damaged ({error}): download or copy the checkpoint again.") from error
    return weights


def other_hashes(folder: Path, variant: str) -> dict[str, str]:
    """The hashes, by their variants, of the other weights that a folder holds already, beside which some are saved."""
    found: dict[str, str] = {}
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # nothing is there, or nothing of ours
        found = dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["weights_sha256"])
    ends = {name: f".{name}" if name else "" for name in found if name != variant}
    files = {name: (f"model{end}.safetensors", f"model.safetensors.index{end}.json") for name, end in ends.items()}
    return {name: found[name] for name in files if any((folder / file).is_file() for file in files[name])}


def verify_weights(weights: Mapping[str, Tensor], sha256: str | None, path: Any) -> None:
    """A ValueError for weights that are not finite, or not those of the recorded hash, where there is one."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(f"{path} holds values of {name} that are not finite: its training diverged, or it is damaged.")
    if sha256 is not None and (found := weights_hash(weights)) != sha256:
        raise ValueError(f"the weights of {path} have SHA-256 {found}, not {sha256} as in its config.json: copy it again.")


@contextmanager
def building_within(elements: int) -> Iterator[None]:
    """A ValueError as soon as a network that is built in this thread asks for far more than weights of that many elements.

    Its description may ask for a million layers, which would all be made before anybody compares them with the weights.
    """
    own, room = threading.get_ident(), 8 * elements + 2**26

    def count(_module: nn.Module, name: str, part: Tensor | nn.Module | None) -> None:
        nonlocal room
        if part is not None and threading.get_ident() == own:  # making a tensor or a layer takes time, however small it is
            room -= max(part.numel(), 2**13) if isinstance(part, Tensor) else 2**11
            if room < 0:
                raise ValueError(f"the configuration asks for far more than the {elements} weights that are there, up to {name}.")

    hooks = [getattr(registration, f"register_module_{part}_registration_hook") for part in ("parameter", "buffer", "module")]
    with hooks[0](count), hooks[1](count), hooks[2](count):
        yield


class OwnGenerationMixin:
    """A name that says "GenerationMixin": transformers would derive a class for each load, which nobody could pickle."""


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
    _unfinished: tuple[list[str], str | None] | None = None  # companions that a folder lacks while it is saved, and its variant

    @classmethod
    def can_generate(cls) -> bool:
        """False, in transformers' sense: the language model has the settings of generation, not the whole."""
        return False

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

        A ValueError for a slim checkpoint of parts that came as modules, without a source to load them from again.
        """
        # This import is also what makes the pipeline's code travel with the checkpoint.
        from .pipeline_devil import CUSTOM_PIPELINES

        config = self.config
        if slim:
            companion("slim").check_sources(self.parts_without_source)
            state_dict = self.trainable_state_dict() if state_dict is None else state_dict
        elif state_dict is None and (doubles := self._doubles()):
            state_dict = self.state_dict() | doubles
        before, config.frozen_weights = config.frozen_weights, "reference" if slim else "embedded"
        variant = kwargs.get("variant")
        config.custom_pipelines, config.weights_sha256 = CUSTOM_PIPELINES, other_hashes(Path(save_directory), variant or "")
        backbone = config.backbone_config
        needs = {backbone["kind"], *(reader["by"] for reader in backbone["readers"]), config.translator_type}
        needs |= {"lora" if config.lora else "", "slim" if slim else "", "hook" if "stages" in needs else ""}
        self._unfinished = (sorted(needs & COMPANIONS.keys()), variant) if kwargs.get("is_main_process", True) else None
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
            self._finish(save_directory)
        finally:
            config.frozen_weights, self._unfinished = before, None

    def _doubles(self) -> dict[str, Tensor]:
        """Copies of the backbone's weights that share memory with others of it: transformers saves none that it did not tie."""
        own = self.backbone.state_dict(prefix="backbone.")
        named = {name: one for name, one in own.items() if one.numel() and not one.is_meta}
        first = {one.untyped_storage().data_ptr(): name for name, one in reversed(named.items())}
        return {name: one.clone() for name, one in named.items() if first[one.untyped_storage().data_ptr()] != name}

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        self._finish(working_dir)  # before `save_pretrained(push_to_hub=True)` sends the folder
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _finish(self, folder: str | PathLike) -> None:
        """Add to a saved folder the companions, the name of the file that is loaded, and the hash of what was written."""
        if self._unfinished is None:
            return
        (needs, variant), self._unfinished = self._unfinished, None
        if needs:
            write_companions(needs, Path(folder))
        # One file for all classes: transformers tells code apart by the configuration's class and the files that it imports.
        entry, type(self.config)._auto_class = ENTRY if needs else "modeling_devil", None  # else it would name its own file
        self.config.auto_map = dict.fromkeys(AUTO_CLASSES, f"{entry}.DevilModel") | {"AutoConfig": f"{entry}.DevilConfig"}
        self.config.weights_sha256 |= {variant or "": weights_hash(read_weights(folder, variant))}
        self.config.save_pretrained(folder)

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

        An OSError when the checkpoint or a source of a slim one is not there; a ValueError when weights are missing, or are not
        those that the translator was trained with.
        """
        path = pretrained_model_name_or_path
        report, variant = kwargs.pop("output_loading_info", False), kwargs.pop("variant", None)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        if isinstance(language_model, nn.Module):
            raise TypeError("language_model must be an id or a directory; a module goes to from_backbone_and_language_model.")
        with _told(path):
            if not isinstance(config, PreTrainedConfig):
                fields = {f.name for f in dataclasses.fields(cls.config_class)} - {"dtype"}
                overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
                config = cls.config_class.from_pretrained(config or path, **hub, **overrides)
            if config.frozen_weights == "embedded" and (language_model or isinstance(backbone, str | PathLike)):
                raise ValueError(f"{path} holds its frozen weights itself: leave backbone and language_model out.")
            backbone = backbone.module if isinstance(backbone, FeatureBackbone) else backbone
            parts = [*backbone.modules()] if isinstance(backbone, nn.Module) else []
            kwargs |= {"backbone": backbone} if parts else {}
            buffers = [(part, *one) for part in parts for one in part.named_buffers(recurse=False)]
            if path is not None and state_dict is None:
                state_dict = read_weights(path, variant, **hub)
                verify_weights(state_dict, (config.weights_sha256 or {}).get(variant or ""), path)
                if config.frozen_weights == "reference":
                    # Trained weights come last: those of fresh adapters give way to them.
                    state_dict = companion("slim").frozen_weights(path, config, backbone, language_model, hub) | state_dict
            elements = sum(tensor.numel() for tensor in (state_dict or {}).values())
            with building_within(elements):
                model, info = super().from_pretrained(
                    None, *args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs
                )
        for part, name, buffer in buffers:
            if name in part._non_persistent_buffers_set:  # no checkpoint holds it, and transformers put new memory in its place
                part._buffers[name] = buffer.to(part._buffers[name].device)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{path} lacks {len(missing)} weights, {missing[0]} among them: the checkpoint is incomplete.")
        model.config.name_or_path = model.name_or_path = str(path)
        model.freeze()
        return (model, info) if report else model


@contextmanager
def _told(path: Any) -> Iterator[None]:
    """Say what is wrong with a checkpoint, whatever a library says of it: that the network failed, or that it is damaged."""
    try:
        yield
    except Exception as error:
        cause: Any = error
        # The client's transport errors are of httpx or httpx2, depending on its version.
        while cause is not None and "TransportError" not in [base.__name__ for base in type(cause).__mro__]:
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise OSError(f"loading {path} was cut off by the network ({cause}); load it again to go on.") from error
        if isinstance(error, OSError | ValueError | ImportError | MemoryError | torch.OutOfMemoryError):
            raise
        raise ValueError(f"{path} cannot be loaded ({type(error).__name__}: {error!s:.300}): it is damaged.") from error
