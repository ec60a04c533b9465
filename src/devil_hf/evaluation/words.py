"""Precision, recall and F1 of the words in descriptions, against exact ground truth, class by class.

Each text and each truth is a set of words: a word said twice counts once, a word outside the class does not count. Counts are summed over all texts before
the ratios are taken (micro average), so that a text about nothing costs recall and is not left out.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WordScore:
    """Scores between 0 and 1; 0 where a ratio has nothing to count."""

    precision: float
    recall: float
    f1: float


def words_of(text: str) -> set[str]:
    """The lower-cased words of a text."""
    return set(re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", text.lower()))


def word_f1(texts: Sequence[str], truths: Sequence[Collection[str]], vocabulary: Collection[str]) -> WordScore:
    """Score the words of one class.

    Args:
        texts (`Sequence[str]`): Descriptions.
        truths (`Sequence[Collection[str]]`): For each description the words that it should contain; words outside `vocabulary` are ignored.
        vocabulary (`Collection[str]`): The words of the class, lower case.

    Raises:
        ValueError: if there is not one truth per text.
    """
    if len(texts) != len(truths):
        raise ValueError(f"{len(texts)} texts need as many truths, not {len(truths)}")
    known = frozenset(vocabulary)
    pairs = [(words_of(text) & known, known.intersection(truth)) for text, truth in zip(texts, truths)]
    hits = sum(len(said & true) for said, true in pairs)
    precision = hits / max(sum(len(said) for said, _ in pairs), 1)
    recall = hits / max(sum(len(true) for _, true in pairs), 1)
    return WordScore(precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0)


def word_f1_by_class(
    texts: Sequence[str], truths: Sequence[Mapping[str, Collection[str]]], classes: Mapping[str, Collection[str]]
) -> dict[str, WordScore]:
    """Score each class of words.

    Args:
        texts (`Sequence[str]`): Descriptions.
        truths (`Sequence[Mapping[str, Collection[str]]]`): For each description the true words by class, as [`~devil_hf.data.shapes.Scene.words`] gives them.
        classes (`Mapping[str, Collection[str]]`): The vocabulary of each class, as in `ATTRIBUTE_WORDS`.

    Raises:
        ValueError: if there is not one truth per text.
        KeyError: if a truth lacks a class.
    """
    return {name: word_f1(texts, [truth[name] for truth in truths], vocabulary) for name, vocabulary in classes.items()}
