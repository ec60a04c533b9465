"""BERTScore F1 with MILAN's settings (needs bert-score and its model) of captions, for `evaluate.load` on this folder."""

# As a module: `evaluate` takes the first metric class that it finds here.
from devil_hf.evaluation.text.bertscore import BERT_MODEL, BertScoreSettings
from devil_hf.evaluation.text.hub_metrics import caption_metric


class BertScore(caption_metric.CaptionMetric):
    """See `caption_metric.CaptionMetric`."""

    METRIC = "bertscore"
    DESCRIPTION = "BERTScore F1 with MILAN's settings; needs bert-score and its model."

    def _compute(self, predictions, references, model=None, layers=None, baseline=None):
        return super()._compute(predictions, references, BertScoreSettings(model or BERT_MODEL, layers, baseline))
