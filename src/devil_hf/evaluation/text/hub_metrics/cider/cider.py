"""CIDEr-D of captions, for `evaluate.load` on this folder."""

from devil_hf.evaluation import (
    metric_modules,
)  # as a module: `evaluate` takes the first metric class that it finds here


class Cider(metric_modules.CaptionMetric):
    """See `metric_modules.CaptionMetric`."""

    METRIC = "cider"
    DESCRIPTION = "CIDEr-D, in the units of the COCO caption toolkit."
