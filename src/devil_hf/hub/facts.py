"""What a card is filled with: the facts of a checkpoint, and where its frozen parts come from.

Nothing of this is trusted: names, recipes and titles come from files that anybody may have written.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import yaml

from devil_hf.checkpoints import SCOPE
from devil_hf.evaluation.results import Evaluation
from devil_hf.model.configuration_devil import DevilConfig

UNKNOWN_LICENSE = "unknown"
HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)  # old repositories belong to nobody: gpt2


@dataclass(frozen=True)
class Layer:
    """A layer that a checkpoint reads: its channels, the grid of its places, and the pixels of the crop under one place."""

    name: str
    channels: int
    rows: int
    columns: int
    input_size: Sequence[int]

    @property
    def cell(self) -> str:
        if ":class" in self.name:
            return "class token: the whole image"
        height, width = self.input_size[1:]
        return f"{height / self.rows:.3g} x {width / self.columns:.3g}"


@dataclass(frozen=True)
class Examples:
    """Pictures of a repository: the images themselves, what each layer says of them, and maps of phrases.

    Args:
        images, maps: paths in the repository.
        layers: path of the picture of what each layer says.
        phrases: phrases of the first image's maps.
        held_out: whether they are known to be unseen in training.
    """

    images: list[str]
    layers: str
    maps: list[str]
    phrases: list[str]
    held_out: bool


@dataclass
class Facts:
    """What a model card is filled with.

    Args:
        repo_id: where the checkpoint is published, USER/REPO.
        config: its configuration.
        layers: shallowest first.
        trained_parameters: how many.
        evaluations: every evaluation that was run.
        examples: pictures, if there are any.
        recipe: the training recipe as YAML, without paths of this machine.
        license: an identifier of the Hub.
        datasets: Hub ids of the training data.
        data: the training data in words.
        language: of the descriptions, as the Hub names it.
        revision: the branch that the snippet has to name; None for main.
        published: False for a recipe without weights.
    """

    repo_id: str
    config: DevilConfig
    layers: list[Layer]
    trained_parameters: int
    evaluations: list[Evaluation] = field(default_factory=list)
    examples: Examples | None = None
    recipe: str | None = None
    license: str = UNKNOWN_LICENSE
    datasets: Sequence[str] = ()
    data: str | None = None
    language: str = "en"
    revision: str | None = None
    published: bool = True

    @property
    def name(self) -> str:
        """The repository without its owner."""
        return self.repo_id.split("/")[-1]

    @property
    def is_shapes_world(self) -> bool:
        return self.config.scope == SCOPE


def base_models(config: DevilConfig) -> list[str]:
    """Hub ids of the backbone and the language model, as far as they came from the Hub."""
    return [part["id"] for part in source_parts(config) if part["id"]]


def source_parts(config: DevilConfig) -> list[dict[str, Any]]:
    """Backbone and language model: `part`, Hub `id`, `name` and `width`, `revision` and `sha256`; None where unknown."""
    vision, text = config.backbone_config or {}, config.language_model_source or {}
    model_class = vision.get("model_class", "").rpartition(".")[-1]
    architecture = vision.get("architecture") or model_class or vision.get("kind")
    size = getattr(config.text_config, "hidden_size", None)
    named = [
        ("backbone", vision, str(architecture)),
        ("language model", text, config.text_config.model_type),
    ]
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


def readable_recipe(text: str) -> str:
    """A recipe's YAML with every absolute path cut to its last part: a card must not tell where someone's files lie."""
    return yaml.safe_dump(without_paths(yaml.safe_load(text)), sort_keys=False, allow_unicode=True).strip()


def without_paths(value: Any) -> Any:
    """The same JSON-like value with absolute paths cut to their last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    if isinstance(value, str) and os.path.isabs(value) and "\n" not in value:
        return Path(value).name or value
    return value


__all__ = ["Examples", "Facts", "Layer", "base_models", "hub_id", "readable_recipe", "source_parts", "without_paths"]
