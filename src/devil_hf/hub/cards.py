"""Model and data set cards, filled from the Jinja templates in `hub_cards/` by huggingface_hub's card classes.

A card says what is known and, just as plainly, what is not: without an evaluation it reads "not measured", without a
control it says that none was run. `devil_hf.hub.publish` collects the facts of a checkpoint; `scripts/build_cards.py` writes the
cards of the paper's recipes.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import timm
import yaml
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from devil_hf.checkpoints import SCOPE
from devil_hf.evaluation.results import CHANCE, CONTROLS, Evaluation, judge_controls, metric_name
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.model.lora_devil import LORA_DEFAULTS

TAGS = ["devil", "interpretability", "explainability", "vision-feature-description", "feature-attribution"]
PIPELINE_TAG = "image-to-text"  # the nearest of the Hub's own tasks
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
    datasets: list[str] = field(default_factory=list)
    data: str | None = None
    language: str = "en"
    revision: str | None = None
    published: bool = True

    @property
    def is_shapes_world(self) -> bool:
        return self.config.scope == SCOPE


def template_folder() -> Path:
    """`hub_cards/`: within an installed package, else at the top of the source tree."""
    installed = Path(__file__).parents[1] / "hub_cards"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "hub_cards"


def model_card(facts: Facts) -> ModelCard:
    """The card of a checkpoint or of a recipe."""
    config, examples = facts.config, facts.examples
    results = [result for evaluation in facts.evaluations for result in evaluation.model_index()]
    bases = base_models(config)
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=[*TAGS, *(["shapes-world"] if facts.is_shapes_world else [])],
        base_model=bases or None,
        datasets=facts.datasets or None,
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    if bases:
        data["base_model_relation"] = "adapter"  # frozen bases, and a small trained part between them
    parts = source_parts(config)
    return ModelCard.from_template(
        data,
        template_str=_rendering(
            "model_card.md.jinja",
            title=facts.repo_id.split("/")[-1],
            repo_id=facts.repo_id,
            published=facts.published,
            config=config,
            scope=config.scope,
            backbone=parts[0]["label"],
            language_model=parts[1]["label"],
            verdict=judge_controls(facts.evaluations),
            input_size=facts.layers[0].input_size,
            layers=facts.layers,
            examples=examples,
            phrases=repr(examples.phrases if examples else ["a cat", "a remote control"]),
            revision_argument=f'revision="{facts.revision}", ' if facts.revision else "",
            evaluations=facts.evaluations,
            trained_parameters=f"{facts.trained_parameters:,}",
            lora_rank=(LORA_DEFAULTS | dict(config.lora or {}))["rank"],
            data=facts.data or ", ".join(facts.datasets) or _data_note(facts),
            parts=parts,
            checkpoint=_checkpoint_note(facts),
            recipe=facts.recipe,
            recipe_note=_recipe_note(facts),
        ),
    )


def dataset_card(data: DatasetCardData, **values: Any) -> DatasetCard:
    """A data set's card; `values` are the names in `hub_cards/dataset_card.md.jinja`."""
    return DatasetCard.from_template(data, template_str=_rendering("dataset_card.md.jinja", **values))


def _rendering(name: str, **values: Any) -> str:
    """A template of `hub_cards/` filled, but for the metadata, which huggingface_hub writes."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "metric_name": metric_name,
        "control_name": lambda name: "chance" if name == CHANCE else CONTROLS.get(name, name),
        "number": lambda value: "" if isinstance(value, jinja2.Undefined) else f"{value:.4g}",
    }
    text = (template_folder() / name).read_text(encoding="utf-8")
    text = environment.from_string(text).render(values | {"card_data": "\0"})
    text = re.sub(r"\n{3,}", "\n\n", text)
    # What was filled in may itself look like a template: only the metadata is left to be rendered.
    return "{% raw %}" + text.replace("\0", "{% endraw %}{{ card_data }}{% raw %}") + "{% endraw %}"


# ---------------------------------------------------------------------------------------------------------------- facts


def base_models(config: DevilConfig) -> list[str]:
    """Hub ids of the backbone and the language model, as far as they came from the Hub."""
    return [part["id"] for part in source_parts(config) if part["id"]]


def source_parts(config: DevilConfig) -> list[dict[str, Any]]:
    """Backbone and language model: `name`, `label` for prose, `source`, Hub `id`, `revision` and `sha256`, None if unknown."""
    vision, text = config.backbone_config or {}, config.language_model_source or {}
    architecture = vision.get("architecture") or vision.get("model_class", "").rpartition(".")[-1] or vision.get("kind")
    names = [("backbone", vision, f"`{architecture}`"), ("language model", text, _language_model_name(config))]
    parts = []
    for name, entry, fallback in names:
        identifier = hub_id(entry.get("source"))
        label = (
            f"[{identifier}](https://huggingface.co/{identifier})" if identifier else f"{fallback}, not from the Hub"
        )
        pinned = {key: entry.get(key) for key in ("revision", "sha256")}
        parts.append({"name": name, "label": label, "source": label, "id": identifier} | pinned)
    return parts


def _language_model_name(config: DevilConfig) -> str:
    text = config.text_config
    size = getattr(text, "hidden_size", None)
    return f"a `{text.model_type}`" + (f" of width {size}" if size else "")


def hub_id(source: str | None) -> str | None:
    """The Hub repository of a part's source; None for a directory, or a module that was given as it is."""
    if not source or os.path.isabs(source) or os.path.isdir(source):
        return None
    source = source.removeprefix("hf-hub:").partition("@")[0]
    if "/" not in source and timm.is_model(source.split(".")[0]):
        known = timm.models.get_pretrained_cfg(source, allow_unregistered=False)
        found = known.hf_hub_id if known is not None else None
        return (found if found != "timm/" else f"timm/{source}") or None
    return source


def _data_note(facts: Facts) -> str:
    if facts.is_shapes_world:
        return "rendered scenes of the shapes world (`devil_hf.data.shapes`), with captions from a small grammar"
    return "not recorded"


def _recipe_note(facts: Facts) -> str:
    if facts.is_shapes_world:
        return (
            "`devil quickstart` is the recipe: it trains such a translator from nothing, and measures it. "
            "`scripts/build_embedded.py` of the sources also makes the frozen parts."
        )
    return "The recipe was not recorded with this checkpoint."


def _checkpoint_note(facts: Facts) -> str:
    if not facts.published:
        return "none yet"
    lora = facts.config.lora is not None
    if facts.config.frozen_weights == "reference":
        trained = "the translator and the LoRA adapters" if lora else "the translator"
        return f"slim: {trained}; the frozen parts are fetched from their sources and verified by hash on loading"
    return f"self-contained: backbone, translator and language model{', with its LoRA adapters' if lora else ''}"


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


__all__ = ["Examples", "Facts", "Layer", "base_models", "dataset_card", "hub_id", "model_card", "readable_recipe"]
