"""Publishing: checkpoints, cards and Spaces of the Hub."""
