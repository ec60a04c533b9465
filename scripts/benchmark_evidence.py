"""A sentence explained word by word beside the same figures one by one; `python scripts/benchmark.py evidence` runs it.

The shipped checkpoint and one scene, each word with its evidence, its layers, a map of every place of every layer, and a map of
every hidden tile. Ours is `explain_words`. The loop does what its docstring says, one question after another: the pooled features
of that question through the translator, all layer tokens computed and the hidden ones masked, the words behind its prefix, logits
at every position. It is run twice: with a pass for each word ("one by one"), and with one for all words of a question
("question by question"). Only ours reads the image and writes the sentence, too.

All are timed alternately, on the clock and in seconds of the processor, which a busy machine leaves as they are; ratios are of
medians. With `--sample N` the loops ask every N-th place and tile, in turn from one
repetition to the next, and their seconds are counted for all; differences are of those that were asked.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmark_training import timed
from tqdm.auto import tqdm

from devil_hf import DevilModel, DevilProcessor
from devil_hf.checkpoints.loading import load
from devil_hf.data.worlds import HELD_OUT_WORLD, World
from devil_hf.questions.word_evidence import SentenceEvidence, explain_words, hiding_weights

Question = tuple[str, list[torch.Tensor], list[bool]]  # its name, pooled features by layer, and which layers are hidden
WHOLE, NULL = "whole", "null"


def questions(model: DevilModel, features: list[torch.Tensor], tiles: tuple[int, int]) -> Iterator[Question]:
    """Every question that the figures of a sentence need."""
    means, count = [maps.mean(dim=(2, 3)) for maps in features], len(features)
    yield WHOLE, means, [False] * count
    yield NULL, means, [True] * count
    for at, name in enumerate(model.layer_names):
        only = [other != at for other in range(count)]
        yield f"alone {name}", means, only
        yield f"without {name}", means, [not hidden for hidden in only]
        for row in range(features[at].shape[2]):
            for column in range(features[at].shape[3]):
                pooled = [*means[:at], features[at][:, :, row, column], *means[at + 1 :]]
                yield f"place {name} {row} {column}", pooled, only
    weights = [hiding_weights(tiles, tuple(maps.shape[-2:])) for maps in features]
    for tile in range(tiles[0] * tiles[1]):
        pooled = [(maps * each[tile]).sum(dim=(2, 3)) for maps, each in zip(features, weights, strict=True)]
        yield f"tile {tile // tiles[1]} {tile % tiles[1]}", pooled, [False] * count


def one_by_one(
    model: DevilModel, processor: DevilProcessor, ids: torch.Tensor, asked: list[Question], each_word: bool
) -> dict[str, list[float]]:
    """Log-probabilities of the words of `ids` (T,) by question; a pass for each word, or for all of them."""
    ends = word_ends(processor, ids)
    starts = [0, *ends[:-1]]
    found: dict[str, list[float]] = {}
    for name, pooled, hidden in tqdm(asked, desc="one by one" if each_word else "question by question", leave=False):
        passes = zip(starts, ends, strict=True) if each_word else [(0, ends[-1])]
        values: list[float] = []
        for start, end in passes:
            prefix = model.translator(pooled, torch.tensor([hidden]))
            log_probs = token_log_probs(model, prefix, ids[:end])
            values += (
                [float(log_probs[start:end].sum())]
                if each_word
                else [float(log_probs[first:last].sum()) for first, last in zip(starts, ends, strict=True)]
            )
        found[name] = values
    return found


def token_log_probs(model: DevilModel, prefix: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T,) of tokens behind a prefix (1, k, D_lm)."""
    embed = model.get_input_embeddings()
    start = torch.cat([embed(torch.tensor([[model.config.bos_token_id]])), prefix], dim=1)
    logits = model.language_model(inputs_embeds=torch.cat([start, embed(ids[None])], dim=1)).logits
    return logits[0, start.shape[1] - 1 : -1].log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]


def word_ends(processor: DevilProcessor, ids: torch.Tensor) -> list[int]:
    """The end of each word among the tokens: the next one begins another word of the text."""
    words = [len(processor.tokenizer.decode(ids[:end]).split()) for end in range(1, len(ids) + 1)]
    return [end for end in range(1, len(ids)) if words[end] > words[end - 1]] + [len(ids)]


def difference(found: SentenceEvidence, naive: dict[str, list[float]]) -> float:
    """The largest absolute difference of our figures from those of the loop, in nats."""
    whole, null = (torch.tensor(naive[name]) for name in (WHOLE, NULL))
    ours, theirs = [torch.tensor([word.evidence for word in found.words])], [whole - null]
    for name, values in naive.items():
        kind, *where = name.split()
        value = torch.tensor(values)
        if kind in ("alone", "without"):
            figure = "alone" if kind == "alone" else "lost"
            ours.append(torch.tensor([getattr(word, figure)[where[0]] for word in found.words]))
            theirs.append(value - null if kind == "alone" else whole - value)
        elif kind == "place":
            ours.append(found.by_layer[where[0]][:, int(where[1]), int(where[2])])
            theirs.append(value - null)
        elif kind == "tile":
            ours.append(found.maps.maps["hidden"][0, :, int(where[0]), int(where[1])])
            theirs.append(whole - value)
    return float((torch.stack(ours) - torch.stack(theirs)).abs().max())


@torch.no_grad()
def evidence(repeats: int, sample: int) -> dict:
    """Seconds of the three, their ratios, and the largest difference."""
    model, processor = load("shapes", "cpu")
    pixels = processor(images=World(1, HELD_OUT_WORLD).scene(0).image, return_tensors="pt")["pixel_values"]
    (found,) = explain_words(model, processor, pixels)  # the warm-up
    tiles = tuple(found.maps.maps["hidden"].shape[-2:])
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "one by one": [], "question by question": []}
    worst, count = 0.0, 0

    def run(name: str, times: float, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.process_time()
        elapsed, result = timed(function, *arguments)
        taken[name].append((times * elapsed, times * (time.process_time() - begun)))
        return result

    features = model.extract_features(pixels)
    ids = processor(text=[found.text], return_tensors="pt")["input_ids"][0]
    every = list(questions(model, features, tiles))
    for turn in range(repeats):
        (found,) = run("ours", 1, explain_words, model, processor, pixels)
        asked = [one for at, one in enumerate(every) if at < 2 or at % sample == turn % sample]
        for name, each_word in (("one by one", True), ("question by question", False)):
            naive = run(name, len(every) / len(asked), one_by_one, model, processor, ids, asked, each_word)
            worst, count = max(worst, difference(found, naive)), len(naive)
    clock, processor_time = (
        {name: statistics.median(pair[at] for pair in pairs) for name, pairs in taken.items()} for at in (0, 1)
    )
    return {
        "sentence": found.text,
        "questions_asked_by_the_loops": count,
        "seconds_evidence": clock,
        "cpu_seconds_evidence": processor_time,
        "ratio_evidence": clock["one by one"] / clock["ours"],
        "ratio_evidence_cpu": processor_time["one by one"] / processor_time["ours"],
        "ratio_evidence_questions_cpu": processor_time["question by question"] / processor_time["ours"],
        "max_abs_diff_evidence": worst,
    }
