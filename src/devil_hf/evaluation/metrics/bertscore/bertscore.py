"""BERTScore F1 with MILAN's settings (needs bert-score and its model) of captions, for `evaluate.load` on this folder."""

import datasets
import evaluate

from devil_hf.evaluation.bertscore import BERT_MODEL
from devil_hf.evaluation.bertscore import BertScoreSettings
from devil_hf.evaluation.captions import caption_scores


class BertScore(evaluate.Metric):
    """One prediction and a list of references per image; see `devil_hf.evaluation.caption_scores` for units."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BERTScore F1 with MILAN's settings; needs bert-score and its model.",
            citation="",
            inputs_description="predictions: list of str; references: list of lists of str.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions, references, model=None, layers=None, baseline=None):
        settings = BertScoreSettings(model or BERT_MODEL, layers, baseline)
        scores = caption_scores(predictions, references, ["bertscore"], settings)
        if "missing" in scores:
            raise RuntimeError(f"bertscore cannot be computed: {scores['missing']['bertscore']}")
        return scores
