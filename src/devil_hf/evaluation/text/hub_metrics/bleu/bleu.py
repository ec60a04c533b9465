"""BLEU-1 to BLEU-4 over the corpus of captions, for `evaluate.load` on this folder."""

from devil_hf.evaluation import (
    metric_modules,
)  # as a module: `evaluate` takes the first metric class that it finds here


class Bleu(metric_modules.CaptionMetric):
    """See `metric_modules.CaptionMetric`."""

    METRIC = "bleu"
    DESCRIPTION = "BLEU-1 to BLEU-4 over the corpus, in the units of the COCO caption toolkit."
