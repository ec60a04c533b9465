"""Grounded descriptions: several candidates for the whole image, chosen by what single places say of their phrases.

A pooled feature knows that there is something red, something dotted, a star and a square, but little of what belongs to
what. Places know: each shows one thing. So the whole image proposes (beam search), and places decide. A candidate c with
the phrases n_1 ... n_m gets

    log p(c | whole image) + g sum_j max_r [log p(n_j | place r) - log p(n_j | null prefix)]

divided by its number of tokens, where the places r tile the image; with g = 0 it chooses as beam search does (which, under
guidance, ranks by other probabilities). Nothing is trained for it. It goes beyond the paper, and it needs a translator that
has learned single places, which location dropout sees to.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import read_number, resolve_layers
from devil_hf.model.processing_devil import DevilProcessor

DETERMINERS = frozenset(
    [
        *("a", "an", "the", "this", "these", "those", "some", "several", "many", "another", "each"),
        *("his", "her", "its", "their", "two", "three", "four", "five", "six"),
    ]
)
BREAKS = frozenset(
    [
        *("and", "or", "but", "with", "without", "in", "on", "at", "to", "from", "by", "near", "beside", "above"),
        *("below", "over", "under", "behind", "through", "into", "onto", "inside", "outside", "along", "across"),
        *("around", "against", "between", "among", "toward", "towards", "up", "down", "off", "for", "as", "while"),
    ]
)
EMPTY_WORDS = frozenset(["there", "here", "is", "are", "it", "of", "that", "which", "who"])
# What is said of the picture, and not of what is in it.
OPENING = re.compile(
    r"^(?:in (?:this|the) (?:picture|photo|photograph|image)\b,?"
    r"|(?:there is |this is |it is )?(?:a|an|the|this) (?:black and white )?(?:picture|photo|photograph|image)"
    r" (?:of|shows|showing)\b)"
)
# Directions name no object of their own: "to the left of", "next to", "in front of".
DIRECTION = re.compile(r"\b(?:(?:to|on|at|in) )?(?:the )?(?:left|right|front|top|back|middle|side) of\b|\b(?:next|close) to\b")


def noun_phrases(text: str) -> list[str]:
    """Cut an English caption into phrases that one place can answer: before determiners, and at conjunctions and prepositions.

    It knows a few dozen function words and no grammar: verbs stay with their subject ("a man riding", "a horse"). For other
    languages, or better phrases, give `describe_grounded` a function of your own, such as spaCy's noun chunks.
    """
    content = OPENING.sub("", " ".join(text.lower().split()))
    words = DIRECTION.sub("and", content).replace(",", " and ").replace(".", " and ").split()
    groups: list[list[str]] = [[]]
    for before, word in zip(["", *words], words, strict=False):
        if word in BREAKS:
            groups.append([])
        elif word in DETERMINERS and before not in DETERMINERS:
            groups.append([word])
        else:
            groups[-1].append(word)
    return [phrase for group in groups if (phrase := _trimmed(group))]


def _trimmed(words: list[str]) -> str:
    """Without what no phrase begins or ends with: "there is", "that is", a determiner left alone."""
    while words and words[-1] in EMPTY_WORDS | DETERMINERS:
        words = words[:-1]
    while words and words[0] in EMPTY_WORDS:
        words = words[1:]
    return " ".join(words)


CANDIDATES = 8
STRENGTH = 0.1  # chosen on scenes that no reported figure is measured on
PLACES_TO_A_SIDE = 4
# Arguments of `generate` that follow from the candidates.
DECIDED = frozenset(["num_beams", "num_return_sequences", "return_dict_in_generate"])


@dataclass(frozen=True)
class GroundedPhrase:
    """A phrase of a description, and how much the place that speaks for it most adds to it.

    Args:
        text: the phrase.
        evidence: nats over the null prefix, summed over the phrase's tokens; below zero no place speaks for it. Which place it
            is says little of where the thing is, since deep layers see beyond their place: `attribute` maps that.
    """

    text: str
    evidence: float


@dataclass(frozen=True)
class GroundedDescription:
    """A chosen candidate.

    Args:
        text: the description.
        log_prob: of the text and its end, given the whole image, in nats.
        tokens: of the text and its end.
        phrases: its phrases with their evidence, in the order of the text.
    """

    text: str
    log_prob: float
    tokens: int
    phrases: tuple[GroundedPhrase, ...]

    def score(self, strength: float) -> float:
        """What candidates are ranked by, in nats per token; places count with the weight `strength`."""
        return (self.log_prob + strength * sum(phrase.evidence for phrase in self.phrases)) / self.tokens


def tile_regions(grid: int, aspect: float = 1.0) -> Tensor:
    """(grid * grid, H, W) masks of the tiles of a picture `aspect` times as wide as high, by row, then by column."""
    grid = read_number(grid, "grid", 1)
    side = 16  # pixels of a tile: fine enough for the resizing to any layer's grid
    tiles = torch.eye(grid * grid).view(-1, grid, grid)
    return tiles.repeat_interleave(side, dim=1).repeat_interleave(max(round(side * aspect), 1), dim=2)


@torch.no_grad()
def describe_grounded(
    model: DevilModel,
    processor: DevilProcessor,
    pixel_values: Tensor | None = None,
    layers: str | int | Sequence[str | int] | None = None,
    candidates: int = CANDIDATES,
    strength: float = STRENGTH,
    grid: int = PLACES_TO_A_SIDE,
    phrases_of: Callable[[str], list[str]] = noun_phrases,
    feature_maps: Sequence[Tensor | None] | None = None,
    **generation_kwargs: Any,
) -> list[GroundedDescription]:
    """Describe each image by the candidate that its places support best.

    Args:
        pixel_values: (B, 3, H, W).
        layers: asked together, of the whole image and of the places alike; None for all.
        candidates: beams, each a candidate.
        strength: weight of the places, g above; 0 chooses by the whole image alone.
        grid: places to a side of the image.
        phrases_of: cuts a description into phrases.
        feature_maps: what `extract_features` returned, to ask again without running the backbone.
        generation_kwargs: for the library's `generate`, and `guidance`, which shapes the candidates but not the choice.

    Returns:
        One description per image.

    Raises:
        ValueError: for fewer than two candidates, a negative `strength`, and arguments of `generate` that `candidates` decides.
    """
    if feature_maps is None:
        feature_maps = model.extract_features(pixel_values, resolve_layers(layers, model.layer_names))
    whole = model.ask(layers=layers, feature_maps=feature_maps)
    rows, columns = next(maps for maps in feature_maps if maps is not None).shape[-2:]
    regions = tile_regions(grid, columns / rows).to(whole.device).expand(len(whole), -1, -1, -1)
    places = model.ask(layers=layers, regions=regions, feature_maps=feature_maps)
    return choose_grounded(
        model, processor, whole, places.unflatten(0, (len(whole), -1)), candidates, strength, phrases_of, **generation_kwargs
    )


@torch.no_grad()
def choose_grounded(
    model: DevilModel,
    processor: DevilProcessor,
    whole: Tensor,
    places: Tensor,
    candidates: int = CANDIDATES,
    strength: float = STRENGTH,
    phrases_of: Callable[[str], list[str]] = noun_phrases,
    **generation_kwargs: Any,
) -> list[GroundedDescription]:
    """`describe_grounded` from prefixes of the whole images, (B, k, D_lm), and of R places of each, (B, R, k, D_lm)."""
    candidates, strength = read_number(candidates, "candidates", 2), read_number(strength, "strength", 0, whole=False)
    if decided := sorted(DECIDED & set(generation_kwargs)):
        raise ValueError(f"{', '.join(decided)}: the number of beams and what they return follow from candidates.")
    sequences = model.decode(whole, num_beams=candidates, num_return_sequences=candidates, **generation_kwargs).unflatten(
        0, (len(whole), candidates)
    )
    null = model.null_prefix()
    chosen = []
    for row in range(len(whole)):
        read = _read_candidates(model, processor, whole[row : row + 1], places[row], null, sequences[row], phrases_of)
        chosen.append(max(read, key=lambda candidate: candidate.score(strength)))
    return chosen


def _read_candidates(model, processor, whole, places, null, sequences, phrases_of) -> list[GroundedDescription]:
    """The candidates (C, T) of one image with the evidence of their phrases, the likeliest per token first."""
    mask = model.word_mask(sequences).long()
    if model.padding_token_id != model.config.eos_token_id:
        # Candidates that reached the longest length without an end.
        mask = mask * (sequences != model.padding_token_id).long().cumprod(dim=1)
    candidates_read = model.check_phrases({"input_ids": sequences, "attention_mask": mask})
    log_probs = model.score_prefix(whole, candidates_read)[0].sum(dim=-1)
    texts = [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]
    cut = [phrases_of(text) for text in texts]
    every = sorted({phrase for phrases in cut for phrase in phrases})
    found: dict[str, GroundedPhrase] = {}
    if every:
        tokens = model.check_phrases(processor(text=every, return_tensors="pt"))
        scores = model.score_prefix(torch.cat([places, null.to(places)]), tokens).sum(dim=-1)  # (R + 1, K)
        evidence = (scores[:-1] - scores[-1]).amax(dim=0)
        found = {phrase: GroundedPhrase(phrase, value) for phrase, value in zip(every, evidence.tolist(), strict=True)}
    candidates = [
        GroundedDescription(text, log_prob, tokens, tuple(found[phrase] for phrase in phrases))
        for text, log_prob, tokens, phrases in zip(texts, log_probs.tolist(), mask.sum(dim=1).tolist(), cut, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: -candidate.score(0.0))
