"""Figures, grounded sentences, atlases and pages that show what a backbone sees."""
