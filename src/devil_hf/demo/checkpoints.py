"""Which checkpoints the demo loads, and whose code it runs.

The installed package answers for every DeViL checkpoint, so that of a repository only weights and settings are read. A
checkpoint may also bring an architecture of its own; that code runs on this machine, and only after the visitor has ticked
the box. On a public Space nobody else's tick should do that: there, only repositories named by the owner are trusted. What a
visitor chooses is read without this machine's Hub account, unless the owner has named it.
"""

import os
import threading
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig

from devil_hf.checkpoints import CHECKPOINT
from devil_hf.demo.explorer import Explorer
from devil_hf.hub.sources import HUB_ID, hub_id

EMBEDDED = "shapes world (built in)"
MAX_REPOSITORY_BYTES = 8 * 2**30
OTHER_WEIGHTS = (".bin", ".h5", ".msgpack", ".onnx", ".ot", ".tflite")  # not fetched where there are safetensors
KEPT = 3  # models in memory at once; the one loaded first goes first, the default stays


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
        self, default: str | None = None, models: str | None = None, public: bool | None = None, device: str | None = None
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
        if trust and not self.may_trust(name):
            raise ValueError("This demo is public and runs no code of repositories that its owner has not named.")
        chosen = name != self.default  # by a visitor
        # What the owner's account may read is for those whom the owner has named.
        token = False if chosen and name not in (self.listed or []) else None
        size = self._checked(name, token) if chosen else 0
        source = str(CHECKPOINT) if name == EMBEDDED else name
        hub: dict[str, Any] = {"trust_remote_code": trust, "token": token}
        try:
            config = AutoConfig.from_pretrained(source, **hub)
            if not hasattr(config, "backbone_config") or not hasattr(config, "prefix_length"):
                raise ValueError(f"it holds a model of type {config.model_type!r}, not a DeViL")
            if chosen and config.frozen_weights == "reference":
                size += sum(repository_bytes(part, token) for part in frozen_sources(config))
                check_size(name, size)
            model = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, **hub)
            processor = AutoProcessor.from_pretrained(source, **hub)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "trust_remote_code" in str(error):
                reason = "it brings code of its own. Tick the box only if you trust its authors"
            raise ValueError(f"{name} cannot be loaded: {reason.rstrip('.')}.") from error
        return Explorer(model.to(self.device).eval(), processor)

    def _checked(self, name: str, token: bool | None) -> int:
        """The bytes of a Hub id that may be loaded here; never a path, which would read this machine's own files."""
        if not HUB_ID.fullmatch(name) or "/" not in name or ".." in name or Path(name).exists():
            raise ValueError(f"'{name[:80]}' is not a Hub id; they look like user/devil-resnet50-opt125m.")
        if self.listed is not None and name not in self.listed:
            raise ValueError(f"{name} is not among the checkpoints of this demo: {', '.join(self.listed) or 'one only'}.")
        size = repository_bytes(name, token)
        check_size(name, size)
        return size


def repository_bytes(name: str, token: bool | None) -> int:
    """What a repository weighs in bytes, without weights of other kinds beside safetensors.

    Args:
        token: False asks as nobody, None with the account of this machine.
    """
    try:
        files = HfApi(token=token).model_info(name, files_metadata=True).siblings or []
    except Exception as error:  # of the Hub; and transport errors, which are no OSError and belong to the HTTP library
        raise ValueError(f"{name} cannot be found on the Hub, or the Hub cannot be reached from here.") from error
    if any(file.rfilename.endswith(".safetensors") for file in files):
        files = [file for file in files if not file.rfilename.endswith(OTHER_WEIGHTS)]
    return sum(file.size or 0 for file in files)


def check_size(name: str, size: int) -> None:
    """Raise a ValueError for more than is loaded here."""
    if size > MAX_REPOSITORY_BYTES:
        raise ValueError(f"{name} has {size / 2**30:.0f} GB; at most {MAX_REPOSITORY_BYTES >> 30} GB are loaded.")


def frozen_sources(config: PreTrainedConfig) -> list[str]:
    """The Hub ids from which a slim checkpoint fetches its frozen parts.

    Raises:
        ValueError: for a part that does not come from the Hub: a path would read this machine's own files.
    """
    named = []
    for part in (config.backbone_config, config.language_model_source):
        source: str = (part or {}).get("source") or ""
        identifier = hub_id(source)
        if identifier is None or Path(identifier).exists():
            raise ValueError(f"its frozen parts come from {source[:80]!r}, which is no repository of the Hub")
        named.append(identifier)
    return named
