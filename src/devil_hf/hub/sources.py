"""Where the frozen parts of a checkpoint come from: repositories of the Hub, as far as they have such a name.

What a configuration says of it is not trusted: only what is spelled like a Hub id is one.
"""

from typing import Any

from devil_hf.build.repositories import hub_id
from devil_hf.model.configuration_devil import DevilConfig


def base_models(config: DevilConfig) -> list[str]:
    """Hub ids of the backbone and the language model, as far as they came from the Hub."""
    return [part["id"] for part in source_parts(config) if part["id"]]


def source_parts(config: DevilConfig) -> list[dict[str, Any]]:
    """Backbone and language model: `part`, Hub `id`, `name` and `width`, `revision` and `sha256`; None where unknown."""
    vision, text = config.backbone_config or {}, config.language_model_source or {}
    model_class = vision.get("model_class", "").rpartition(".")[-1]
    architecture = vision.get("architecture") or model_class or vision.get("kind")
    size = getattr(config.text_config, "hidden_size", None)
    named = [("backbone", vision, str(architecture)), ("language model", text, config.text_config.model_type)]
    parts = [
        {"part": part, "id": hub_id(entry.get("source")), "name": name, "width": None}
        | {key: entry.get(key) for key in ("revision", "sha256")}
        for part, entry, name in named
    ]
    parts[1]["width"] = size
    return parts


__all__ = ["base_models", "source_parts"]
