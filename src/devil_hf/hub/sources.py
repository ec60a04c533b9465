"""Where the frozen parts of a checkpoint come from: repositories of the Hub, as far as they have such a name.

What a configuration says of it is not trusted: only what is spelled like a Hub id is one.
"""

import os
import re
from typing import Any

import timm

from devil_hf.model.configuration_devil import DevilConfig

HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)  # old repositories belong to nobody: gpt2


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


def hub_id(source: str | None) -> str | None:
    """The Hub repository of a part's source; None for a directory, for a module as it was given, and for no such name."""
    if not source or os.path.isabs(source) or os.path.isdir(source):
        return None
    source = source.removeprefix("hf-hub:").partition("@")[0]
    if "/" not in source and timm.is_model(source.split(".")[0]):
        known = timm.models.get_pretrained_cfg(source, allow_unregistered=False)
        found = known.hf_hub_id if known is not None else None
        return (found if found != "timm/" else f"timm/{source}") or None
    return source if HUB_ID.fullmatch(source) and ".." not in source else None


__all__ = ["HUB_ID", "base_models", "hub_id", "source_parts"]
