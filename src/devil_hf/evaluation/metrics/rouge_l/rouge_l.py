"""ROUGE-L of captions, for `evaluate.load` on this folder."""

import datasets
import evaluate

from devil_hf.evaluation.captions import caption_scores


class RougeL(evaluate.Metric):
    """One prediction and a list of references per image; see `devil_hf.evaluation.caption_scores` for units."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-L, in the units of the COCO caption toolkit.",
            citation="",
            inputs_description="predictions: list of str; references: list of lists of str.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions, references):
        return caption_scores(predictions, references, ["rouge_l"])
