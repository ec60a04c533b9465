"""The caption metrics of the field, in the order in which they are reported.

BLEU, ROUGE-L and CIDEr-D are computed here, on tokens of our own tokeniser, without Java. METEOR and SPICE are the toolkit's
own Java programs, through pycocoevalcap; BERTScore is bert-score's.
"""

from statistics import fmean

from devil_hf.evaluation.text.bertscore import BertScore, bert_remedy
from devil_hf.evaluation.text.java import JavaError, JavaMetric, missing_java
from devil_hf.evaluation.text.metrics import MetricError, References, Scorer, caption_metric
from devil_hf.evaluation.text.ngrams import CiderD, bleu, rouge_l

NO_CIDER = (
    "it weighs words by how rare they are among the images' captions, and here every word of them is in those of every image, as "
    "it always is with one image; give at least 2 images with captions of their own"
)
BLEU = {f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)}


@caption_metric("bleu", BLEU)
def _bleu(references: References) -> Scorer:
    return lambda predictions: bleu(predictions.tokens, references.tokens)


@caption_metric("meteor", {"meteor": "METEOR"}, usual=False)
def _meteor(references: References) -> Scorer:
    return _java("meteor", references)


@caption_metric("rouge_l", {"rouge_l": "ROUGE-L"})
def _rouge_l(references: References) -> Scorer:
    return lambda predictions: [fmean(rouge_l(predictions.tokens, references.tokens))]


@caption_metric("cider", {"cider": "CIDEr"})
def _cider(references: References) -> Scorer:
    cider = CiderD(references.tokens)
    if not cider.defined:
        raise MetricError(NO_CIDER)
    return lambda predictions: [fmean(cider(predictions.tokens))]


@caption_metric("spice", {"spice": "SPICE"}, usual=False)
def _spice(references: References) -> Scorer:
    return _java("spice", references)


@caption_metric("bertscore", {"bertscore": "BERTScore F1"}, usual=False)
def _bertscore(references: References) -> Scorer:
    try:
        scorer = BertScore(references.texts, references.bert)
    except (OSError, ImportError, KeyError) as error:  # KeyError: a name that bert-score has no layer for
        raise MetricError(bert_remedy(references.bert, error)) from error
    return lambda predictions: [float(scorer(predictions.texts).mean())]


def _java(metric: str, references: References) -> Scorer:
    if reason := missing_java(metric):
        raise MetricError(reason)
    program = JavaMetric(metric, references.tokens)

    def score(predictions) -> list[float]:
        try:
            return [program(predictions.tokens)]
        except JavaError as error:
            raise MetricError(str(error)) from error

    return score
