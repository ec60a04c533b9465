"""The Space: the demo of the installed package, with the checkpoint that `DEVIL_CHECKPOINT` names."""

from devil_hf.demo.app import launch

launch()
