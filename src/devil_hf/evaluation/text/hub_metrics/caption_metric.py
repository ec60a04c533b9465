"""What the caption metrics of this folder have in common, as modules of the library `evaluate`."""

import datasets
import evaluate

from devil_hf.evaluation.text.bertscore import MILAN, BertScoreSettings
from devil_hf.evaluation.text.metrics import caption_scores


class CaptionMetric(evaluate.Metric):
    """One prediction and a list of references per image; see `devil_hf.evaluation.text.metrics.caption_scores` for units."""

    METRIC: str  # its name there
    DESCRIPTION: str

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.DESCRIPTION,
            citation="",
            inputs_description="predictions: list of str; references: list of lists of str.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions, references, bert: BertScoreSettings = MILAN):
        scores = caption_scores(predictions, references, [self.METRIC], bert)
        if "missing" in scores:
            raise RuntimeError(f"{self.METRIC} cannot be computed: {scores['missing'][self.METRIC]}")
        return scores
