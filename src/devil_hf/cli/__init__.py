"""The `devil` command: one file per verb."""
