"""Decode the features of any vision model into language: words, attribution maps, and evidence for each word.

With `import devil_hf`, `AutoModel`, `AutoProcessor` and `pipeline` load its checkpoints without `trust_remote_code`; see
`registration.py`. Nothing heavy is imported before a name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from devil_hf.registration import register_when_needed

if TYPE_CHECKING:
    from devil_hf.model.backbone_devil import FeatureBackbone
    from devil_hf.model.configuration_devil import DevilConfig
    from devil_hf.model.image_processing_devil import DevilImageProcessor
    from devil_hf.model.modeling_devil import DevilModel
    from devil_hf.model.pipeline_devil import VisionFeatureDescriptionPipeline
    from devil_hf.model.processing_devil import DevilProcessor
    from devil_hf.questions.grounding import describe_grounded

__version__ = "0.1.0"

_HOMES = {
    "DevilConfig": "model.configuration_devil",
    "DevilImageProcessor": "model.image_processing_devil",
    "DevilModel": "model.modeling_devil",
    "DevilProcessor": "model.processing_devil",
    "FeatureBackbone": "model.backbone_devil",
    "VisionFeatureDescriptionPipeline": "model.pipeline_devil",
    "describe_grounded": "questions.grounding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register_when_needed()

__all__ = [
    "DevilConfig",
    "DevilImageProcessor",
    "DevilModel",
    "DevilProcessor",
    "FeatureBackbone",
    "VisionFeatureDescriptionPipeline",
    "describe_grounded",
]
