"""METEOR 1.5 (needs Java and pycocoevalcap) of captions, for `evaluate.load` on this folder."""

# As a module: `evaluate` takes the first metric class that it finds here.
from devil_hf.evaluation.text.hub_metrics import caption_metric


class Meteor(caption_metric.CaptionMetric):
    """See `caption_metric.CaptionMetric`."""

    METRIC = "meteor"
    DESCRIPTION = "METEOR 1.5 (needs Java and pycocoevalcap), in the units of the COCO caption toolkit."
