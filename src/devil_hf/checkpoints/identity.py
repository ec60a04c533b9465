"""What a model and its processor are known by: all that decides their answers, and can change between two halves of a work.

Work that keeps something (rows of an evaluation, exemplars, labels of units, a report, runs of a comparison, a training) stores
this beside it and goes on only where it is the same. It is read from what is in memory, so that a setting that was changed after
loading counts as one that was changed in a file does. What does not count: where the files lie and which library wrote them, what
a checkpoint says of itself, settings of training, and the device, of which only the last digits are.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig

from devil_hf.model.checkpoint_devil import weights_hash
from devil_hf.model.configuration_devil import DevilConfig
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
OF_FILES = {"auto_map", "processor_class"}  # of an image processor
OF_CALLS = {"truncation", "padding"}  # of a tokenizer: what the last call asked for


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
    """Hash of what a training leaves as it is: the frozen weights, and how layers, images and texts are read."""
    trained = model.trainable_state_dict()
    weights = weights_hash({name: tensor for name, tensor in model.state_dict().items() if name not in trained})
    reading = reading_of(model, processor)
    return _hash([weights, network_identity(model.config.backbone_config), reading["images"], reading["texts"]])


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
    read = zip(backbone_config["layers"], backbone_config["readers"], strict=True)
    return _hash([built, [[name, how] for name, how in read if layers is None or name in layers]])


def _unplaced(value: Any) -> Any:
    return {key: one for key, one in value.items() if key not in OF_PLACES} if isinstance(value, Mapping) else value


def settings_identity(config: DevilConfig) -> str:
    """Hash of the fields of a configuration that an answer depends on."""
    own = {name: getattr(config, name) for name in DevilConfig.__annotations__ if name not in UNREAD}
    own["backbone_config"] = config.backbone_config and network_identity(config.backbone_config)
    text, common = config.text_config, {field.name for field in fields(PreTrainedConfig)}
    if text is not None:  # those that differ from the defaults: the next version of the library may know more
        declared = {field.name for field in fields(type(text))} - common
        own["text_config"] = {name: value for name, value in text.to_diff_dict().items() if name in declared | {"model_type"}}
    return _hash(own)


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of everything that decides which tokens a text becomes, and back."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        known: Any = {name: value for name, value in state.items() if name not in OF_CALLS}
    else:
        known = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _hash([known, special, tokenizer.model_max_length])


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
