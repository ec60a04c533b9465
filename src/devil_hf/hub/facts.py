"""What a card is filled with: the facts of a checkpoint.

Nothing of this is trusted: names, recipes and titles come from files that anybody may have written.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from devil_hf.checkpoints import SCOPES, SHAPES
from devil_hf.evaluation.results import Evaluation
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.text_files import parse_yaml

UNKNOWN_LICENSE = "unknown"


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
        world: the world of shapes that they were taken from; None for pictures of the publisher's.
    """

    images: list[str]
    layers: str
    maps: list[str]
    phrases: list[str]
    world: str | None = None


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
        return self.config.scope == SCOPES[SHAPES]


def readable_recipe(text: str) -> str:
    """A recipe's YAML with every absolute path cut to its last part: a card must not tell where someone's files lie."""
    return yaml.safe_dump(without_paths(parse_yaml(text, "the recipe")), sort_keys=False, allow_unicode=True).strip()


def without_paths(value: Any) -> Any:
    """The same JSON-like value with absolute paths cut to their last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    if isinstance(value, str) and os.path.isabs(value) and "\n" not in value:
        return Path(value).name or value
    return value


__all__ = ["Examples", "Facts", "Layer", "readable_recipe", "without_paths"]
