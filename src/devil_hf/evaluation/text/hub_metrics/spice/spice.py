"""SPICE (needs Java, pycocoevalcap and Stanford CoreNLP) of captions, for `evaluate.load` on this folder."""

from devil_hf.evaluation import (
    metric_modules,
)  # as a module: `evaluate` takes the first metric class that it finds here


class Spice(metric_modules.CaptionMetric):
    """See `metric_modules.CaptionMetric`."""

    METRIC = "spice"
    DESCRIPTION = "SPICE (needs Java, pycocoevalcap and Stanford CoreNLP), in the units of the COCO caption toolkit."
