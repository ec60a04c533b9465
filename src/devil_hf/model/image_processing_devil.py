"""Images of any kind to the pixel values that a backbone was evaluated on, and the way back.

The pipeline is timm's evaluation transform bit for bit (resize by `crop_pct`, one of three crop modes, scale to [0, 1],
normalise). The paper resizes the short side to the crop size itself (DeViL, section 4): `resize="paper"`.
Images are made upright and RGB first: 16-bit and floating-point values are scaled instead of clipped, and what is
transparent becomes white. `CropGeometry` is the single place that knows where the crop lies in the original image.
"""

import base64
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypedDict

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict

from .pooling_devil import read_number

# Anything that holds one image, and lists of it, nested as deep as one likes.
ImageSource = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | Sequence[Any]

CROP_MODES = ("center", "squash", "border")
SETTINGS = ("crop_size", "crop_pct", "crop_mode", "resample", "image_mean", "image_std")
# Above this, only the part that the crop keeps is computed: resizing a 1 x 10,000 strip must not fill the memory.
MAX_RESIZED_PIXELS = 2**26
URL_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class CropGeometry:
    """Where the crop that the backbone sees lies in an image. All sizes are (height, width) in pixels.

    Args:
        image_size, resized_size: of the upright image, and after resizing.
        offset: (top, left) of the crop in the resized image; negative where the crop reaches into padding.
        crop_size: size of the crop, the backbone's input.
    """

    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    offset: tuple[int, int]
    crop_size: tuple[int, int]

    def image_to_crop(self, y: float, x: float) -> tuple[float, float]:
        """Continuous (y, x) in the image -> (y, x) in the crop; beyond [0, crop_size] outside the crop."""
        (height, width), (resized_height, resized_width), (top, left) = self.image_size, self.resized_size, self.offset
        return y * (resized_height / height) - top, x * (resized_width / width) - left


def _resized_size(image_size: tuple[int, int], crop_size: tuple[int, int], crop_pct: float, crop_mode: str) -> tuple[int, int]:
    """Size after timm's resize; the roundings are timm's and torchvision's own, which differ from case to case."""
    height, width = image_size
    scaled_height, scaled_width = (math.floor(edge / crop_pct) for edge in crop_size)
    if crop_mode == "squash":
        return scaled_height, scaled_width
    if crop_mode == "center" and scaled_height == scaled_width:
        long_edge = int(scaled_height * max(image_size) / min(image_size))
        return (long_edge, scaled_width) if width <= height else (scaled_height, long_edge)
    pick = max if crop_mode == "border" else min
    ratio = pick(height / scaled_height, width / scaled_width)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def _crop_offset(resized: int, crop: int) -> int:
    """Start of a centred crop along one edge; a crop larger than the image starts before it, in the padding."""
    return -((crop - resized) // 2) if crop > resized else round((resized - crop) / 2.0)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Pixel values of any type on the scale 0..255, by type and range: [0, 1] floats, 8-bit and 16-bit integers."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 1):
            raise ValueError(
                f"a floating-point image must lie in [0, 1], got values from {low} to {high}; pass uint8 values, or "
                "divide by 255; pixel values that are already normalised go to the model as `pixel_values`"
            )
        return np.round(values * 255.0).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"an integer image must lie in 0..255 or 0..65535, got values from {low} to {high}")
    if (values.dtype.itemsize == 2 and values.dtype.kind == "u") or high > 255:
        return np.round(values / 257.0).astype(np.uint8)
    return values.astype(np.uint8)


def _channels_last(array: np.ndarray, channels_first: bool) -> np.ndarray:
    """(H, W), (C, H, W) or (H, W, C) -> (H, W) or (H, W, C); `channels_first` decides only where both readings fit."""
    if array.ndim == 2:
        return array
    first, last = array.shape[0], array.shape[-1]
    fits = [edge in (1, 2, 3, 4) for edge in (first, last)]
    if not any(fits):
        raise ValueError(f"an image array must have 1 to 4 channels as its first or last axis, got shape {array.shape}")
    if all(fits) and (first in (3, 4)) != (last in (3, 4)):
        fits = [first in (3, 4), last in (3, 4)]
    if fits[0] and (not fits[1] or channels_first):
        array = np.moveaxis(array, 0, -1)
    return array[..., 0] if array.shape[-1] == 1 else array


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB version of a picture of any mode: EXIF rotation applied, transparent parts over white."""
    if 0 in image.size:
        raise ValueError(f"an image must have at least one pixel, got width x height {image.size}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    if image.mode == "LAB":
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        return ImageCms.applyTransform(image, to_srgb)  # type: ignore[return-value]
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _array_to_image(array: np.ndarray, channels_first: bool) -> Image.Image:
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"an image array must be (H, W), (C, H, W) or (H, W, C) and not empty, got shape {array.shape}")
    if array.dtype.kind not in "buif":
        raise TypeError(f"an image array must hold numbers, got dtype {array.dtype}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_uint8(_channels_last(array, channels_first)))))


def _open(source: str) -> Image.Image:
    """Open a URL, a path or base64 text. `load_image` of transformers would make RGB of it: transparent turns black."""
    if source.startswith(("http://", "https://")):
        response = get_session().get(source, timeout=URL_TIMEOUT)
        response.raise_for_status()
        return Image.open(BytesIO(response.content))
    if os.path.exists(source):
        return Image.open(source)
    if source.startswith("data:image/"):
        return Image.open(BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
    try:
        return Image.open(BytesIO(base64.b64decode(source, validate=True)))
    except (ValueError, UnidentifiedImageError):  # many a word is base64 text, of nothing
        raise FileNotFoundError(f"no such file, and not a URL or an image as base64 text: {source[:200]!r}") from None


def load_images(images: ImageSource) -> list[Image.Image]:
    """Upright RGB pictures of whatever holds images.

    Args:
        images: a PIL image of any mode, an array or tensor ((H, W), (C, H, W), (H, W, C), or a batch of these with one
            more axis in front), a path, a URL, base64 text, or nested lists of these. An animated file gives its first
            frame, an open animation the one it stands at. Where both fit, tensors are read channels first, arrays last.

    Returns:
        One RGB picture per image, after EXIF rotation. A TypeError for anything else than an image; a ValueError for one of zero
        size, values out of range, or a file that is not an image.
    """
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in load_images(entry)]
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [_load_one(images)]
    if channels_first := isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()  # numpy has no bfloat16
    if not isinstance(images, np.ndarray):
        raise TypeError(f"an image must be a PIL image, array, tensor, path, URL or a list of these, not {images!r:.100}")
    arrays = images if images.ndim == 4 else [images]
    return [_array_to_image(array, channels_first) for array in arrays]


def _load_one(source: str | os.PathLike | Image.Image) -> Image.Image:
    try:
        return _to_rgb(source if isinstance(source, Image.Image) else _open(os.fspath(source)))
    except FileNotFoundError:
        raise
    except Exception as error:  # the client and the decoders have dozens of their own
        raise ValueError(f"cannot read {str(source).partition(';base64,')[0][:200]!r} as an image: {error}") from error


class DevilImageProcessorKwargs(TypedDict, total=False):
    """What can be set for a `DevilImageProcessor` and overridden in a call."""

    crop_size: Any  # `_validate_preprocess_kwargs` has words of its own for what is wrong
    crop_pct: Any
    crop_mode: Any
    resample: Any
    image_mean: Any
    image_std: Any
    return_tensors: str | None


class DevilImageProcessor(PilBackend):
    """Image processor with exactly the backbone's own evaluation preprocessing.

    Args:
        crop_size: `{"height": ..., "width": ...}` of the backbone's input, in pixels.
        crop_pct: the image is resized to `crop_size / crop_pct` before the crop.
        crop_mode: `"center"` resizes the short side and crops; `"squash"` resizes both sides, ignoring the aspect
            ratio; `"border"` resizes the long side and pads with the mean colour.
        resample: the resampling filter, a `PIL.Image.Resampling`.
        image_mean, image_std: per channel, on the scale [0, 1].
    """

    valid_kwargs = DevilImageProcessorKwargs  # type: ignore[assignment]
    model_input_names = ["pixel_values"]
    crop_size: Any = {"height": 224, "width": 224}  # a SizeDict once the base class has read it
    crop_pct = 0.875
    crop_mode = "center"
    resample = Image.Resampling.BICUBIC
    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)

    def __init__(self, **kwargs: Any):
        if wrong := [name for name in kwargs if name not in self.valid_kwargs.__annotations__ and hasattr(self, name)]:
            raise ValueError(f"{wrong} are no settings of an image processor, as {SETTINGS} are: leave them out")
        super().__init__(**kwargs)
        self._validate_preprocess_kwargs(**self._standardize_kwargs())

    def _standardize_kwargs(self, **given: Any) -> dict[str, Any]:  # type: ignore[override]
        own = {name: getattr(self, name) for name in SETTINGS if given.get(name) is None}
        if not isinstance(size := given.get("crop_size"), (dict, SizeDict, type(None))):
            edges = size if isinstance(size, (list, tuple)) else (size, size)
            if len(edges) != 2:
                raise ValueError(f"crop_size={size!r:.100} must be a height and a width")
            given["crop_size"] = {"height": edges[0], "width": edges[1]}
        return super()._standardize_kwargs(**given | own)

    def _validate_preprocess_kwargs(  # type: ignore[override]
        self, crop_size: SizeDict, crop_pct: Any, crop_mode: str, resample: int, image_mean: Any, image_std: Any, **_: Any
    ) -> None:
        height, width = (read_number(getattr(crop_size, one, None), f"{one} of crop_size", 1) for one in ("height", "width"))
        if height * width > 2**26:
            raise ValueError(f"crop_size={(height, width)} is more than a backbone reads: at most 8192 x 8192")
        if read_number(crop_pct, "crop_pct", 1e-3, whole=False) > min(height, width):
            raise ValueError(f"crop_pct={crop_pct!r} must be a number, usually in (0, 1]: this leaves nothing of an image")
        if not isinstance(crop_mode, str) or crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode {crop_mode!r:.100} is not one of {CROP_MODES}")
        if not np.isscalar(resample) or resample not in list(Image.Resampling):
            raise ValueError(f"resample {resample!r:.100} is not a PIL.Image.Resampling: {[*map(int, Image.Resampling)]}")
        for name, values, least in (("image_mean", image_mean, -1e4), ("image_std", image_std, 1e-4)):
            listed = values if isinstance(values, (list, tuple)) else []
            if [read_number(one, name, least, whole=False) <= 1e4 for one in listed] != [True] * 3:
                raise ValueError(f"{name}={values!r:.100} must be a list of three numbers, of red, green and blue in [0, 1]")

    def fetch_images(self, image_url_or_urls: ImageSource) -> list[Image.Image]:  # type: ignore[override]
        """Upright RGB pictures of anything that `load_images` accepts."""
        return load_images(image_url_or_urls)

    def geometry(
        self, image_size: Sequence[int], crop_size: Any = None, crop_pct: float | None = None, crop_mode: str | None = None
    ) -> CropGeometry:
        """Where the crop lies in an upright image of `image_size` (height, width); None takes the processor's own settings."""
        asked = self._standardize_kwargs(crop_size=crop_size, crop_pct=crop_pct, crop_mode=crop_mode)
        self._validate_preprocess_kwargs(**asked)  # somebody may have set an attribute
        edges = [int(edge) if isinstance(edge, float) and edge % 1 == 0 else edge for edge in image_size]
        height, width = (read_number(edge, "an edge of image_size", 1) for edge in edges)
        crop = (int(asked["crop_size"]["height"]), int(asked["crop_size"]["width"]))
        resized = _resized_size((height, width), crop, asked["crop_pct"], asked["crop_mode"])
        top, left = (_crop_offset(*edges) for edges in zip(resized, crop, strict=True))
        return CropGeometry(image_size=(height, width), resized_size=resized, offset=(top, left), crop_size=crop)

    def _preprocess_image_like_inputs(self, images: ImageSource, *args: Any, **kwargs: Any) -> BatchFeature:
        pictures = load_images(images)
        if not pictures:
            raise ValueError("no images given: pass at least one")
        return self._preprocess(pictures, *args, **kwargs)

    def _preprocess(  # type: ignore[override]
        self, images, crop_size, crop_pct, crop_mode, resample, image_mean, image_std, return_tensors=None, **kwargs
    ) -> BatchFeature:
        mean, std = np.array(image_mean, dtype=np.float32), np.array(image_std, dtype=np.float32)
        fill = tuple(round(255 * value) for value in image_mean) if crop_mode == "border" else (0, 0, 0)
        pixel_values = []
        for image in images:
            geometry = self.geometry((image.height, image.width), crop_size, crop_pct, crop_mode)
            pixels = np.asarray(self.resize_and_crop(image, geometry, resample, fill), dtype=np.float32)  # (H, W, 3)
            normalised = (pixels / np.float32(255) - mean) / std
            pixel_values.append(np.ascontiguousarray(normalised.transpose(2, 0, 1)))
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    @staticmethod
    def resize_and_crop(image: Image.Image, geometry: CropGeometry, resample: int, fill: Any) -> Image.Image:
        """The crop of a picture of any mode that can be resized, with the colour `fill` where it reaches beyond the picture."""
        (height, width), (top, left) = geometry.resized_size, geometry.offset
        crop_height, crop_width = geometry.crop_size
        x0, y0, x1, y1 = 0, 0, width, height
        if height * width > MAX_RESIZED_PIXELS:
            x0, y0 = max(left, 0), max(top, 0)
            x1, y1 = min(left + crop_width, width), min(top + crop_height, height)
        scale_x, scale_y = image.width / width, image.height / height
        box = (x0 * scale_x, y0 * scale_y, min(x1 * scale_x, image.width), min(y1 * scale_y, image.height))
        resized = image.resize((x1 - x0, y1 - y0), Image.Resampling(resample), box=box)
        canvas = Image.new(image.mode, (crop_width, crop_height), fill)
        canvas.paste(resized, (x0 - left, y0 - top))
        return canvas


DevilImageProcessor.register_for_auto_class("AutoImageProcessor")
