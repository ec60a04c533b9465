"""Images and words in, descriptions and maps in image coordinates out.

Captions and phrases are tokenised without BOS and EOS (the model adds them, method section "Language model") and padded
on the right. Attribution maps are up-sampled bilinearly to the crop as in the paper, and then go one step further: the
backbone's crop and resize are undone, so that a map lies on the image that was given, NaN where the crop did not reach.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput, logging

from .image_processing_devil import MAX_RESIZED_PIXELS, CropGeometry, ImageSource, load_images
from .outputs_devil import DescribeOutput, ShapesRepr, describe_rows
from .pooling_devil import read_masks, read_number

logger = logging.get_logger(f"transformers.{__name__}")  # answers to the verbosity of transformers

CALL_SETTINGS = ("resample", "image_mean", "image_std")
WARM, COOL = (176, 30, 20), (5, 68, 140)  # for and against a phrase


@dataclass(repr=False)
class AttributionOverlays(ShapesRepr, ModelOutput):
    """Pictures of images under their maps: per layer, per image, one RGB picture per phrase, in the size of the image, all on
    one colour scale from the lowest to the highest of `value_range`, in the unit of the maps."""

    pictures: dict[str, list[list[Image.Image]]] | None = None
    value_range: tuple[float, float] | None = None


class DevilProcessor(ProcessorMixin):
    """Processor of a DeViL model: the `DevilImageProcessor` of its backbone, the tokenizer of its language model (one without a
    padding token gets its EOS token as padding), and the way back from maps to images."""

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has neither a padding nor an EOS token: set one")
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: ImageSource | None = None,
        text: str | Sequence[str] | None = None,
        carrier: str | None = None,
        *,
        max_length: int | None = None,
        padding: bool | str = True,
        truncation: bool = False,
        return_tensors: str | None = "pt",
        **images_kwargs: Any,
    ) -> BatchFeature:
        """Prepare images, captions or phrases for the model.

        Args:
            images: anything that `load_images` accepts: PIL images of any mode, arrays, tensors, paths, URLs.
            text: one or K captions or phrases.
            carrier: neutral words in front of every phrase ("the"), joined by a space; they are context, not scored.
            max_length: captions are cut after this many tokens (the paper: 100). Without it, text longer than the
                language model's context is an error, or cut there with `truncation`.
            return_tensors: `"pt"`, `"np"` or `None` for lists.
            images_kwargs: settings of the image processor for this call, see `CALL_SETTINGS`.

        Returns:
            `BatchFeature` with, for images, `pixel_values` of shape `(batch_size, 3, height, width)`; for text,
            `input_ids` and `attention_mask` of shape `(K, T)`, right-padded, without BOS and EOS; with a carrier also
            `scored_mask`, bool of shape `(K, T)`, True on the phrase's own tokens. A TypeError for arguments of other names; a
            ValueError if neither images nor text are given, or a phrase is empty or too long.
        """
        if images is None and text is None:
            raise ValueError("nothing to process: pass `images`, `text` or both")
        if carrier is not None and (text is None or not isinstance(carrier, str)):
            raise ValueError(f"carrier {carrier!r:.100} needs phrases: pass `text` as well, both as words")
        for name, value in images_kwargs.items():
            if name not in CALL_SETTINGS:
                raise TypeError(
                    f"{name}={value!r:.100} is no setting of a call, as {CALL_SETTINGS} are; what moves the crop is set on "
                    "`processor.image_processor`, by which maps find their way back"
                )
        if padding not in (True, "longest"):
            raise ValueError(f"padding={padding!r}: phrases are always padded to the longest")
        if max_length is not None or truncation:
            max_length = read_number(self.tokenizer.model_max_length if max_length is None else max_length, "max_length", 1)
        data: dict[str, Any] = {}
        if images is not None:
            data |= self.image_processor(images, return_tensors=return_tensors, **images_kwargs)
        if text is not None:
            data |= self._tokenize([text] if isinstance(text, str) else text, carrier, max_length, return_tensors)
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask"]

    def _tokenize(
        self, phrases: Sequence[str], carrier: str | None, max_length: int | None, return_tensors: str | None
    ) -> BatchFeature:
        if not isinstance(phrases, Sequence) or not phrases:
            raise ValueError(f"text={phrases!r:.100} must be a phrase, or a list of at least one")
        context = self._token_ids(carrier, None) if carrier else []
        rows, scored = [], []
        for phrase in phrases:
            ids = self._token_ids(phrase, carrier)
            pairs = zip(context, ids, strict=False)
            shared = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(context), len(ids)))
            self._check_words(phrase, ids[shared:])
            rows.append(ids[:max_length])
            scored.append([position >= shared for position in range(len(ids))][:max_length])
        limit, width = self.tokenizer.model_max_length, max(map(len, rows))
        if width > limit:
            phrase = phrases[[len(ids) for ids in rows].index(width)]
            raise ValueError(
                f"phrase {phrase[:80]!r} has {width} tokens, but the language model reads at most {limit}; "
                "shorten it or pass `max_length`"
            )
        data: dict[str, list] = {
            "input_ids": [ids + [self.tokenizer.pad_token_id] * (width - len(ids)) for ids in rows],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids in rows],
        }
        if carrier:
            data["scored_mask"] = [mask + [False] * (width - len(mask)) for mask in scored]
        return BatchFeature(data, tensor_type=return_tensors)

    def _token_ids(self, phrase: str, carrier: str | None) -> list[int]:
        if not isinstance(phrase, str):
            raise TypeError(f"a phrase must be a string, got {phrase!r:.100} of type {type(phrase).__name__}")
        if not phrase.strip():
            raise ValueError(f"phrase {phrase!r} is empty: give at least one word")
        text = f"{carrier.rstrip()} {phrase.lstrip()}" if carrier else phrase
        # What spells a special token is text of the user's.
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if special := set(ids) & set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}:
            names = self.tokenizer.convert_ids_to_tokens(sorted(special))
            raise ValueError(f"phrase {phrase!r} holds {names}, which the language model reads as no words: leave them out")
        return ids

    def _check_words(self, phrase: str, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"phrase {phrase!r} has no token of its own in the vocabulary of the language model")
        if (unknown := self.tokenizer.unk_token_id) in ids:
            if set(ids) == {unknown}:
                raise ValueError(f"phrase {phrase!r} has no word that the language model knows: choose another")
            logger.warning(f"phrase {phrase!r} holds words that the language model does not know, read as unknown")

    def post_process_descriptions(self, output: DescribeOutput, images: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The words of what `model.describe` or `model.describe_directions` returned, a dict per description: `describe_rows`."""
        return describe_rows(output, self.tokenizer, images)

    def post_process_attribution(
        self, outputs: Any, images: ImageSource | None = None, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, list[torch.Tensor]]:
        """Attribution maps in the coordinates of the original images.

        Every pixel of an image takes the value of the feature map at its centre, bilinearly interpolated between the
        centres of the locations (as up-sampling with `align_corners=False` does), with crop and resize undone.

        Args:
            outputs: what `model.attribute` returned, or its `maps`: per layer a tensor (batch_size, K, H_l, W_l).
            images: the images that were given to the processor; their sizes are read after EXIF rotation.
            target_sizes: instead of `images`, (height, width) per image.

        Returns:
            Per layer, one float tensor of shape `(K, height, width)` per image, NaN outside the crop.
        """
        maps = attribution_maps(outputs)
        if (images is None) == (target_sizes is None) or not isinstance(target_sizes, list | tuple | None):
            raise ValueError("pass either `images` or `target_sizes`: the maps are placed into images of that size")
        if images is not None:
            target_sizes = [(image.height, image.width) for image in load_images(images)]
        geometries = [self.image_processor.geometry(size) for size in target_sizes or ()]
        for layer, values in maps.items():
            if len(values) != len(geometries):
                raise ValueError(f"layer {layer!r} has maps of {len(values)} images, but {len(geometries)} images were given")
        return {layer: list(map(_place_maps, values.detach(), geometries)) for layer, values in maps.items()}

    def overlay(self, outputs: Any, images: ImageSource) -> AttributionOverlays:
        """Pictures of the images that the processor was given under their maps, on one colour scale across all of them.

        Warm colours lie above the middle of the scale, cool ones below: zero, unless `outputs` names a measure but evidence.
        """
        pictures = load_images(images)
        maps = self.post_process_attribution(outputs, images=pictures)
        symmetric = getattr(outputs, "measure", "evidence") in (None, "evidence")
        value_range = shared_value_range(attribution_maps(outputs), symmetric)
        layers = {}
        for layer, placed in maps.items():
            pairs = zip(pictures, placed, strict=True)
            layers[layer] = [[_tinted(image, one.numpy(), value_range) for one in values] for image, values in pairs]
        return AttributionOverlays(pictures=layers, value_range=value_range)

    def masks_to_regions(self, masks: Sequence[np.ndarray | torch.Tensor]) -> torch.Tensor:
        """Masks drawn on images as the `regions` that the model reads: resized and cropped as the images were.

        Args:
            masks: per image, (H, W) or (R, H, W) in the size of the upright image, bool or in [0, 1].

        Returns:
            (B, R, height, width) over the pixel values, in [0, 1]; zero where the crop reaches beyond the image. A
            ValueError for masks of a wrong shape, or of different numbers per image.
        """
        regions = []
        for mask in masks:
            values = read_masks(mask, "masks").cpu()
            if values.ndim not in (2, 3) or 0 in values.shape:
                raise ValueError(f"a mask must be (height, width) or (regions, height, width), got {tuple(values.shape)}")
            values = values[None] if values.ndim == 2 else values
            geometry = self.image_processor.geometry(values.shape[-2:])
            if math.prod(geometry.resized_size) > MAX_RESIZED_PIXELS:
                cut, linear = self.image_processor.resize_and_crop, Image.Resampling.BILINEAR
                crops = [cut(Image.fromarray(one), geometry, linear, 0) for one in values.numpy()]
                regions.append(torch.from_numpy(np.stack(crops)))
                continue
            resized = F.interpolate(values[None], geometry.resized_size, mode="bilinear", antialias=True)[0]
            (top, left), (height, width) = geometry.offset, geometry.crop_size
            # Negative padding cuts: one call for crops inside the image and for crops that reach beyond it.
            right, bottom = width - resized.shape[2] + left, height - resized.shape[1] + top
            regions.append(F.pad(resized, (-left, right, -top, bottom)))
        counts = sorted({len(one) for one in regions})
        if len(counts) != 1:
            raise ValueError(f"every image needs the same number of regions, at least one; got {counts}")
        return torch.stack(regions)


def attribution_maps(outputs: Any) -> dict[str, torch.Tensor]:
    """The maps per layer, (batch_size, K, H_l, W_l), of what `model.attribute` returned or of its `maps`."""
    maps = getattr(outputs, "maps", outputs)
    if not isinstance(maps, Mapping):
        raise TypeError(f"expected the output of `model.attribute` or its maps per layer, got {type(outputs).__name__}")
    for layer, values in maps.items():
        if not isinstance(values, torch.Tensor) or values.ndim != 4:
            raise ValueError(
                f"maps of layer {layer!r} must be a tensor (batch_size, phrases, rows, columns), got {values!r:.100}"
            )
    return dict(maps)


def _place_maps(maps: torch.Tensor, geometry: CropGeometry) -> torch.Tensor:
    """Maps of one image (K, H_l, W_l) -> (K, height, width) in image coordinates, NaN outside the crop."""
    height, width = geometry.image_size
    ys = torch.tensor([geometry.image_to_crop(y + 0.5, 0.5)[0] for y in range(height)]) / geometry.crop_size[0]
    xs = torch.tensor([geometry.image_to_crop(0.5, x + 0.5)[1] for x in range(width)]) / geometry.crop_size[1]
    # (H, W, 2), ends of the crop at -1 and 1
    grid = torch.stack(torch.meshgrid(2 * xs - 1, 2 * ys - 1, indexing="xy"), dim=-1)
    values = maps.float().cpu()[None]
    placed = F.grid_sample(values, grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
    seen = ((ys >= 0) & (ys < 1))[:, None] & ((xs >= 0) & (xs < 1))[None, :]
    return placed.masked_fill(~seen, float("nan"))


def shared_value_range(maps: Mapping[str, Any], symmetric: bool = True) -> tuple[float, float]:
    """Lowest and highest finite value of all maps; with `symmetric`, widened to lie symmetrically around zero."""
    finite = [values[values.isfinite()] for layer in maps.values() for values in layer]
    finite = [values for values in finite if values.numel()]
    if not finite:
        raise ValueError("no map holds a finite value, so there is no colour scale; check the features for NaN")
    low, high = min(float(v.min()) for v in finite), max(float(v.max()) for v in finite)
    if symmetric:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    return (low, high) if high > low else (low - max(1.0, abs(low)), high + max(1.0, abs(high)))


def _tinted(image: Image.Image, values: np.ndarray, value_range: tuple[float, float]) -> Image.Image:
    """An RGB image (W, H) under a map (H, W): colour grows from the middle of the scale; dark where the map is NaN."""
    low, high = value_range
    position = np.clip((2 * values.astype(np.float64) - low - high) / (high - low), -1, 1)[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    picture = grey + 0.8 * np.sqrt(np.abs(position)) * (np.where(position > 0, WARM, COOL) - grey)
    return Image.fromarray(np.where(np.isnan(position), 0.4 * grey, picture).round().astype(np.uint8))


DevilProcessor.register_for_auto_class("AutoProcessor")
