"""Decode the features of any vision model into language: words, attribution maps, and evidence for each word.

Importing the package registers its classes with transformers, so that `AutoModel`, `AutoProcessor` and `pipeline` load its
checkpoints without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

import devil_hf.baselines.baselines_devil  # noqa: F401 - registers its translators
from devil_hf.build import from_backbone_and_language_model
from devil_hf.model.backbone_devil import FeatureBackbone
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pipeline_devil import VisionFeatureDescriptionPipeline
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.grounding import describe_grounded

AutoConfig.register(DevilConfig.model_type, DevilConfig)
AutoModel.register(DevilConfig, DevilModel)
AutoModelForImageTextToText.register(DevilConfig, DevilModel)
# PIL whatever backend is asked for: only its resampling equals the backbones' own preprocessing.
AutoImageProcessor.register(
    DevilConfig, image_processor_classes={"pil": DevilImageProcessor, "torchvision": DevilImageProcessor}
)
AutoProcessor.register(DevilConfig, DevilProcessor)

# What travels with a checkpoint does not build new models; whoever has the package finds it here, too.
DevilModel.from_backbone_and_language_model = staticmethod(from_backbone_and_language_model)  # type: ignore[attr-defined]

__version__ = "0.1.0"

__all__ = [
    "DevilConfig",
    "DevilImageProcessor",
    "DevilModel",
    "DevilProcessor",
    "FeatureBackbone",
    "VisionFeatureDescriptionPipeline",
    "describe_grounded",
]
