"""Image-text pairs: the embedded shapes world, caption folders, and units of networks with their exemplars."""
