"""The image processor of a backbone: its evaluation preprocessing in timm's terms, as the processor's settings.

What stands in a file of somebody's is read here, and what it cannot mean is refused by name. One number as mean or deviation
is that of every channel, as transformers reads it; what the file leaves out is what its class there has. Classes that resize in
a way of their own are refused, and so are settings that no transform in timm's terms has.
"""

import math
from collections.abc import Mapping
from typing import Any

import transformers
from PIL import Image

from devil_hf.model.image_processing_devil import DevilImageProcessor
from devil_hf.model.pooling_devil import read_number

RESAMPLING = {mode.name.lower(): mode for mode in Image.Resampling}
BEYOND = ("do_flip_channel_order", "rescale_offset", "keep_aspect_ratio", "do_pad")  # settings that timm has no terms for
KNOWN = {"size", "crop_size", "crop_pct", "resample", "image_mean", "image_std", "rescale_factor", "default_to_square", *BEYOND}
KNOWN |= {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "include_top"}
STRETCHED = 384  # pixels from which on ConvNext crops nothing
READ = ("ConvNext", "DPT")  # classes whose own resize is read here


def image_processor_of(data_config: Mapping[str, Any], resize: str = "backbone") -> DevilImageProcessor:
    """The image processor of a backbone; a ValueError names a setting that no image can be read by.

    Args:
        data_config: timm's data configuration (`timm.data.resolve_model_data_config(model)`); missing keys take
            timm's defaults.
        resize: `"backbone"` for the backbone's own resize, `"paper"` for the short side at the crop size itself,
            then a centre crop.
    """
    if resize not in ("backbone", "paper"):
        raise ValueError(f"resize must be 'backbone' or 'paper', got {resize!r}")
    settings = {name: value for name, value in data_config.items() if value is not None}
    size = settings.get("input_size", (3, 224, 224))
    if not isinstance(size, (list, tuple)) or len(size) != 3:
        raise ValueError(f"input_size={size!r:.100} must be channels, height and width")
    if size[0] != 3:
        raise ValueError(f"the backbone takes {size[0]!r:.100} channels (input_size), only 3 (RGB) are supported")
    interpolation = settings.get("interpolation", "bicubic")
    if interpolation not in list(RESAMPLING):
        raise ValueError(f"interpolation {interpolation!r:.100} is not one of {sorted(RESAMPLING)}")
    default, paper = DevilImageProcessor, resize == "paper"
    return DevilImageProcessor(
        crop_size={"height": size[1], "width": size[2]},
        crop_pct=1.0 if paper else settings.get("crop_pct", default.crop_pct),
        crop_mode="center" if paper else settings.get("crop_mode", default.crop_mode),
        resample=int(RESAMPLING[interpolation]),
        image_mean=_channels(settings.get("mean", default.image_mean)),
        image_std=_channels(settings.get("std", default.image_std)),
    )


def data_config_of(settings: Any, default: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an image processor of transformers, in timm's terms.

    Args:
        settings: what its file holds.
        default: of the network, for what does not stand there.

    Raises:
        ValueError: naming the setting that cannot be read.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"the settings must be a JSON object, got {settings!r:.100}")
    settings = _of_class(settings) | {name: one for name, one in settings.items() if one is not None or name.startswith("do_")}
    if not settings.get("do_resize", True):
        raise ValueError(f"do_resize={settings['do_resize']!r:.100}: images must be resized")
    if beyond := [name for name in BEYOND if settings.get(name)]:
        raise ValueError(f"{beyond[0]}={settings[beyond[0]]!r:.100} cannot be read")
    found = dict(default) | {"mean": [0.0] * 3, "std": [1.0] * 3}
    if settings.get("do_normalize", True):
        found |= {"mean": settings.get("image_mean", default["mean"]), "std": settings.get("image_std", default["std"])}
    factor = read_number(settings.get("rescale_factor", 1 / 255), "rescale_factor", 1e-6, whole=False)
    scale = 255 * factor if settings.get("do_rescale", True) else 255.0
    for name in ("mean", "std"):
        values = found[name] = _channels(found[name])
        if not math.isclose(scale, 1) and isinstance(values, (list, tuple)):  # ours are for values in [0, 1]
            found[name] = [read_number(value, f"image_{name}", -1e4, whole=False) / scale for value in values]
    if settings.get("include_top") and isinstance(values := found["std"], (list, tuple)):
        if not settings.get("do_normalize", True):
            raise ValueError("include_top cannot be read without do_normalize")
        values = [read_number(value, "image_std", 1e-6, whole=False) for value in values]
        found["std"] = [scale * value * value for value in values]  # EfficientNet divides by the deviation once more
    filters = {int(mode): name for name, mode in RESAMPLING.items()}
    if isinstance(resample := settings.get("resample", 3), bool) or resample not in list(filters):
        raise ValueError(f"resample={resample!r:.100} is not one of {filters}")
    found["interpolation"] = filters[resample]
    return found | _crop(settings, found["input_size"])


def _of_class(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the class of transformers has by itself; none where no class is named, or none that is known."""
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    name = kind.removesuffix("Fast").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    own = getattr(transformers, f"{name}ImageProcessorPil", None)
    if own is None:
        return {}
    if name not in READ and "resize" in vars(own):
        raise ValueError(f"image_processor_type={kind!r:.100} resizes images in a way of its own, which cannot be read")
    found = {name: getattr(own, name, None) for name in KNOWN}
    return {name: one for name, one in found.items() if one is not None or name.startswith("do_")}


def _channels(values: Any) -> Any:
    """One number as that of red, green and blue; anything else as it is."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return [values] * 3 if isinstance(values, (int, float)) else values


def _crop(settings: Mapping[str, Any], default: list[int]) -> dict[str, Any]:
    """Resize and crop of an image processor as timm's input_size, crop_pct and crop_mode."""
    cropped = settings.get("do_center_crop") and "crop_size" in settings
    square = settings.get("default_to_square", not cropped and "crop_pct" not in settings)
    edges, both = _edges(settings["size"], "size", square) if "size" in settings else (list(default[1:]), False)
    mode = "squash" if both else "center"
    if cropped:
        crop, _ = _edges(settings["crop_size"], "crop_size")
        return {"input_size": [3, *crop], "crop_pct": crop[0] / edges[0], "crop_mode": mode}
    if "crop_pct" in settings and edges[0] >= STRETCHED:
        return {"input_size": [3, *edges], "crop_pct": 1.0, "crop_mode": "squash"}
    return {"input_size": [3, *edges], "crop_pct": settings.get("crop_pct", 1.0), "crop_mode": mode}


def _edges(size: Any, name: str, square: bool = True) -> tuple[list[int], bool]:
    """Height and width, and whether both were given, not the short side alone; one number is both where it is a square's."""
    if isinstance(size, (list, tuple)) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, Mapping):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    both = "height" in size and "width" in size
    if not both and "shortest_edge" not in size:
        raise ValueError(f"{name}={dict(size)!r:.100} must have height and width, or the shortest_edge")
    given = (size["height"], size["width"]) if both else (size["shortest_edge"],) * 2
    return [read_number(edge, f"an edge of {name}", 1) for edge in given], both
