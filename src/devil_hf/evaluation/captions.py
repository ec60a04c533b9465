"""Caption metrics of descriptions: BLEU, ROUGE-L and CIDEr as the COCO caption toolkit (pycocoevalcap) computes them.

The numbers depend on the tokenisation. The toolkit's own, the Penn Treebank tokeniser, needs Java; without Java a
simple one takes its place (lower-cased runs of letters and digits, hyphens inside words kept, clitics such as `'s`
split off, all other punctuation dropped), and the result says so.
"""

import re
import shutil
from collections.abc import Sequence

from transformers.utils import logging

logger = logging.get_logger(__name__)

METRICS = ("bleu", "rouge_l", "cider")
Texts = dict[int, list[str]]


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str] = METRICS
) -> dict[str, float | str]:
    """Score one description per image against the captions of people.

    Args:
        predictions (`Sequence[str]`): One description per image.
        references (`Sequence[Sequence[str]]`): The reference captions of each image, at least one.
            CIDEr takes its document frequencies from them.
        metrics (`Sequence[str]`): Which of `"bleu"`, `"rouge_l"`, `"cider"`.

    Returns:
        `dict`: `bleu_1` to `bleu_4` and `rouge_l` in [0, 1], `cider` in [0, 10], the toolkit's units (papers print
        them times 100), and `tokenizer`, `"ptb"` or `"simple"`.

    Raises:
        ValueError: if a metric is unknown, the lengths differ, or an image has no reference.
        ImportError: if pycocoevalcap is absent.
    """
    _check(predictions, references, metrics)
    tokenizer = "ptb" if shutil.which("java") else "simple"
    if tokenizer == "simple":
        logger.warning_once(
            "no Java for the Penn Treebank tokeniser: caption scores use a simple one and differ a little from published ones"
        )
    tokenize = _tokenize_ptb if tokenizer == "ptb" else _tokenize_simple
    results: Texts = tokenize([[prediction] for prediction in predictions])
    truths: Texts = tokenize(references)
    scores: dict[str, float | str] = {}
    for metric in dict.fromkeys(metrics):
        scores |= _compute(metric, truths, results)
    return scores | {"tokenizer": tokenizer}


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]) -> None:
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; choose from {METRICS}")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} lists of references; "
            "give at least one prediction and one list for each"
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references[{index}] is {texts!r}; give a list of at least one caption")


def _compute(metric: str, references: Texts, results: Texts) -> dict[str, float]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError("caption metrics need pycocoevalcap: pip install 'devil-hf[metrics]'") from error
    if metric == "bleu":
        values, _ = Bleu(4).compute_score(references, results, verbose=0)
        return {f"bleu_{n}": float(value) for n, value in enumerate(values, 1)}
    value, _ = (Rouge() if metric == "rouge_l" else Cider()).compute_score(references, results)
    return {metric: float(value)}


def _tokenize_ptb(texts: Sequence[Sequence[str]]) -> Texts:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokeniser answers line by line: a line break inside a caption would shift every later one.
    rows = {
        index: [{"caption": " ".join(caption.split())} for caption in captions] for index, captions in enumerate(texts)
    }
    return PTBTokenizer().tokenize(rows)


def _tokenize_simple(texts: Sequence[Sequence[str]]) -> Texts:
    pattern = re.compile(r"'(?:s|re|ve|ll|d|m)\b|[^\W_]+(?:-[^\W_]+)*")
    return {
        index: [" ".join(pattern.findall(caption.lower())) for caption in captions]
        for index, captions in enumerate(texts)
    }
