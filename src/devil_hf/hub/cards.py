"""Model and data set cards, filled from the templates in `hub_cards/`.

A card says what is known and, just as plainly, what is not: without an evaluation it reads "not measured", without a
control it says that none was run. `devil_hf.hub.publish` collects the facts of a checkpoint; `scripts/build_cards.py` writes the
cards of the paper's recipes. The finished text goes to huggingface_hub's card classes, which read it and render nothing.
"""

import re
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData

from devil_hf.build.lora_devil import LORA_DEFAULTS
from devil_hf.evaluation.results import CHANCE, CONTROLS, Evaluation, judge_controls, metric_name
from devil_hf.hub.facts import Facts
from devil_hf.hub.sources import base_models, source_parts
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.report.templates import Written, code, hub_link, render

TAGS = ["devil", "interpretability", "explainability", "vision-feature-description", "feature-attribution"]
PIPELINE_TAG = "image-to-text"  # the nearest of the Hub's own tasks
_EMPTY_LINES = re.compile(r"(?P<block>^(?P<fence>`{3,})\w+\n.*?\n(?P=fence)$)|\n{3,}", re.DOTALL | re.MULTILINE)
# Of a recipe that nobody has trained there is no picture to ask about.
PHRASES = ["a cat", "a remote control"]


def model_card(facts: Facts) -> ModelCard:
    """The card of a checkpoint or of a recipe."""
    verdict = judge_controls(facts.evaluations)
    text = _filled(
        "model_card.md.jinja",
        _metadata(facts),
        facts=facts,
        config=facts.config,
        lora_rank=(LORA_DEFAULTS | dict(facts.config.lora or {}))["rank"],
        half="16" in str(facts.config.dtype),
        parts=[part | {"source": _source(part)} for part in source_parts(facts.config)],
        phrases=facts.examples.phrases if facts.examples else PHRASES,
        verdict=verdict,
        missing="; ".join(_row_name(name) for name in verdict.missing),
        evaluations=[_table(evaluation) for evaluation in facts.evaluations],
        data=facts.data or ", ".join(facts.datasets),
        checkpoint=_checkpoint_note(facts.config) if facts.published else "none yet",
    )
    return ModelCard(text)


def dataset_card(data: DatasetCardData, **values: Any) -> DatasetCard:
    """A data set's card; `values` are the names in `hub_cards/dataset_card.md.jinja`."""
    return DatasetCard(_filled("dataset_card.md.jinja", data, **values))


def _filled(name: str, metadata: CardData, **values: Any) -> str:
    # Between fences, and in the metadata, empty lines may be someone's text.
    text = _EMPTY_LINES.sub(lambda found: found["block"] or "\n\n", str(render(name, **values)))
    return f"---\n{metadata.to_yaml()}\n---\n{text}"


def _metadata(facts: Facts) -> ModelCardData:
    results = [result for evaluation in facts.evaluations for result in evaluation.model_index()]
    bases = base_models(facts.config)
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=[*TAGS, *(["shapes-world"] if facts.is_shapes_world else [])],
        base_model=bases or None,
        datasets=list(facts.datasets) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    if bases:
        data["base_model_relation"] = "adapter"  # frozen bases, and a small trained part between them
    return data


def _table(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as its template shows it: a row per score and control, nothing where a metric is missing."""
    columns = evaluation.metrics

    def cells(values: dict[str, float]) -> list[str]:
        return [f"{values[metric]:.4g}" if metric in values else "" for metric in columns]

    return {
        "title": evaluation.title,
        "dataset": evaluation.dataset,
        "settings": {name: value for name, value in evaluation.settings.items() if value is not None},
        "heads": [metric_name(metric) for metric in columns],
        "rows": [(name, cells(values)) for name, values in evaluation.scores.items()],
        "controls": [(_row_name(name), cells(values)) for name, values in evaluation.controls.items()],
        "reasons": evaluation.reasons,
    }


def _row_name(control: str) -> str:
    return "chance" if control == CHANCE else CONTROLS.get(control, control)


def _source(part: dict[str, Any]) -> str:
    if part["id"]:
        return hub_link(part["id"])
    if part["part"] == "backbone":
        return Written(f"{code(part['name'])}, not from the Hub")
    width = f" of width {part['width']}" if part["width"] else ""
    return Written(f"a {code(part['name'])}{width}, not from the Hub")


def _checkpoint_note(config: DevilConfig) -> str:
    lora = config.lora is not None
    if config.frozen_weights == "reference":
        trained = "the translator and the LoRA adapters" if lora else "the translator"
        return f"slim: {trained}; the frozen parts are fetched from their sources and verified by hash on loading"
    return f"self-contained: backbone, translator and language model{', with its LoRA adapters' if lora else ''}"


__all__ = ["dataset_card", "model_card"]
