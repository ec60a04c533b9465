"""Labels of units, from the features that stand for them (`data/unit_features.py`).

Labels are chosen greedily, by beam search, or ("rerank") among the beams by log p(label | unit) - weight log p(label | null
prefix): MILAN's pointwise mutual information, with the prior that this language model has under the null prefix; or among
given words ("words"), by evidence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from devil_hf.data.unit_features import PooledUnits
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.outputs_devil import word_evidence
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.settings import option
from devil_hf.text_files import read_list

STRATEGIES = ("greedy", "beam", "rerank", "words")
ROWS = 256  # units decoded at once


@dataclass(kw_only=True)
class LabelSettings:
    """How labels of units are chosen: what `devil neurons` and `devil evaluate neurons` have in common."""

    strategy: Literal["greedy", "beam", "rerank", "words"] = option("how a label is chosen", "rerank")
    candidates: int = option("beams to choose from", 5)
    prior_weight: float = option("of the null prefix in rerank", 0.2)
    words: Path | None = option('file of words, one a line, that --strategy "words" chooses from', None)
    carrier: str | None = option('a neutral word read before each of the words, such as "the"', None)

    def validate(self) -> None:
        """Raise a ValueError for what can be seen to be wrong before anything is computed."""
        if (self.strategy == "words") != bool(self.words):
            raise ValueError('the strategy "words", and it alone, needs words to choose from')
        if self.candidates < 2:
            raise ValueError(f"candidates={self.candidates} must be at least 2: one is the label, one the runner-up")

    def choice(self) -> dict[str, Any]:
        """The arguments of `label_units`."""
        words = None
        if self.words is not None:
            words = read_list(self.words)
        names = ("strategy", "candidates", "prior_weight", "carrier")
        return {name: getattr(self, name) for name in names} | {"words": words}


@torch.no_grad()
def label_units(
    model: DevilModel,
    processor: DevilProcessor,
    pooled: PooledUnits,
    strategy: str = "rerank",
    candidates: int = 5,
    prior_weight: float = 0.2,
    words: Sequence[str] | None = None,
    carrier: str | None = None,
    max_new_tokens: int = 20,
) -> list[dict]:
    """Label every unit.

    Args:
        strategy: "greedy", "beam" (the most probable of `candidates` beams), "rerank" (by mutual information) or "words".
        candidates: beams, among which the runner-up is found, too.
        prior_weight: of log p(label | null prefix) in "rerank" (MILAN: 0.2).
        words: what "words" chooses from.
        carrier: neutral word that "words" reads before each of them.

    Returns:
        Per unit `layer`, `unit`, `label`, `evidence` (nats per token over the null prefix), `runner_up` and
        `runner_up_evidence` (the best candidate that says something else), `words` (each word of the label and what it owes
        to the features, in nats, after the words before it). Labels of silent units are empty, their evidence None.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not one of {STRATEGIES}")
    if (strategy == "words") != bool(words):
        raise ValueError(f'strategy={strategy!r} with words={words}: "words", and it alone, needs words to choose from')
    if candidates < 2:
        raise ValueError(f"candidates={candidates} must be at least 2: one is the label, one the runner-up")
    rows: list[dict] = []
    bar = tqdm(total=len(pooled.units), desc="labels", unit="unit")
    if strategy == "words":
        phrases = model.check_phrases(processor(text=list(words or ()), carrier=carrier, return_tensors="pt"))
        null = model.score_prefix(model.null_prefix(), phrases)
    for begin in range(0, len(pooled.units), ROWS):
        part = slice(begin, begin + ROWS)
        features = [None if one is None else one[part] for one in pooled.features]
        prefix = model.translate(features, pooled.hidden[part])
        if strategy == "words":
            labelled = _choose_words(model, processor, prefix, list(words or ()), phrases, null)
        else:
            labelled = _choose_texts(model, processor, prefix, strategy, candidates, prior_weight, max_new_tokens)
        for (layer, unit), row, silent in zip(pooled.units[part], labelled, pooled.silent[part].tolist(), strict=True):
            nothing: dict[str, Any] = {"label": "", "evidence": None, "runner_up": "", "runner_up_evidence": None, "words": []}
            rows.append({"layer": layer, "unit": unit} | (nothing if silent else row))
        bar.update(len(labelled))
    bar.close()
    return rows


def _choose_words(
    model, processor, prefix: Tensor, words: list[str], phrases: dict[str, Tensor], null: Tensor
) -> list[dict[str, Any]]:
    """The words (K,) of the most evidence; `null` (1, K, T) are the log-probabilities of their tokens under the null prefix."""
    given = model.score_prefix(prefix, phrases) - null  # 0 for tokens that are not scored
    evidence = given.sum(dim=-1) / phrases["scored_mask"].sum(dim=1)
    best = evidence.topk(min(2, len(words)), dim=1)
    rows = []
    for unit, (values, order) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        second = (words[order[1]], values[1]) if len(order) > 1 else ("", None)
        row = {"label": words[order[0]], "evidence": values[0], "runner_up": second[0], "runner_up_evidence": second[1]}
        scored = phrases["scored_mask"][order[0]].bool().cpu()
        tokens = phrases["input_ids"][order[0]].cpu()[scored].tolist()
        pairs = zip(tokens, given[unit, order[0]].cpu()[scored].tolist(), strict=True)
        rows.append(row | {"words": [list(one) for one in word_evidence(processor.tokenizer, list(pairs))]})
    return rows


def _choose_texts(model, processor, prefix, strategy, candidates, prior_weight, max_new_tokens) -> list[dict]:
    beams = model.decode(prefix, num_beams=candidates, num_return_sequences=candidates, max_new_tokens=max_new_tokens)
    sequences = beams.unflatten(0, (-1, candidates))  # (N, candidates, T)
    if strategy == "greedy":
        greedy = model.decode(prefix, max_new_tokens=max_new_tokens)
        length = max(greedy.shape[1], sequences.shape[2])
        pad = model.padding_token_id
        greedy, sequences = (F.pad(one, (0, length - one.shape[-1]), value=pad) for one in (greedy[:, None], sequences))
        sequences = torch.cat([greedy, sequences], dim=1)
    each = sequences.shape[1]
    flat = sequences.flatten(0, 1)
    given, null = model.sequence_log_probs(prefix.repeat_interleave(each, dim=0), flat)
    tokens = model.word_mask(flat).sum(dim=1).to(given.device)
    per_token = ((given - null).sum(dim=1) / tokens).view(-1, each)
    score = given.sum(dim=1)
    if strategy == "rerank":
        score = score - prior_weight * null.sum(dim=1)
    score = score.view(-1, each)
    if strategy == "greedy":
        score[:, 0] = torch.inf
    texts = [text.strip() for text in processor.batch_decode(flat, skip_special_tokens=True)]
    special = set(processor.tokenizer.all_special_ids)
    rows = []
    for n, order in enumerate(score.argsort(dim=1, descending=True, stable=True).tolist()):
        names = texts[n * each : (n + 1) * each]
        first = order[0]
        second = next((at for at in order if names[at] != names[first]), None)
        at = n * each + first
        nats = zip(flat[at].tolist(), (given[at] - null[at]).tolist(), strict=True)
        pairs = [(token, value) for token, value in nats if token not in special]
        rows.append(
            {
                "label": names[first],
                "evidence": float(per_token[n, first]),
                "runner_up": "" if second is None else names[second],
                "runner_up_evidence": None if second is None else float(per_token[n, second]),
                "words": [list(one) for one in word_evidence(processor.tokenizer, pairs)],
            }
        )
    return rows


@torch.no_grad()
def null_label(model: DevilModel, processor: DevilProcessor, max_new_tokens: int = 20) -> str:
    """What the language model says when every layer is hidden."""
    ids = model.decode(model.null_prefix(), max_new_tokens=max_new_tokens)
    return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def most_frequent(labels: Iterable[str]) -> str:
    """The label that is given most often; of equally frequent ones the first by alphabet."""
    counted = [(-len(list(group)), label) for label, group in groupby(sorted(label for label in labels if label))]
    if not counted:
        raise ValueError("no unit has a label")
    return min(counted)[1]
