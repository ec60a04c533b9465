"""Descriptions, maps and neurons against ground truth, with controls that show whether they speak of the features."""

from devil_hf.evaluation.text.metrics import caption_scores

__all__ = ["caption_scores"]
