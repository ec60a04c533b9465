"""METEOR 1.5 (needs Java and pycocoevalcap) of captions, for `evaluate.load` on this folder."""

from devil_hf.evaluation import (
    metric_modules,
)  # as a module: `evaluate` takes the first metric class that it finds here


class Meteor(metric_modules.CaptionMetric):
    """See `metric_modules.CaptionMetric`."""

    METRIC = "meteor"
    DESCRIPTION = "METEOR 1.5 (needs Java and pycocoevalcap), in the units of the COCO caption toolkit."
