"""What travels with a checkpoint, and nothing else: the files that someone who ticks `trust_remote_code` runs."""
