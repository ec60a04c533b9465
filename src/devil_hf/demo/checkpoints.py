"""Which checkpoints the demo loads, and whose code it runs.

The installed package answers for every DeViL checkpoint, so that of a repository only weights and settings are read. A
checkpoint may also bring an architecture of its own; that code runs on this machine, and only after the visitor has ticked
the box. On a public Space nobody else's tick should do that: there, only repositories named by the owner are trusted.
"""

import os
import re
import threading
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig
from transformers import AutoModel
from transformers import AutoProcessor

from devil_hf.demo.explorer import Explorer
from devil_hf.embedded import CHECKPOINT

EMBEDDED = "shapes world (built in)"
MAX_REPOSITORY_BYTES = 8 * 2**30
KEPT = 3  # models in memory at once; the one loaded first goes first, the default stays
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Checkpoints:
    """The default checkpoint and, by `DEVIL_MODELS`, others by Hub id.

    Args:
        default: directory or Hub id of the checkpoint that the demo starts with; None reads `DEVIL_CHECKPOINT`, and without it
            means the embedded one.
        models: "any", "none", or Hub ids between commas; None reads `DEVIL_MODELS`, and without it means "any".
        public: whether strangers use this demo; None for: it runs as a Space.
        device: None chooses CUDA where there is one.
    """

    def __init__(
        self,
        default: str | None = None,
        models: str | None = None,
        public: bool | None = None,
        device: str | None = None,
    ):
        named = (os.environ.get("DEVIL_MODELS", "any") if models is None else models).strip()
        self.default = default or os.environ.get("DEVIL_CHECKPOINT") or EMBEDDED
        self.listed = None if named == "any" else [name.strip() for name in named.split(",") if name.strip() != "none"]
        self.public = "SPACE_ID" in os.environ if public is None else public
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: dict[tuple[str, bool], Explorer] = {}
        self._lock = threading.Lock()

    @property
    def picker(self) -> bool:
        """Whether visitors may choose a checkpoint at all."""
        return self.listed is None or bool(self.listed)

    def may_trust(self, name: str) -> bool:
        """Whether a visitor's tick is enough to run the code of this repository."""
        return not self.public or (self.listed is not None and name in self.listed)

    def get(self, name: str, trust: bool = False) -> Explorer:
        """The checkpoint `name`, loaded on first use.

        Raises:
            ValueError: for what is not a Hub id, not allowed here, too large, or no DeViL checkpoint.
        """
        key = (name, trust)
        explorer = self._loaded.get(key)
        if explorer is None:
            with self._lock:  # visitors who ask for one model wait for one load; others go on
                explorer = self._loaded.get(key) or self._load(name, trust)
                self._loaded[key] = explorer
                while len(self._loaded) > KEPT:
                    self._loaded.pop(next(one for one in self._loaded if one[0] != self.default))
        return explorer

    def _load(self, name: str, trust: bool) -> Explorer:
        source = name if name == self.default else self._checked(name, trust)
        source = str(CHECKPOINT) if source == EMBEDDED else source
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
            if not hasattr(config, "backbone_config") or not hasattr(config, "prefix_length"):
                raise ValueError(f"it holds a model of type {config.model_type!r}, not a DeViL")
            model = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, trust_remote_code=trust)
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "trust_remote_code" in str(error):
                reason = "it brings code of its own. Tick the box only if you trust its authors"
            raise ValueError(f"{name} cannot be loaded: {reason}.") from error
        return Explorer(model.to(self.device).eval(), processor)

    def _checked(self, name: str, trust: bool) -> str:
        """A Hub id that may be loaded here; never a path, which would read this machine's own files."""
        if not _HUB_ID.fullmatch(name) or ".." in name or Path(name).exists():
            raise ValueError(f"'{name[:80]}' is not a Hub id; they look like user/devil-resnet50-opt125m.")
        if self.listed is not None and name not in self.listed:
            raise ValueError(
                f"{name} is not among the checkpoints of this demo: {', '.join(self.listed) or 'one only'}."
            )
        if trust and not self.may_trust(name):
            raise ValueError("This demo is public and runs no code of repositories that its owner has not named.")
        try:
            files = HfApi().model_info(name, files_metadata=True).siblings or []
        except OSError as error:  # of the Hub, and of the way to it
            raise ValueError(f"{name} cannot be found on the Hub, or the Hub cannot be reached from here.") from error
        size = sum(file.size or 0 for file in files)
        if size > MAX_REPOSITORY_BYTES:
            raise ValueError(f"{name} has {size / 2**30:.0f} GB; at most {MAX_REPOSITORY_BYTES >> 30} GB are loaded.")
        return name
