"""Which repository of the Hub a source names: only what is spelled like a Hub id is one."""

import os
import re

import timm

HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)  # old repositories belong to nobody: gpt2


def hub_id(source: str | None) -> str | None:
    """The Hub repository of a part's source; None for a directory, for a module as it was given, and for no such name."""
    if not source or os.path.isabs(source) or os.path.isdir(source):
        return None
    source = source.removeprefix("hf-hub:").partition("@")[0]
    if "/" not in source and timm.is_model(source.split(".")[0]):
        known = timm.models.get_pretrained_cfg(source, allow_unregistered=False)
        found = known.hf_hub_id if known is not None else None
        return (found if found != "timm/" else f"timm/{source}") or None
    return source if HUB_ID.fullmatch(source) and ".." not in source else None


__all__ = ["HUB_ID", "hub_id"]
