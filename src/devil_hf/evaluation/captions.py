"""Captions as a measure of what each layer tells: describe any source of image-text pairs, score it against people's captions.

A pass is shared by all processes and written down batch by batch, so that a run that is stopped loses at most a batch, and a
metric that is asked for later needs neither data nor inference.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.repocard_data import eval_results_to_model_index
from tqdm.auto import tqdm
from transformers.utils import logging

from devil_hf.data.decoding import BadSamples, PairDecoder
from devil_hf.data.pairs import open_pairs
from devil_hf.data.worlds import world_label
from devil_hf.evaluation.controls import best_constant
from devil_hf.evaluation.records import Records
from devil_hf.evaluation.results import CONTROLS, Evaluation, fingerprint, metric_name
from devil_hf.evaluation.text.bertscore import MILAN, BertScoreSettings
from devil_hf.evaluation.text.metrics import METRICS, CaptionScorer, check_metrics
from devil_hf.model.backbone_devil import weights_hash
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor

logger = logging.get_logger(f"transformers.{__name__}")

PREDICTIONS_FILE = "predictions.jsonl"
SCORES_FILE = "scores.json"
TITLE = "Captions of features"
END = "end"  # key of the record that says how many rows there are
COLUMNS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "spice", "bertscore")


def evaluate_captions(
    model: DevilModel,
    processor: DevilProcessor,
    sources: Sequence[dict[str, Any]],
    output_dir: str | PathLike,
    metrics: Sequence[str] = METRICS,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    bert: BertScoreSettings = MILAN,
    **generation_kwargs,
) -> dict[str, Any]:
    """Describe all pairs of `sources` by all layers together and by each alone, and score the descriptions.

    Args:
        sources: as in a recipe, see `devil_hf.data.pairs`.
        output_dir: where `predictions.jsonl` and `scores.json` are written; a pass that was stopped there goes on. Rows are told
            apart by their place in `sources`: data that change need another folder.
        metrics: see `caption_scores`.
        limit: only this many pairs from the beginning.
        batch_size: images at once, per process.
        seed: of the control that shuffles.
        bert: which BERTScore.
        generation_kwargs: for `DevilModel.describe`: `guidance`, `num_beams`, `max_new_tokens`, ...

    Returns:
        What `scores.json` holds, in the layout of `devil_hf.evaluation.results`, with `missing` metrics and the entries of a
        `model-index`; on processes other than the main one, an empty dictionary.

    Raises:
        ValueError: if a metric is unknown, a source malformed, no pair can be used, or `output_dir` holds a pass with
            other settings.
    """
    check_metrics(metrics)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves nothing to evaluate; give at least 1, or none")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    state, folder = PartialState(), Path(output_dir)
    if state.num_processes > 1:
        model.to(state.device)
    decides = {"weights": weights_hash(model), "sources": list(sources), "generation": generation_kwargs}
    records = Records(folder / PREDICTIONS_FILE, decides) if state.is_main_process else None
    shared: list[Any] = [set(records.rows) if records else None, records.rows.get(END) if records else None]
    if state.num_processes > 1:
        broadcast_object_list(shared)
    done, end = shared
    count = limit if end is None else min(end, limit or end)
    if count is None or any(str(number) not in done for number in range(count)):
        _describe_pairs(model, processor, sources, records, done, limit, batch_size, generation_kwargs)
    if records is None:
        return {}
    rows = [records[str(number)] for number in range(_count(records, limit))]
    good = [row for row in rows if "problem" not in row]
    if not good:
        raise ValueError(
            f"none of {len(rows)} pairs can be used; the first: {rows[0]['problem'] if rows else 'no pairs'}"
        )
    if len(good) < len(rows):
        logger.warning(f"{len(rows) - len(good)} of {len(rows)} pairs cannot be used and are left out of the scores")
    texts = {name: [row["descriptions"][name] for row in good] for name in good[0]["descriptions"]}
    content = score_descriptions(texts, [row["references"] for row in good], seed, metrics, bert)
    settings = {"seed": seed, "left_out": len(rows) - len(good), **generation_kwargs}
    if any("bertscore" in row for row in content["scores"].values()):
        settings["bertscore"] = str(bert)
    content = _results(content, sources, len(good), settings, model)
    (folder / SCORES_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def _count(records: Records, limit: int | None) -> int:
    known = len(records.rows) - (END in records)
    return known if limit is None else min(known, limit)


def _describe_pairs(model, processor, sources, records, done, limit, batch_size, generation_kwargs) -> None:
    """Describe what is not recorded yet; every process its part of each batch."""
    state = PartialState()
    pairs = open_pairs(sources, seed=0, shuffle=False)
    total = len(pairs) if hasattr(pairs, "__len__") else sum(source.get("size", 0) for source in sources) or None
    total = limit if total is None else min(total, limit or total)
    decode = PairDecoder(
        BadSamples(limit=1.0)
    )  # counted in the result; a process that stops would leave the others waiting
    read = 0
    progress = tqdm(total=total, desc="describe", unit="image", disable=not state.is_main_process)
    for batch in _batches(enumerate(islice(pairs, limit)), batch_size * state.num_processes):
        todo = [(number, row) for number, row in batch if str(number) not in done]
        mine = todo[state.process_index :: state.num_processes]
        found = gather_object(_describe_batch(model, processor, decode, mine, generation_kwargs)) if todo else []
        if records is not None:
            for number, row in sorted(found, key=lambda item: item[0]):
                records.add(str(number), row)
        read += len(batch)
        progress.update(len(batch))
    progress.close()
    if records is not None and (limit is None or read < limit) and END not in records:
        records.add(END, read)


def _describe_batch(model, processor, decode, batch, generation_kwargs) -> list[tuple[int, dict[str, Any]]]:
    found: list[tuple[int, dict[str, Any]]] = []
    samples = []
    for number, row in batch:
        sample = decode(row)
        if sample is None:
            found.append((number, {"image": row["key"], "problem": row["problem"] or "cannot be used"}))
        else:
            samples.append((number, sample))
    if samples:
        texts = describe_images(model, processor, [sample["image"] for _, sample in samples], **generation_kwargs)
        for at, (number, sample) in enumerate(samples):
            said = {name: rows[at] for name, rows in texts.items()}
            found.append((number, {"image": sample["key"], "references": sample["captions"], "descriptions": said}))
    return found


def describe_images(
    model: DevilModel, processor: DevilProcessor, images: Sequence, **generation_kwargs
) -> dict[str, list[str]]:
    """Descriptions of every image, by "all" layers together and by each layer alone."""
    texts: dict[str, list[str]] = {name: [] for name in ("all", *model.layer_names)}
    pixels = processor(images=list(images), return_tensors="pt").to(model.device)
    output = model.describe(**pixels, **generation_kwargs)
    for row, text in enumerate(processor.batch_decode(output.sequences, skip_special_tokens=True)):
        texts[output.layer_of(row)].append(text.strip())
    return texts


def score_descriptions(
    texts: dict[str, list[str]],
    references: Sequence[Sequence[str]],
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
    bert: BertScoreSettings = MILAN,
) -> dict[str, dict]:
    """Caption scores by layer, with two controls that use no image.

    "shuffled" gives each image the all-layers description of another one; "constant" gives every image the same text: of the
    twenty most frequent descriptions and references the one with the best CIDEr, chosen with the references in hand.

    Returns:
        `scores`, `controls` and `missing`: row -> metric -> value, and metric -> why it is missing.
    """
    scorer = CaptionScorer(references, metrics, bert)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(references), generator=generator)
    shuffled = [texts["all"][int(index)] for index in order.roll(1)[order.argsort()]]
    constant = best_constant(texts["all"], references)
    targets = texts | {"shuffled": shuffled, "constant": [constant] * len(references)}
    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name, said in tqdm(targets.items(), desc="score", unit="row", leave=False):
        rows[name] = scorer(said)
        missing |= rows[name].pop("missing", {})
    rows["constant"]["text"] = constant
    controls = {name: rows.pop(name) for name in ("shuffled", "constant")}
    return {"scores": rows, "controls": controls, "missing": missing}


def _results(content, sources, images: int, settings: dict[str, Any], model: DevilModel) -> dict[str, Any]:
    """The layout of `devil_hf.evaluation.results`, with the entries of a model card."""
    dataset: dict[str, Any] = {"name": " + ".join(_source_name(source) for source in sources), "size": images}
    splits = {source["split"] for source in sources if "split" in source}
    if len(splits) == 1:
        (dataset["split"],) = splits
    if len(sources) == 1 and sources[0]["kind"] == "hub":
        dataset["id"] = sources[0]["path"]
    entries = Evaluation(TITLE, content["scores"], dataset=dataset, settings=settings).model_index()
    head = {"title": TITLE, "dataset": dataset, "settings": settings, "weights": fingerprint(model)}
    name = Path(str(model.name_or_path)).name or "devil"
    return head | content | {"model-index": eval_results_to_model_index(name, entries)}


def _source_name(source: dict[str, Any]) -> str:
    if source["kind"] == "shapes":
        return world_label(source["seed"])
    place = source.get("path") or source.get("annotations") or source.get("captions") or source["urls"]
    return source["path"] if source["kind"] == "hub" else Path(place if isinstance(place, str) else place[0]).name


def caption_table(content: dict[str, Any]) -> str:
    """Results as text, in the papers' units (times 100); what is missing is said below."""
    rows = content["scores"] | {CONTROLS[name]: row for name, row in content["controls"].items()}
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    first = max(len(name) for name in rows) + 2
    lines = [" " * first + "".join(f"{metric_name(column):>14}" for column in columns)]
    lines += [f"{name:{first}}" + "".join(_percent(row.get(c)) for c in columns) for name, row in rows.items()]
    lines += [f"{metric_name(name)} is missing: {reason}" for name, reason in content["missing"].items()]
    if left_out := content.get("settings", {}).get("left_out"):
        lines.append(f"{left_out} pairs could not be used and are left out; {PREDICTIONS_FILE} names them")
    if bert := content.get("settings", {}).get("bertscore"):
        lines.append(f"BERTScore: {bert}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return f"{'':14}" if value is None else f"{100 * value:14.1f}"


def _batches(rows: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(rows, size)):
        yield batch
