"""BLEU, ROUGE-L and CIDEr-D of tokenised captions, as the COCO caption toolkit defines them.

Papineni et al. 2002 (with the closest reference length, over the corpus), Lin 2004 (beta 1.2, best precision and recall over
the references), Vedantam et al. 2015 (the -D variant: clipped counts, a Gaussian length penalty of sigma 6, times 10). The
numbers are pycocoevalcap's to 1e-6 on the same tokens.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Tokens = Sequence[str]
Weights = dict[tuple[str, ...], float]
N = 4
BETA = 1.2
SIGMA = 6.0


def ngrams(tokens: Tokens) -> Counter[tuple[str, ...]]:
    """How often each run of one to four tokens occurs."""
    return Counter(tuple(tokens[start : start + n]) for n in range(1, N + 1) for start in range(max(0, len(tokens) - n + 1)))


def bleu(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus, in [0, 1]."""
    return bleu_of(bleu_counts(predictions, references).sum(axis=0)).tolist()


def bleu_counts(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """What BLEU adds up over images, (images, 10): matches and guesses of one to four tokens, length, closest reference."""
    counts = np.zeros((len(predictions), 2 * N + 2))
    for row, prediction, texts in zip(counts, predictions, references, strict=True):
        highest: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            highest |= ngrams(text)
        for run, count in (ngrams(prediction) & highest).items():
            row[len(run) - 1] += count
        row[N : 2 * N] = [max(0, len(prediction) - n) for n in range(N)]
        row[-2:] = len(prediction), min((abs(len(text) - len(prediction)), len(text)) for text in texts)[1]
    return counts


def bleu_of(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 (..., 4) of sums (..., 10) of `bleu_counts`."""
    # The toolkit's guards against division by zero.
    small, tiny = 1e-9, 1e-15
    matches, guesses, lengths = counts[..., :N], counts[..., N : 2 * N], counts[..., 2 * N :]
    ratio = (lengths[..., :1] + tiny) / (lengths[..., 1:] + small)
    products = np.cumprod((matches + tiny) / (guesses + small), axis=-1)
    return products ** (1 / np.arange(1, N + 1)) * np.exp(np.minimum(1 - 1 / ratio, 0.0))


def rouge_l(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """ROUGE-L of each image, in [0, 1]; that of the corpus is their mean."""
    scores = []
    for prediction, texts in zip(predictions, references, strict=True):
        found = prediction or [""]  # to the toolkit, nothing is one empty word
        common = [(_common(found, text or [""]), len(text or [""])) for text in texts]
        precision = max(length for length, _ in common) / len(found)
        recall = max(length / of for length, of in common)
        total = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / total if total else 0.0)
    return scores


def _common(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for token in one:
        diagonal = 0
        for position, candidate in enumerate(other, 1):
            above = row[position]
            row[position] = diagonal + 1 if token == candidate else max(above, row[position - 1])
            diagonal = above
    return row[-1]


class CiderD:
    """CIDEr-D against fixed references, whose weights are computed once.

    Args:
        references: tokenised captions of each image; document frequencies are counted over these images.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]):
        counts = [[ngrams(text) for text in texts] for texts in references]
        self._frequency = Counter(run for texts in counts for run in set().union(*texts))
        self._log_images = math.log(len(references))
        self._references = [[self._weigh(count) for count in texts] for texts in counts]

    @property
    def defined(self) -> bool:
        """Whether any run of words weighs anything; of one image, or of the same captions for all, none does."""
        return any(norm > 0 for texts in self._references for _, norms, _ in texts for norm in norms)

    def __call__(self, predictions: Sequence[Tokens]) -> list[float]:
        """The score of each image, in [0, 10]; that of the corpus is their mean."""
        scores = []
        for prediction, texts in zip(predictions, self._references, strict=True):
            weighed = self._weigh(ngrams(prediction))
            scores.append(10 * sum(_similarity(weighed, text) for text in texts) / len(texts))
        return scores

    def _weigh(self, counts: Counter[tuple[str, ...]]) -> tuple[list[Weights], list[float], int]:
        """Weights by length of the run, their norms, and the length of the caption in pairs of words."""
        weights: list[Weights] = [{} for _ in range(N)]
        pairs = 0
        for run, count in counts.items():
            idf = self._log_images - math.log(max(1, self._frequency[run]))
            weights[len(run) - 1][run] = count * idf
            pairs += count if len(run) == 2 else 0
        return weights, [math.sqrt(sum(value**2 for value in part.values())) for part in weights], pairs


def _similarity(one: tuple[list[Weights], list[float], int], other: tuple[list[Weights], list[float], int]) -> float:
    (weights, norms, pairs), (others, other_norms, other_pairs) = one, other
    total = 0.0
    for n in range(N):
        value = sum(min(weight, others[n].get(run, 0.0)) * others[n].get(run, 0.0) for run, weight in weights[n].items())
        norm = norms[n] * other_norms[n]
        total += value / norm if norm else value
    return total / N * math.exp(-((pairs - other_pairs) ** 2) / (2 * SIGMA**2))
