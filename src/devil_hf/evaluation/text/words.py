"""Precision, recall and F1 of the words in descriptions, against exact ground truth, for one class of words.

Each text and each truth is a set of words: a word said twice counts once, a word outside the class does not count.
Counts are summed over all texts before the ratios are taken (micro average), so that a text about nothing costs recall
and is not left out. A ratio of nothing to nothing is None.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

CARRIER = "the"  # the paper's neutral word before a phrase; a bare "circle" is no way to begin a caption


def word_list(text: str) -> list[str]:
    """The lower-cased words of a text in their order, without punctuation."""
    return re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", text.lower())


def words_of(text: str) -> set[str]:
    """The lower-cased words of a text."""
    return set(word_list(text))


@dataclass
class WordCounts:
    """Counts the words of one class over many descriptions; `precision`, `recall` and `f1` are ready at any time.

    Args:
        vocabulary (`Collection[str]`): The words of the class in lower case, such as `ATTRIBUTE_WORDS["colour"]`.
    """

    vocabulary: Collection[str]
    said: int = 0
    true: int = 0
    hits: int = 0

    def add(self, text: str, truth: Collection[str]) -> None:
        """Count one description.

        Args:
            text (`str`): The description.
            truth (`Collection[str]`): The words that it should contain; those outside the vocabulary are ignored.
        """
        known = set(self.vocabulary)
        said, true = words_of(text) & known, known.intersection(truth)
        self.said += len(said)
        self.true += len(true)
        self.hits += len(said & true)

    @property
    def precision(self) -> float | None:
        """Share of the words said that are true; None when none was said."""
        return self.hits / self.said if self.said else None

    @property
    def recall(self) -> float | None:
        """Share of the true words that were said; None when there was none."""
        return self.hits / self.true if self.true else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; 0 where only one of them is defined, None where neither is."""
        return 2 * self.hits / (self.said + self.true) if self.said + self.true else None
