"""Results in a notebook: data frames, and views as HTML, of what the public calls of a model and a processor return."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from PIL import Image
from transformers.utils import requires_backends

from devil_hf.model.outputs_devil import AttributionOutput, ScoreOutput
from devil_hf.model.processing_devil import AttributionOverlays
from devil_hf.questions.word_evidence import SentenceEvidence
from devil_hf.report.html import data_uri, tinted
from devil_hf.report.templates import render

TEMPLATE = "report/templates/notebook.html"
THUMBNAIL = 180  # pixels of the longer side


def to_pandas(result: Any, phrases: Sequence[str] = ()) -> Any:
    """A `pandas.DataFrame` of descriptions, scores or attribution maps.

    Args:
        result: rows of `processor.post_process_descriptions`, one row each; what `explain_words` returned, one row per word
            (sentence, word, evidence, and by layer "alone LAYER" and "lost LAYER"); what `model.score` returned, one row per
            question and phrase (question, phrase, log_prob, evidence); or what `model.attribute` returned, one row per place
            (layer, image, phrase, row, column, and the value in nats under the name of the measure).
        phrases: those that were scored or mapped, in the same order.

    Raises:
        ImportError: when pandas is not installed.
        ValueError: for another number of phrases than were asked for.
    """
    requires_backends(to_pandas, "pandas")
    import pandas

    if isinstance(result, ScoreOutput):
        return pandas.DataFrame(_score_rows(result, phrases), columns=["question", "phrase", "log_prob", "evidence"])
    if isinstance(result, AttributionOutput):
        columns = ["layer", "image", "phrase", "row", "column", result.measure]
        return pandas.DataFrame(_map_rows(result, phrases), columns=columns)
    return pandas.DataFrame([row for at, one in enumerate(result) for row in _table_rows(at, one)])


def _table_rows(at: int, one: Any) -> list[dict[str, Any]]:
    """The rows of a description, or of the words of the sentence at position `at`."""
    if not isinstance(one, SentenceEvidence):
        return [one]
    return [
        {"sentence": at, "word": word.text, "evidence": word.evidence}
        | {f"{name} {layer}": nats for name in ("alone", "lost") for layer, nats in getattr(word, name).items()}
        for word in one.words
    ]


def _score_rows(output: ScoreOutput, phrases: Sequence[str]) -> list[tuple]:
    _check_phrases(phrases, output.log_probs.shape[1])
    return [
        (question, phrase, float(output.log_probs[question, k]), float(output.evidence[question, k]))
        for question in range(len(output.log_probs))
        for k, phrase in enumerate(phrases)
    ]


def _map_rows(output: AttributionOutput, phrases: Sequence[str]) -> list[tuple]:
    rows = []
    for layer, values in output.maps.items():
        _check_phrases(phrases, values.shape[1])
        places = product(*(range(edge) for edge in values.shape))
        for (image, k, row, column), value in zip(places, values.flatten().tolist(), strict=True):
            rows.append((layer, image, phrases[k], row, column, value))
    return rows


def _check_phrases(phrases: Sequence[str], expected: int) -> None:
    if len(phrases) != expected:
        raise ValueError(f"{len(phrases)} phrases were given, but {expected} were asked for: name them in the same order")


class Html:
    """Something that a notebook shows by itself."""

    def __init__(self, html: str):
        self.html = html

    def _repr_html_(self) -> str:
        return self.html


def show(result: Sequence[dict | SentenceEvidence] | AttributionOverlays) -> Html:
    """What a notebook shows.

    Args:
        result: rows of descriptions, as a table of words tinted by their evidence; what `explain_words` returned, each sentence
            tinted by what all layers carry, by each alone, and by what is lost without it; or the pictures of
            `processor.overlay`, of the maps of words (`processor.overlay(found.maps, image)`), too.
    """
    if isinstance(result, AttributionOverlays):
        return Html(render(TEMPLATE, rows=_overlay_rows(result)))
    return Html(render(TEMPLATE, rows=[row for one in result for row in _shown_rows(one)]))


def _shown_rows(one: dict | SentenceEvidence) -> list[dict[str, Any]]:
    if not isinstance(one, SentenceEvidence):
        return [_description_row(one)]
    lines = {"all": [word.evidence for word in one.words]}
    for name, title in (("alone", "{} alone"), ("lost", "lost without {}")):
        lines |= {title.format(layer): [getattr(word, name)[layer] for word in one.words] for layer in one.words[0].alone}
    texts = [word.text for word in one.words]
    return [{"name": name, "pictures": [], "words": tinted(list(zip(texts, nats, strict=True)))} for name, nats in lines.items()]


def _description_row(row: dict) -> dict[str, Any]:
    words = {"words": tinted(row["words"])} if "words" in row else {}
    return {"name": place_name(row), "pictures": [], "description": row["description"]} | words


def _overlay_rows(overlays: AttributionOverlays) -> list[dict[str, Any]]:
    return [
        {"name": layer, "pictures": [_thumbnail(picture) for phrases in rows for picture in phrases]}
        for layer, rows in (overlays.pictures or {}).items()
    ]


def _thumbnail(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(small, lossless=True)


def place_name(row: dict) -> str:
    """Image, layer and location of a description, as text."""
    place = "" if row["location"] is None else f" {row['location']}"
    image = f"{row['image']}  " if "image" in row else ""
    return f"{image}{row['layer']}{place}"


__all__ = ["Html", "place_name", "show", "to_pandas"]
