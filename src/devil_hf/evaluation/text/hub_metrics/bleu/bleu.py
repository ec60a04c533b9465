"""BLEU-1 to BLEU-4 over the corpus of captions, for `evaluate.load` on this folder."""

# As a module: `evaluate` takes the first metric class that it finds here.
from devil_hf.evaluation.text.hub_metrics import caption_metric


class Bleu(caption_metric.CaptionMetric):
    """See `caption_metric.CaptionMetric`."""

    METRIC = "bleu"
    DESCRIPTION = "BLEU-1 to BLEU-4 over the corpus, in the units of the COCO caption toolkit."
