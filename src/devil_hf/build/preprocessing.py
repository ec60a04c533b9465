"""The image processor of a backbone: its evaluation preprocessing in timm's terms, as the processor's settings."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from devil_hf.model.image_processing_devil import DevilImageProcessor

RESAMPLING = {mode.name.lower(): mode for mode in Image.Resampling}


def image_processor_of(data_config: Mapping[str, Any], resize: str = "backbone") -> DevilImageProcessor:
    """The image processor of a backbone.

    Args:
        data_config: timm's data configuration (`timm.data.resolve_model_data_config(model)`); missing keys take
            timm's defaults.
        resize: `"backbone"` for the backbone's own resize, `"paper"` for the short side at the crop size itself,
            then a centre crop.
    """
    if resize not in ("backbone", "paper"):
        raise ValueError(f"resize must be 'backbone' or 'paper', got {resize!r}")
    channels, height, width = data_config.get("input_size", (3, 224, 224))
    if channels != 3:
        raise ValueError(f"the backbone takes {channels} channels (input_size), only 3 (RGB) are supported")
    interpolation = data_config.get("interpolation", "bicubic")
    if interpolation not in RESAMPLING:
        raise ValueError(f"interpolation {interpolation!r} is not one of {sorted(RESAMPLING)}")
    default, paper = DevilImageProcessor, resize == "paper"
    return DevilImageProcessor(
        crop_size={"height": height, "width": width},
        crop_pct=1.0 if paper else data_config.get("crop_pct") or default.crop_pct,
        crop_mode="center" if paper else data_config.get("crop_mode") or default.crop_mode,
        resample=int(RESAMPLING[interpolation]),
        image_mean=tuple(data_config.get("mean", default.image_mean)),
        image_std=tuple(data_config.get("std", default.image_std)),
    )
