"""SPICE (needs Java, pycocoevalcap and Stanford CoreNLP) of captions, for `evaluate.load` on this folder."""

# As a module: `evaluate` takes the first metric class that it finds here.
from devil_hf.evaluation.text.hub_metrics import caption_metric


class Spice(caption_metric.CaptionMetric):
    """See `caption_metric.CaptionMetric`."""

    METRIC = "spice"
    DESCRIPTION = "SPICE (needs Java, pycocoevalcap and Stanford CoreNLP), in the units of the COCO caption toolkit."
