"""Descriptions, maps and neurons against ground truth, with controls that show whether they speak of the features."""
