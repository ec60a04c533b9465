"""Evaluation of descriptions, maps and neurons against ground truth, with the controls that show whether they speak of the features."""
