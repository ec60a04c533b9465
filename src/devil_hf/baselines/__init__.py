"""Earlier ways to turn a feature into a prefix, as fair baselines; importing `baselines_devil` registers them as translators."""
