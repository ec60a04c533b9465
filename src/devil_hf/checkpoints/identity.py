"""What a model and its processor are known by: all that decides their answers, and can change between two halves of a work.

Work that keeps something (rows of an evaluation, exemplars, labels of units, a report, runs of a comparison, a training) stores
this beside it and goes on only where it is the same. It is read from what is in memory, so that a setting that was changed after
loading counts as one that was changed in a file does. What does not count: where the files lie and which library wrote them, what
a checkpoint says of itself, settings of training, and the device, of which only the last digits are.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from devil_hf.model.checkpoint_devil import weights_hash
from devil_hf.model.configuration_devil import UNDECLARED, DevilConfig
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor

# Fields of a configuration that say how was trained, and what a checkpoint holds; new fields count until they are named here.
UNREAD = {
    "all_layers_probability",
    "format_version",
    "frozen_weights",
    "language_model_source",
    "layer_dropout",
    "location_dropout",
    "location_schedule",
    "max_caption_tokens",
    "null_probability",
    "region_schedule",
    "scope",
    "scope_statistics",
    "weights_sha256",
    "whole_probability",
}
# Of a backbone: where it lies, which library wrote it, and what is known itself (its weights, its preprocessing, its layers).
OF_PLACES = {"source", "revision", "sha256", "data_config", "transformers_version", "_name_or_path"}
OF_LAYERS = {"layer_names", "layers", "channels", "readers"}
# Of a library's configuration: what is of training, of tasks that nobody asks here, of what is returned, of stages (our layers).
IDLE = re.compile(
    r".*(dropout|_pdrop|drop_path_rate|drop_rate).*|initializer_.*|.*_initializer_.*|summary_.*|output_.*|use_cache|stage_names"
    r"|out_features|out_indices|pretraining_tp"
)
OF_FILES = {"auto_map", "processor_class"}  # of an image processor
OF_CALLS = {"truncation", "padding"}  # of a tokenizer: what the last call asked for
# Of a tokenizer without a fast one: where it lies, and who wrote it.
OF_ORIGIN = re.compile(r".*_files?(_.*)?|name_or_path|is_local|local_files_only|auto_map|processor_class|tokenizer_class|backend")


def fingerprint(model: DevilModel) -> str:
    """SHA-256 of all weights, frozen ones too, in fp32: the same for a slim and a full checkpoint in fp32, and for fp16 weights
    that were loaded as fp32. Rounding weights, or merging LoRA into them, makes another model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(weights_hash({name: tensor.float()}).encode())  # one at a time: copies of all may not fit
    return digest.hexdigest()


def known_by(model: DevilModel, processor: DevilProcessor) -> dict[str, Any]:
    """What decides the answers of a model besides the question, as JSON: its `weights` (`fingerprint`), and its `reading_of`."""
    return {"weights": fingerprint(model), "reading": reading_of(model, processor)}


def frozen_identity(model: DevilModel, processor: DevilProcessor) -> str:
    """Hash of what a training leaves as it is: the frozen parts, and how layers, images and texts are read.

    Weights are known by the hashes that were taken of them when the model was built; those without one are hashed here.
    """
    config, trained = cast(DevilConfig, model.config), model.trainable_state_dict()
    parts = {"backbone": config.backbone_config, "language_model": config.language_model_source}
    weights = {
        name: (known or {}).get("sha256")
        or weights_hash(
            {key: one for key, one in model.state_dict().items() if key.startswith(f"{name}.") and key not in trained}
        )
        for name, known in parts.items()
    }
    networks = [config.backbone_config and network_identity(config.backbone_config), _text_settings(config)]
    return _hash([weights, networks, preprocessing_of(processor.image_processor), tokenizer_identity(processor.tokenizer)])


def reading_of(model: DevilModel, processor: DevilProcessor) -> dict[str, Any]:
    """What decides the answers of a model besides its weights (`fingerprint`) and the question, as JSON.

    Returns:
        `precision` it computes in, a hash of its `settings`, how `images` become pixel values, and a hash of how `texts` become
        tokens.
    """
    return {
        "precision": precision_of(model),
        "settings": settings_identity(cast(DevilConfig, model.config)),
        "images": preprocessing_of(processor.image_processor),
        "texts": tokenizer_identity(processor.tokenizer),
    }


def precision_of(module: nn.Module) -> str:
    """The number formats of a module's parameters, such as "float32"."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in module.parameters()}))


def preprocessing_of(image_processor: Any) -> dict[str, Any]:
    """Every setting that decides which pixel values an image becomes, as JSON."""
    settings = json.loads(image_processor.to_json_string())
    return {name: value for name, value in settings.items() if name not in OF_FILES}


def network_identity(backbone_config: Mapping[str, Any], layers: Sequence[str] | None = None) -> str:
    """Hash of how a backbone is built and how its layers are read, apart from its weights.

    Args:
        layers: names of those that count; None for all that it reads.
    """
    built = {name: _unplaced(value) for name, value in backbone_config.items() if name not in OF_PLACES | OF_LAYERS}
    if settings := built.get("model_config"):
        built["model_config"] = _library_settings(settings)
    read = zip(backbone_config["layers"], backbone_config["readers"], strict=True)
    return _hash([built, [[name, how] for name, how in read if layers is None or name in layers]])


def _unplaced(value: Any) -> Any:
    return {key: one for key, one in value.items() if key not in OF_PLACES} if isinstance(value, Mapping) else value


def settings_identity(config: DevilConfig) -> str:
    """Hash of the fields of a configuration that an answer depends on."""
    own = {name: getattr(config, name) for name in DevilConfig.__annotations__ if name not in UNREAD}
    own["backbone_config"] = config.backbone_config and network_identity(config.backbone_config)
    own["text_config"] = _text_settings(config)
    return _hash(own)


def _text_settings(config: DevilConfig) -> dict[str, Any] | None:
    return config.text_config and _library_settings(json.loads(config.text_config.to_json_string(use_diff=False)))


def _library_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration of transformers says otherwise than its class does by itself: what the library's next version adds to
    the class, with a default, is no difference."""
    kind = CONFIG_MAPPING[given["model_type"]] if given.get("model_type") in CONFIG_MAPPING else PreTrainedConfig
    try:
        usual = json.loads(kind().to_json_string(use_diff=False))
    except (StrictDataclassError, TypeError, ValueError):  # a few classes cannot be without arguments: all that they say counts
        usual = {}
    declared = {field.name for field in fields(kind)} | {*UNDECLARED}
    return {"model_type": given.get("model_type")} | _unusual({name: given[name] for name in declared & given.keys()}, usual)


def _unusual(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not as usual, of nested ones too."""
    common, found = {field.name for field in fields(PreTrainedConfig)} | OF_PLACES, dict[str, Any]()
    for name in sorted(given.keys() - common):
        value, before = given[name], usual.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value, before = _unusual(value, before), {}
        if value != before and not IDLE.fullmatch(name):
            found[name] = value
    return found


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of everything that decides which tokens a text becomes, and back."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        known: Any = {name: value for name, value in state.items() if name not in OF_CALLS}
    else:
        settings = {name: value for name, value in tokenizer.init_kwargs.items() if not OF_ORIGIN.fullmatch(name)}
        known = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), settings]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _hash([known, special, tokenizer.model_max_length, tokenizer.clean_up_tokenization_spaces])


def _hash(known: Any) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:32]


__all__ = [
    "fingerprint",
    "frozen_identity",
    "known_by",
    "network_identity",
    "precision_of",
    "preprocessing_of",
    "reading_of",
    "settings_identity",
    "tokenizer_identity",
]
