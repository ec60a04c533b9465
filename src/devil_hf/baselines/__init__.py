"""Baselines that register themselves as translators."""
