"""Which checkpoints the demo loads, and what one that a visitor names may do here.

The installed package's own classes answer for every checkpoint; code of a repository never runs. What a visitor names is fetched
by `Downloads` (bounded, without this machine's Hub account unless the owner has named it, its sources without it in any case) and
is then loaded from these local files alone: whatever its configuration says, loading it asks the Hub for nothing.
"""

import json
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_token
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from devil_hf.build.repositories import HUB_ID, hub_id
from devil_hf.checkpoints import PHOTOS, SHAPES, locate
from devil_hf.demo.downloads import WEIGHTS, Downloads, check_size
from devil_hf.demo.explorer import Explorer
from devil_hf.demo.messages import plain
from devil_hf.model.checkpoint_devil import building_within
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor

logger = logging.get_logger(f"transformers.{__name__}")

PHOTOGRAPHS, SCENES = "photographs (built in)", "shapes world (built in)"
BUILT_IN = {PHOTOGRAPHS: PHOTOS, SCENES: SHAPES}
KEPT = 4  # models in memory at once; the one asked longest ago goes first, the owner's stay
MAX_MEMORY_BYTES = 8 * 2**30  # of a visitor's model in single precision
MAX_CROP, MAX_LAYERS = 1024, 64  # pixels on a side that a visitor's backbone looks at, and layers that are read


class Checkpoints:
    """The owner's checkpoints and, by `DEVIL_MODELS`, others by Hub id.

    Args:
        default: name, directory or Hub id of the one checkpoint that the demo brings; None reads `DEVIL_CHECKPOINT`, and without
            it means those of the package, the photographs' first.
        models: "any", "none", or Hub ids between commas; None reads `DEVIL_MODELS`, and without it means "any".
        device: None chooses CUDA where there is one.
    """

    def __init__(self, default: str | None = None, models: str | None = None, device: str | None = None):
        named = (os.environ.get("DEVIL_MODELS", "any") if models is None else models).strip()
        named_default = default or os.environ.get("DEVIL_CHECKPOINT")
        self.own = [str(named_default)] if named_default else list(BUILT_IN)
        self.listed = None if named == "any" else [name.strip() for name in named.split(",") if name.strip() not in ("", "none")]
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.downloads = Downloads()
        self._loaded: OrderedDict[str, Explorer] = OrderedDict()  # the latest asked last
        self._loading, self._lock = threading.Lock(), threading.Lock()

    @property
    def default(self) -> str:
        """What the demo starts with."""
        return self.own[0]

    @property
    def picker(self) -> bool:
        """Whether visitors may choose a checkpoint at all."""
        return len(self.own) > 1 or self.listed is None or bool(self.listed)

    def get(self, name: str) -> Explorer:
        """The checkpoint `name`, loaded on first use.

        Raises:
            ValueError: for what is not a Hub id, not allowed here, too large, or no DeViL checkpoint.
        """
        name = str(name)  # a request may bring anything
        if name not in self._loaded:
            with self._loading:  # visitors who ask for one model wait for one load; others go on
                if name not in self._loaded:
                    explorer = self._load(name)
                    with self._lock:
                        self._loaded[name] = explorer
                        while len(self._loaded) > KEPT:
                            self._loaded.pop(next(one for one in self._loaded if one not in self.own))
        return self.held(name)

    def held(self, name: str) -> Explorer:
        """The checkpoint `name`, if it is in memory: nobody's click waits for a load of what others have displaced.

        Raises:
            ValueError: where it is not.
        """
        with self._lock:
            if name not in self._loaded:
                raise ValueError(f"{name} has made room for other checkpoints: load it again.")
            self._loaded.move_to_end(name)
            return self._loaded[name]

    def _load(self, name: str) -> Explorer:
        if name in self.own:
            source = str(locate(BUILT_IN.get(name, name)))
            token = get_token() or False
            model = AutoModel.from_pretrained(source, dtype=torch.float32, trust_remote_code=False, token=token)
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, token=token)
            return Explorer(model.to(self.device).eval(), processor)
        self._check_name(name)
        try:
            model, processor = self._load_chosen(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be loaded: {plain(error).rstrip('.')}.") from error
        except Exception as error:  # files of strangers break libraries in any way
            logger.exception(f"{name} cannot be loaded")
            raise ValueError(f"{name} cannot be loaded: its files are not those of a DeViL checkpoint.") from error
        return Explorer(model.to(self.device).eval(), processor)

    def _check_name(self, name: str) -> None:
        """Refuse all but Hub ids that may be loaded here; paths would read this machine's own files."""
        if not HUB_ID.fullmatch(name) or "/" not in name or ".." in name or Path(name).exists():
            raise ValueError(f"'{name[:80]}' is not a Hub id; they look like user/devil-resnet50-opt125m.")
        if self.listed is not None and name not in self.listed:
            raise ValueError(f"{name} is not among the checkpoints of this demo: {', '.join(self.listed) or 'one only'}.")

    def _load_chosen(self, name: str) -> tuple[Any, DevilProcessor]:
        token = (get_token() or False) if name in (self.listed or []) else False
        asked = self.downloads.ask(name, token=token)
        folder = self.downloads.fetch(asked)
        config = read_config(folder)
        if len(config.layers) > MAX_LAYERS:
            raise ValueError(f"it reads {len(config.layers)} layers; at most {MAX_LAYERS} are asked here")
        places: dict[str, Any] = {}
        weights = weights_of(folder)
        if config.frozen_weights == "reference":
            sources = {part: self.downloads.ask(*source) for part, source in frozen_sources(config).items()}
            check_size(name, asked.size + sum(source.size for source in sources.values()))
            places = {part: str(self.downloads.fetch(source)) for part, source in sources.items()}
            weights += sum(weights_of(Path(place)) for place in places.values())
        check_weights(config, weights)
        local: dict[str, Any] = {"local_files_only": True, "token": False}
        model = DevilModel.from_pretrained(folder, config=config, dtype=torch.float32, **places, **local)
        processor = DevilProcessor.from_pretrained(folder, trust_remote_code=False, **local)
        if not isinstance(processor.image_processor, DevilImageProcessor):
            raise ValueError("its image processor is not a DeViL's")
        crop = processor.image_processor.geometry((100, 100)).crop_size
        if max(crop) > MAX_CROP:
            raise ValueError(
                f"its backbone looks at {crop[1]} × {crop[0]} pixels; at most {MAX_CROP} on a side are computed here"
            )
        return model, processor


def send_no_token_unasked() -> None:
    """Let calls of the Hub carry this machine's token only where they are given it, in this whole process."""
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True


def read_config(folder: Path) -> DevilConfig:
    """The configuration of a downloaded checkpoint, by this package's class alone.

    Raises:
        ValueError: for what is no DeViL's, or says what no DeViL's can say.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("it has no config.json") from None
    except (ValueError, RecursionError) as error:  # nothing of its text: a message is no place for it
        raise ValueError("its config.json is not readable JSON") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != DevilConfig.model_type:
        raise ValueError(f"it holds a model of type {str(kind)[:40]!r}, not a DeViL")
    return DevilConfig.from_dict(content)


def frozen_sources(config: DevilConfig) -> dict[str, tuple[str, str | None]]:
    """Hub id and revision of the frozen parts of a slim checkpoint, by the part's argument of `from_pretrained`.

    Raises:
        ValueError: for a part that does not come from the Hub: a path would read this machine's own files.
    """
    named = {}
    for part, entry in (("backbone", config.backbone_config), ("language_model", config.language_model_source)):
        source = (entry or {}).get("source") or ""
        identifier = hub_id(source) if isinstance(source, str) else None
        if identifier is None or Path(identifier).exists():
            raise ValueError(f"its frozen parts come from {str(source)[:80]!r}, which is no repository of the Hub")
        named[part] = (identifier, (entry or {}).get("revision"))
    return named


def weights_of(folder: Path) -> int:
    """How many numbers the safetensors of a folder hold; read from their heads alone."""
    total = 0
    for file in folder.glob(f"*{WEIGHTS}"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(int(torch.Size(tensors.get_slice(name).get_shape()).numel()) for name in tensors.keys())  # noqa: SIM118
    return total


def check_weights(config: DevilConfig, weights: int) -> None:
    """Compare what a configuration would build with the weights that are there, before anything is built with memory.

    Raises:
        ValueError: where there is much more of it, or too much of both.
    """
    if 4 * weights > MAX_MEMORY_BYTES:
        raise ValueError(f"it has {weights / 1e9:.1f} billion weights; at most {MAX_MEMORY_BYTES / 4e9:.1f} billion are loaded")
    with building_within(weights), torch.device("meta"):
        model = DevilModel(config)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if described > 2 * weights + 2**26:  # buffers, and tied weights that a file holds once
        raise ValueError(
            f"its configuration describes {described / 1e6:,.0f} million weights, its files hold {weights / 1e6:,.0f}"
        )


__all__ = ["BUILT_IN", "PHOTOGRAPHS", "SCENES", "Checkpoints", "send_no_token_unasked"]
