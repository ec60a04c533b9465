"""`devil evaluate captions`: what each layer tells, measured against people's captions.

Any source of image-text pairs is described by all layers together and by each alone. A pass is shared by all processes and
written down batch by batch, so that a run that is stopped loses at most a batch, and a metric that is asked for later needs
neither data nor inference.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.repocard_data import eval_results_to_model_index
from tqdm.auto import tqdm
from transformers.utils import logging

from devil_hf.data.decoding import BadSamples, PairDecoder
from devil_hf.data.identity import PairIdentities
from devil_hf.data.pairs import open_pairs
from devil_hf.data.specifications import caption_sources, named_sources
from devil_hf.evaluation.evaluator import END, EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import CONTROLS, Evaluation
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.text.bertscore import BERT_MODEL, MILAN, BertScoreSettings
from devil_hf.evaluation.text.metrics import CAPTION_METRICS, CaptionScorer, best_constant, check_metrics
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.settings import option

logger = logging.get_logger(f"transformers.{__name__}")

ONE_IMAGE = "there is no other image to take a description from; give at least 2 images"


@dataclass(kw_only=True)
class CaptionsSettings(EvaluationSettings):
    """Captions of images, and how they are described and compared."""

    checkpoint: str = option("directory, Hub id, or shapes: the shipped one", positional=True)  # type: ignore[assignment]
    source: str = option("caption folder, shapes:COUNT[:SEED], or YAML file of sources", positional=True)
    split: str | None = option("of a caption folder; look at a test split once", None)
    metrics: list[str] | None = option("bleu meteor rouge_l cider spice bertscore, or single scores (default: all)", None)
    guidance: float = option("above 1: favour what the features add", 1.0)
    num_beams: int = option("1 is greedy", 1, least=1)
    max_new_tokens: int = option("at most so many tokens", 30, least=1)
    seed: int = option("of the shuffled control", 0)
    output_dir: Path = option("of predictions.jsonl, where a stopped run goes on, and scores.json", Path("devil-captions"))
    bert_model: str = option("name or directory", BERT_MODEL)
    bert_layers: int | None = option("of a directory, how many layers to use (roberta-large: 17)", None)
    bert_baseline: Path | None = option("of a directory, the file of values to rescale by", None)

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        check_metrics(self.metrics)


@EVALUATORS.register("captions")
class CaptionsEvaluator(Evaluator):
    """Descriptions by every layer against people's captions, with two controls that use no image."""

    name = "captions"
    summary = "score what each layer says on captions"
    example = "devil evaluate captions user/devil-resnet50-opt125m flickr8k --split test --output-dir scores/flickr8k"
    Settings = CaptionsSettings
    records_file = "predictions.jsonl"

    def open(self) -> Iterable[str]:
        """Positions in the source, which is read when rows are missing; where it ends is found out then."""
        settings = self.settings
        self.bert = BertScoreSettings(settings.bert_model, settings.bert_layers, settings.bert_baseline)
        self.sources = caption_sources(settings.source, settings.split)
        self.pairs: Iterator | None = None
        self.decode = PairDecoder(BadSamples(limit=1.0))  # what is bad is counted in the result, and stops nothing
        self.total = settings.limit or sum(source.get("size", 0) for source in self.sources) or None
        return map(str, count() if settings.limit is None else range(settings.limit))

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of `DevilModel.describe`."""
        return {name: getattr(self.settings, name) for name in ("guidance", "num_beams", "max_new_tokens")}

    def decides(self) -> dict[str, Any]:
        """The data and the decoding; rows are told apart by their place in the sources."""
        return {"sources": self.sources, "generation": self.generation}

    @cached_property
    def identities(self) -> PairIdentities:
        """Of the rows of the sources."""
        return PairIdentities(self.sources, open_pairs(self.sources, seed=0, shuffle=False))

    def identity(self, key: str) -> str | None:
        """Of the image and its captions; of a stream, of its shards."""
        return self.identities.extent if key == END else self.identities(int(key))

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """`image`, `references` and `descriptions` by layer of each pair, or the `problem` of one that cannot be used."""
        if self.pairs is None:
            self.pairs = enumerate(open_pairs(self.sources, seed=0, shuffle=False))
        wanted = {int(key) for key in keys}
        found: list[tuple[int, dict[str, Any]]] = []
        while wanted and (pair := next(self.pairs, None)) is not None:
            if pair[0] in wanted:
                wanted.remove(pair[0])
                found.append(pair)
        return self._described([row for _, row in found])

    def _described(self, encoded: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        samples = [self.decode(row) for row in encoded]
        images = [sample["image"] for sample in samples if sample is not None]
        texts = describe_images(self.model, self.processor, images, **self.generation) if images else {}
        said = iter([{name: rows[at] for name, rows in texts.items()} for at in range(len(images))])
        return [
            {"image": row["key"], "problem": row["problem"] or "cannot be used"}
            if sample is None
            else {"image": sample["key"], "references": sample["captions"], "descriptions": next(said)}
            for row, sample in zip(encoded, samples, strict=True)
        ]

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See `score_descriptions`."""
        settings, good = self.settings, [row for row in rows.values() if "problem" not in row]
        if not good:
            first = next(iter(rows.values()))["problem"] if rows else "no pairs"
            raise ValueError(f"none of {len(rows)} pairs can be used; the first: {first}")
        if len(good) < len(rows):
            logger.warning(f"{len(rows) - len(good)} of {len(rows)} pairs cannot be used and are left out of the scores")
        texts = {name: [row["descriptions"][name] for row in good] for name in good[0]["descriptions"]}
        metrics = list(CAPTION_METRICS) if settings.metrics is None else settings.metrics
        found = score_descriptions(texts, [row["references"] for row in good], settings.seed, metrics, self.bert)
        noted = {"seed": settings.seed, "left_out": len(rows) - len(good), **self.generation}
        if any("bertscore" in row for row in found["scores"].values()):
            noted["bertscore"] = str(self.bert)
        evaluation = Evaluation(
            title="Captions of features",
            scores=found["scores"],
            controls=found["controls"],
            dataset=named_sources(self.sources) | {"size": len(good)},
            settings=noted,
            missing=found["missing"],
            details={"texts": found["texts"]},
        )
        name = Path(str(self.model.name_or_path)).name or "devil"
        evaluation.details["model-index"] = eval_results_to_model_index(name, evaluation.model_index())
        return evaluation

    def text(self, evaluation: Evaluation) -> str:
        """In the papers' units (times 100)."""
        columns = [score for metric in CAPTION_METRICS.values() for score in metric.scores]
        rows = evaluation.scores | evaluation.controls
        lines = [table(rows, columns, lambda value: f"{100 * value:.1f}", names=CONTROLS)]
        if left_out := evaluation.settings.get("left_out"):
            lines.append(f"{left_out} pairs could not be used and are left out; {self.records_file} names them")
        if bert := evaluation.settings.get("bertscore"):
            lines.append(f"BERTScore: {bert}")
        return "\n".join(lines)


def describe_images(model: DevilModel, processor: DevilProcessor, images: Sequence, **generation_kwargs) -> dict[str, list[str]]:
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
    metrics: Sequence[str] | None = None,
    bert: BertScoreSettings = MILAN,
) -> dict[str, dict]:
    """Caption scores by layer, with two controls that use no image.

    "shuffled" gives each image the all-layers description of another one; "constant" gives every image the same text: of the
    twenty most frequent descriptions and references the one with the best CIDEr (ROUGE-L where CIDEr is not defined), chosen
    with the references in hand.

    Returns:
        `scores` and `controls`: row -> metric -> value; `missing`: metric or row -> why; `texts`: the constant one.
    """
    scorer = CaptionScorer(references, metrics, bert)
    count = len(references)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    shuffled = [texts["all"][int(index)] for index in order.roll(1)[order.argsort()]]
    cider = CaptionScorer(scorer.references, ["cider"])
    judge = CaptionScorer(scorer.references, ["rouge_l"]) if cider.missing else cider
    captions = [text for several in references for text in several]
    constant = best_constant([texts["all"], captions], lambda text: next(iter(judge([text] * count).values())))
    targets = texts | ({"shuffled": shuffled} if count > 1 else {}) | {"constant": [constant] * count}
    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {} if count > 1 else {"shuffled": ONE_IMAGE}
    for name, said in tqdm(targets.items(), desc="score", unit="row", leave=False):
        rows[name] = scorer(said)
        missing |= rows[name].pop("missing", {})
    controls = {name: rows.pop(name) for name in ("shuffled", "constant") if name in rows}
    return {"scores": rows, "controls": controls, "missing": missing, "texts": {"constant": constant}}
