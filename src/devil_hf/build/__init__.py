"""Making a model: from a timm or transformers id, a directory or a living module; its layers, their layouts, its sources."""

from devil_hf.build.models import from_backbone_and_language_model, merge_lora
from devil_hf.build.preprocessing import image_processor_of
from devil_hf.build.sources import backbone_from_source

__all__ = ["backbone_from_source", "from_backbone_and_language_model", "image_processor_of", "merge_lora"]
