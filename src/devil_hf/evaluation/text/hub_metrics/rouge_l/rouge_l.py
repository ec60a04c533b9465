"""ROUGE-L of captions, for `evaluate.load` on this folder."""

# As a module: `evaluate` takes the first metric class that it finds here.
from devil_hf.evaluation.text.hub_metrics import caption_metric


class RougeL(caption_metric.CaptionMetric):
    """See `caption_metric.CaptionMetric`."""

    METRIC = "rouge_l"
    DESCRIPTION = "ROUGE-L, in the units of the COCO caption toolkit."
