"""What one asks of a trained model beyond a sentence: one file per question."""
