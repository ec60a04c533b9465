"""Where a checkpoint goes when a recipe says `push_to_hub`.

Training does not know the room that publishes, which stands above it: that registers a `Publisher` here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from devil_hf.registry import Registry


@dataclass(frozen=True)
class Publisher:
    """What a run asks of whoever publishes checkpoints.

    Args:
        check_name: raises a ValueError for a name that no repository can have.
        check_parts: (model, slim) raises a ValueError for a checkpoint that others could not load.
        push: (checkpoint, name, commit_message=...) publishes it.
    """

    check_name: Callable
    check_parts: Callable
    push: Callable


HUB = "hub"
PUBLISHERS: Registry[Publisher] = Registry("publisher", "devil_hf.hub")

__all__ = ["HUB", "PUBLISHERS", "Publisher"]
