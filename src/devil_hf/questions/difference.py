"""What two networks say differently of the same images: words gained and lost by layer, and images by how much they changed.

A word tells something of an image where the network makes it likelier there than elsewhere. Over N images x,

    told(word) = mean over images of  r log r,    r = p(word | x) / mean over images of p(word | .)

is its log-likelihood ratio in nats, each image counted as much as the network says the word of it: 0 where it is as likely of
every image, log(1 / share) where it belongs to a share of them and to no other. A word is lost where A tells more by it than B,
gained where B does. Under the null hypothesis the two networks are exchangeable image by image, so their evidence of the word,
log p(word | x) - log p(word | null prefix), is exchanged at random, and both figures are made anew (`paired_swaps`). To divide
each network by its own mean first would not do: its figures would be less random than those that they are compared with. Words
and layers are one family of false discoveries (Benjamini and Hochberg). Of what is certain only changes of a given share of the
richer network's nats are reported: a test of many images finds any change at all.

Probabilities are of the bare word behind the prefix (or a carrier), which one prefix per image answers for all words.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor

from devil_hf.extras import needs
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.outputs_devil import word_evidence
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.model.scoring_devil import run_language_model
from devil_hf.questions.phrases import unknown_phrases
from devil_hf.statistics import false_discovery, paired_swaps

ALL = "all"
LOST, GAINED = "lost", "gained"
LEVEL = 0.05
LEAST = 0.33  # share of the richer network's nats
MOST_WORDS = 100
TELLING = 0.1  # nats that a word must tell, on average of the two networks, for a change to be reported: "and" tells .02
PLAUSIBLE = 0.1  # Li et al. (2023): words with less than this share of the likeliest one's probability are not contrasted
BATCH = 32
MOST_DRAWS = 10_000_000  # exchanges at random: minutes


@dataclass
class Reading:
    """What a network knows of N images, and says of them.

    Args:
        pooled: per layer (N, C_l).
        texts: a description of each image, by all layers together.
    """

    model: DevilModel
    processor: DevilProcessor
    pooled: list[Tensor]
    texts: list[str]

    def prefix(self, layer: str = ALL, rows: slice | Sequence[int] = slice(None)) -> Tensor:
        """(N, k, D_lm) of whole images, by one layer or all."""
        names = self.model.layer_names
        return self.model.translate(
            [one[rows] if layer in (ALL, name) else None for name, one in zip(names, self.pooled, strict=True)]
        )


@dataclass(frozen=True)
class WordChange:
    """A word at a layer ("all": all layers together).

    Args:
        told_a, told_b: nats that it tells of an image, see the module's docstring.
        p, q: of the paired permutation test, and with false discoveries controlled.
        verdict: "lost", "gained", or None.
    """

    layer: str
    word: str
    told_a: float
    told_b: float
    p: float
    q: float
    verdict: str | None


@dataclass(frozen=True)
class Example:
    """An image, and what the two networks say of it.

    Args:
        image: its key.
        change: log-likelihood ratio, in nats, of each network's description to the other's, added up: 0 where they agree.
        words_a, words_b: the words of the descriptions of A and B, with how much likelier the network finds each than the other
            network does, in nats.
        more_a, more_b: what contrastive decoding says: words that one network finds likelier than the other does. None for
            networks with different vocabularies.
    """

    image: str
    change: float
    words_a: tuple[tuple[str, float], ...]
    words_b: tuple[tuple[str, float], ...]
    more_a: str | None
    more_b: str | None


@dataclass(frozen=True)
class Difference:
    """What changed from A to B.

    Args:
        words: each word that was compared, at each layer; the largest changes first.
        examples: images, those that changed most first.
        images: how many images were compared; `words` are judged at false discovery rate `level`, from a change of the share
            `least` of the richer network's nats on.
        left_out: words that one of the two language models cannot represent.
    """

    words: tuple[WordChange, ...]
    examples: tuple[Example, ...]
    layers: tuple[str, ...]
    images: int
    level: float
    least: float
    left_out: tuple[str, ...]

    def found(self, verdict: str) -> dict[str, list[str]]:
        """Layer -> the words that are "lost" or "gained" there."""
        return {name: [one.word for one in self.words if (one.layer, one.verdict) == (name, verdict)] for name in self.layers}

    def as_record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {LOST: self.found(LOST), GAINED: self.found(GAINED)} | dataclasses.asdict(self)


# ------------------------------------------------------------------------------------------------ networks and their readings


@torch.no_grad()
def read_images(
    networks: Sequence[tuple[DevilModel, DevilProcessor]], images: Iterable[tuple[str, Image.Image | None]]
) -> tuple[list[Reading], list[str]]:
    """Show images to each of several networks, in one pass over them.

    Args:
        networks: a model and its processor each.
        images: (key, picture) pairs; None for a bad one, which is left out.

    Returns:
        A reading by each network, without texts yet, and the keys of the images.
    """
    parts: list[list[list[Tensor]]] = [[] for _ in networks]
    keys: list[str] = []
    pairs = ((str(key), picture) for key, picture in tqdm(images, desc="reading images", unit="image") if picture is not None)
    while batch := list(islice(pairs, BATCH)):
        keys += [key for key, _ in batch]
        for (model, processor), own in zip(networks, parts, strict=True):
            pixels = processor(images=[picture for _, picture in batch], return_tensors="pt")["pixel_values"]
            own.append([maps.mean(dim=(2, 3)).float().cpu() for maps in model.extract_features(pixels) if maps is not None])
    pooled = [[torch.cat(layer) for layer in zip(*own, strict=True)] for own in parts]
    return [Reading(*network, one, []) for network, one in zip(networks, pooled, strict=True)], keys


@torch.no_grad()
def describe_images(reading: Reading, max_new_tokens: int = 30) -> None:
    """Let a network describe the images that it has read, greedily."""
    images = len(reading.pooled[0])
    for start in tqdm(range(0, images, BATCH), desc="describing images", unit="batch"):
        said = reading.model.decode(reading.prefix(rows=slice(start, start + BATCH)), max_new_tokens=max_new_tokens)
        reading.texts += [text.strip() for text in reading.processor.batch_decode(said, skip_special_tokens=True)]


# --------------------------------------------------------------------------------------------------------------------- words


def images_needed(layers: int, words: int = MOST_WORDS, level: float = LEVEL) -> int:
    """So many images let a single word at a single layer be found at a level, of all that are tested.

    The smallest p-value of N exchangeable pairs is 2 / 2^N, and Benjamini and Hochberg ask for level / tests of it.
    """
    return math.ceil(1 + math.log2(max(layers * words, 1) / level))


def check_words(words: Iterable[str], *processors: DevilProcessor) -> None:
    """Raise a ValueError that names the first word that a language model cannot represent."""
    if strange := _unknown(words, *processors):
        raise ValueError(f"the tokenizer cannot represent the word {strange[0]!r}: leave it out, or choose another.")


def _unknown(texts: Iterable[str], *processors: DevilProcessor) -> list[str]:
    """Those that a language model does not know, in their order."""
    texts = list(texts)
    strange = {text for processor in processors for text in unknown_phrases(processor, texts)}
    return [text for text in texts if text in strange]


def said_words(texts: Iterable[str], most: int = MOST_WORDS) -> list[str]:
    """The words that are said of most images, of those said of at least two."""
    counts = Counter(word for text in texts for word in set(re.findall(r"[^\W\d_]+(?:[-'][^\W_]+)*", text)))
    return [word for word, count in counts.most_common(most) if count > 1]


@torch.no_grad()
def evidence_of_words(reading: Reading, words: Sequence[str], layers: Sequence[str], carrier: str | None = None) -> np.ndarray:
    """(layers, N, words): evidence of each word of each image by each layer, in nats over the null prefix."""
    phrases = reading.processor(text=list(words), carrier=carrier, return_tensors="pt")
    null = reading.model.score_prefix(reading.model.null_prefix(), phrases).sum(dim=-1)
    tables = []
    for layer in tqdm(layers, desc="scoring words", unit="layer"):
        scores = reading.model.score_prefix(reading.prefix(layer), phrases).sum(dim=-1)
        tables.append((scores - null).double().cpu().numpy())
    return np.stack(tables)


def _sums(odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x, and x log x, of odds x (N, ...); what a word tells is a function of their sums over images."""
    return odds, odds * np.log(np.maximum(odds, np.finfo(float).tiny))


def _told(sums: Sequence[np.ndarray], images: int) -> np.ndarray:
    """Nats told, of sums over so many images of x and of x log x: the scale of x cancels."""
    odds, logged = sums
    return logged / odds - np.log(odds / images)


def told(evidence: np.ndarray) -> np.ndarray:
    """Nats (...) that words tell of an image, of their evidence, or log-probabilities, (N, ...); see the module's docstring."""
    sums = [one.sum(axis=0) for one in _sums(np.exp(evidence - evidence.max(axis=0)))]
    return _told(sums, len(evidence))


def changed_words(
    a: np.ndarray,
    b: np.ndarray,
    words: Sequence[str],
    layers: Sequence[str],
    level: float = LEVEL,
    least: float = LEAST,
    seed: int = 0,
) -> list[WordChange]:
    """Compare two networks by the evidence (layers, N, words) of words of the same images.

    Raises:
        MissingExtraError: without scipy.
    """
    images, scale = a.shape[1], np.maximum(a, b).max(axis=1, keepdims=True)
    # Sums over images of x, and of x log x: an exchange adds to those of one network what it takes from the other.
    pairs = list(zip(*(_sums(np.exp(values - scale)) for values in (a, b)), strict=True))
    first = [x.sum(axis=1).ravel() for x, _ in pairs]
    total = [(x + y).sum(axis=1).ravel() for x, y in pairs]
    gaps = [np.moveaxis(x - y, 1, 0).reshape(images, -1) for x, y in pairs]

    def difference(kept: np.ndarray) -> np.ndarray:
        own = [sums - (1 - kept) @ gap for sums, gap in zip(first, gaps, strict=True)]
        others = [both - sums for both, sums in zip(total, own, strict=True)]
        return _told(own, images) - _told(others, images)

    tests = len(layers) * len(words)
    change, p = paired_swaps(difference, images, draws=_draws(tests, level), seed=seed)
    q = false_discovery(p)
    before, after = (told(np.moveaxis(values, 1, 0)).ravel() for values in (a, b))
    found = []
    for at in range(tests):
        richer = max(before[at], after[at])
        large = before[at] + after[at] >= 2 * TELLING and abs(change[at]) >= least * richer
        verdict = (LOST if change[at] > 0 else GAINED) if large and q[at] <= level else None
        told_a, told_b, chance, controlled = (float(one[at]) for one in (before, after, p, q))
        found.append(WordChange(layers[at // len(words)], words[at % len(words)], told_a, told_b, chance, controlled, verdict))
    return sorted(found, key=lambda row: -abs(row.told_a - row.told_b))


# ------------------------------------------------------------------------------------------------------------------ examples


class ContrastiveDecoding(LogitsProcessor):
    """Contrastive decoding (Li et al., 2023): of the words that are plausible here, those that are likelier here than there.

    Scores become log p(w | own prefix) - log p(w | other prefix) where w has at least the share `PLAUSIBLE` of the probability of
    the likeliest word. `other` (1, P, D_lm) are the input embeddings in front of the text there, and `model` reads them.
    """

    def __init__(self, model: DevilModel, other: Tensor):
        self.model, self.other = model, other

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        words = self.model.get_input_embeddings()(input_ids.to(self.other.device)).to(self.other.dtype)
        embeds = torch.cat([self.other.expand(len(input_ids), -1, -1), words], dim=1)
        there = run_language_model(self.model.language_model, embeds, keep=1).logits[:, -1].float().log_softmax(dim=-1)
        here = scores.float().log_softmax(dim=-1)
        plausible = here >= here.amax(dim=-1, keepdim=True) + math.log(PLAUSIBLE)
        return (here - there.to(here.device)).masked_fill(~plausible, -float("inf")).to(scores.dtype)


def contrast(one: Reading, other: Reading, at: int, max_new_tokens: int = 30) -> str:
    """What `one` says of image `at` that `other` does not say as readily; both must have the same vocabulary."""
    start, away = (reading.prefix(rows=slice(at, at + 1)) for reading in (one, other))
    against = ContrastiveDecoding(other.model, other.model.embed_prefix(away))
    said = one.model.decode(start, max_new_tokens=max_new_tokens, logits_processor=[against])
    return one.processor.batch_decode(said, skip_special_tokens=True)[0].strip()


def text_log_probs(reading: Reading, texts: Sequence[str], rows: Sequence[int]) -> list[list[tuple[str, float]]]:
    """(word, nats) pairs of texts about the images at positions `rows`, one each: log-probabilities given all layers."""
    phrases = reading.processor(text=list(texts), return_tensors="pt")
    lengths = phrases["attention_mask"].sum(dim=1).tolist()
    end = reading.model.config.eos_token_id or 0
    sequences = phrases["input_ids"].masked_fill(phrases["attention_mask"] == 0, end).to(reading.model.device)
    scores, _ = reading.model.sequence_log_probs(reading.prefix(rows=rows), sequences)
    pairs = [
        list(zip(ids[:length], nats[:length], strict=True))
        for ids, nats, length in zip(sequences.tolist(), scores.tolist(), lengths, strict=True)
    ]
    return [word_evidence(reading.processor.tokenizer, one) for one in pairs]


def _more(own: Sequence[tuple[str, float]], others: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """How much likelier each word of a text is to who said it than to the other one; evenly where words part differently."""
    if [word for word, _ in own] == [word for word, _ in others]:
        return tuple((word, nats - other) for (word, nats), (_, other) in zip(own, others, strict=True))
    gap = sum(nats for _, nats in own) - sum(nats for _, nats in others)
    return tuple((word, gap / len(own)) for word, _ in own)


def changed_images(a: Reading, b: Reading, keys: Sequence[str], most: int = 12) -> list[Example]:
    """The images of which two networks say the most different things, at most so many of them.

    Images of which one of them says nothing, or what the other's language model cannot represent, are left out.
    """
    different = [at for at, pair in enumerate(zip(a.texts, b.texts, strict=True)) if pair[0] != pair[1]]
    strange = set(_unknown([*a.texts, *b.texts], a.processor, b.processor))
    rows = [at for at in different if not {a.texts[at], b.texts[at]} & strange]
    if not rows or not most:
        return []
    said = [[reading.texts[at] for at in rows] for reading in (a, b)]
    words = [
        (text_log_probs(own, texts, rows), text_log_probs(other, texts, rows))
        for own, other, texts in ((a, b, said[0]), (b, a, said[1]))
    ]
    of_a, of_b = ([_more(*pair) for pair in zip(*both, strict=True)] for both in words)
    changes = [sum(nats for _, nats in (*one, *other)) for one, other in zip(of_a, of_b, strict=True)]
    same = a.processor.tokenizer.get_vocab() == b.processor.tokenizer.get_vocab()
    found = []
    for place in sorted(range(len(rows)), key=lambda place: -changes[place])[:most]:
        at = rows[place]
        more = (contrast(a, b, at), contrast(b, a, at)) if same else (None, None)
        found.append(Example(keys[at], changes[place], of_a[place], of_b[place], *more))
    return found


# ----------------------------------------------------------------------------------------------------------------- the whole


def compared_layers(a: DevilModel, b: DevilModel, layers: Sequence[str | int] | None = None) -> tuple[str, ...]:
    """ "all", and the layers that both networks have by name, or those of them that are asked for.

    Raises:
        ValueError: for a layer that one of them has not.
    """
    if layers is None:
        return (ALL, *(name for name in a.layer_names if name in b.layer_names))
    asked = [a.layer_names[index] for index in resolve_layers(list(layers), a.layer_names)]
    if alone := [name for name in asked if name not in b.layer_names]:
        raise ValueError(f"layer {alone[0]!r} is in A, but not in B, which has {b.layer_names}: compare others.")
    return (ALL, *asked)


@torch.no_grad()
def compare_networks(
    a: tuple[DevilModel, DevilProcessor],
    b: tuple[DevilModel, DevilProcessor],
    images: Iterable[tuple[str, Image.Image | None]],
    layers: Sequence[str | int] | None = None,
    words: Sequence[str] = (),
    carrier: str | None = None,
    level: float = LEVEL,
    least: float = LEAST,
    examples: int = 12,
    seed: int = 0,
) -> Difference:
    """What B says of images that A does not say, and the other way round.

    Args:
        a, b: a model and its processor each; `devil_hf.build.models.with_backbone` puts another network behind a translator.
        images: (key, picture) pairs; None for a bad one, which is left out.
        layers: compared one by one, beside all together; None for those that both have.
        words: compared beside the 100 that the two descriptions of the images hold most often.
        carrier: a neutral word read before each.
        level: false discovery rate.
        least: share of the richer network's nats from which on a change is reported.
        examples: so many images, at most.

    Raises:
        MissingExtraError: without scipy.
        ValueError: for a level that asks for too many draws, fewer images than the test needs at it, layers that are not in both,
            and words that a language model cannot represent; all of it before any image is looked at.
    """
    needs("scipy", "evaluate")
    compared = compared_layers(a[0], b[0], layers)
    check_words([*words, *([carrier] if carrier else [])], a[1], b[1])
    family: dict[str, Any] = {"layers": len(compared), "words": MOST_WORDS + len(words), "level": level}
    check_level(**family)
    enough: Callable[[int], None] = partial(check_images, **family)
    if isinstance(images, Sized):
        enough(len(images))
    (one, other), keys = read_images((a, b), images)
    enough(len(keys))
    for reading in (one, other):
        describe_images(reading)
    candidates = list(dict.fromkeys([*words, *said_words([*one.texts, *other.texts])]))
    left_out = _unknown(candidates, a[1], b[1])
    candidates = [word for word in candidates if word not in left_out]
    if not candidates:
        raise ValueError("no word was said of two images, so there is nothing to compare: give words.")
    before, after = (evidence_of_words(reading, candidates, compared, carrier) for reading in (one, other))
    changes = changed_words(before, after, candidates, compared, level, least, seed)
    shown = changed_images(one, other, keys, examples)
    return Difference(tuple(changes), tuple(shown), compared, len(keys), level, least, tuple(left_out))


def _draws(tests: int, level: float) -> int:
    """So many exchanges at random give p-values fine enough for the smallest of so many tests to be judged at a level."""
    return max(9_999, math.ceil(2 * tests / level))


def check_level(layers: int, words: int = MOST_WORDS, level: float = LEVEL) -> None:
    """Raise a ValueError for a level that is none, and for one that so many words and layers would need too many draws for."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, such as {LEVEL}.")
    least = 2 * layers * words / MOST_DRAWS
    if level < least * (1 - 1e-9):
        digit = 10 ** math.floor(math.log10(least))
        possible = math.ceil(round(least / digit, 9)) * digit
        remedy = f"a level of {possible:g} or more, or for " if possible < 1 else ""
        raise ValueError(
            f"level={level:g} needs {_draws(layers * words, level):,} exchanges at random for up to {words} words at {layers} "
            f"layers, and {MOST_DRAWS:,} are possible: ask for {remedy}fewer layers or words."
        )


def check_images(images: int, layers: int, words: int = MOST_WORDS, level: float = LEVEL) -> None:
    """Raise a ValueError for fewer images than a test of so many words and layers needs, see `images_needed`."""
    if images < (needed := images_needed(layers, words, level)):
        raise ValueError(
            f"{images} images are too few: up to {words} words at {layers} layers and a false discovery rate of {level:g} need "
            f"{needed}; add images, or ask for fewer layers or a higher rate."
        )


__all__ = [
    "ContrastiveDecoding",
    "Difference",
    "Example",
    "Reading",
    "WordChange",
    "changed_images",
    "changed_words",
    "check_images",
    "check_level",
    "check_words",
    "compare_networks",
    "contrast",
    "describe_images",
    "evidence_of_words",
    "images_needed",
    "read_images",
    "text_log_probs",
    "told",
]
