"""`pipeline("vision-feature-description", model=..., trust_remote_code=True)`: images in, words and maps per layer out.

The pipeline only arranges: the model describes and attributes, the processor goes from pixels to tensors and back.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from .explaining_devil import ALL_LAYERS
from .image_processing_devil import ImageSource, load_images
from .outputs_devil import DescribeOutput
from .pooling_devil import resolve_layers

TASK = "vision-feature-description"
# What `config.custom_pipelines` of a checkpoint must hold for `pipeline` to find this file beside the weights.
IMPLEMENTATION = "pipeline_devil.VisionFeatureDescriptionPipeline"
CUSTOM_PIPELINES = {TASK: {"impl": IMPLEMENTATION, "pt": ["AutoModel"], "type": "multimodal"}}
_MAP_PREFIX = "map of "
_COLUMNS = ("sequences", "layer_index", "locations", "token_evidence")  # of `DescribeOutput`, sorted by image


class VisionFeatureDescriptionPipeline(Pipeline):
    """Describe what a vision backbone sees, layer by layer and place by place, and map phrases.

    ```python
    describe = pipeline("vision-feature-description", model="user/devil-resnet50-opt125m", trust_remote_code=True)
    describe("dog.jpg", layers=["layer3", "layer4"])
    describe(["dog.jpg", "https://.../cat.png"], locations=[(3, 4)], phrases=["a dog", "grass"], batch_size=2)
    ```

    The first argument is one image or a list of images, each anything that `load_images` accepts. Named arguments, at
    construction or in a call: `layers`, `window` as in `model.describe` and `model.attribute`; `phrases`, and with them
    `measure`, `combine`, `carrier`, as in `model.attribute` and the processor; everything else goes to `model.describe`
    (`locations`, `evidence`) and to generation (`max_new_tokens`, `num_beams`, ...).

    Returns, per image, a dict with `"descriptions"`, a list of dicts as `describe_rows` makes them, without the image; and with
    phrases, `"phrases"` and `"maps"`: per layer a float tensor (phrases, height, width) in the coordinates of the image, NaN
    where the backbone's crop does not reach.
    """

    # The base class declares these without types.
    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    model: Any
    processor: Any

    def _sanitize_parameters(
        self, phrases: str | Sequence[str] | None = None, carrier: str | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        shared = {name: kwargs.pop(name) for name in ("layers", "window") if name in kwargs}
        attribute = {name: kwargs.pop(name) for name in ("measure", "combine") if name in kwargs}
        # Only what is given: settings of the construction stay where a call says nothing.
        forward = {"shared": shared, "attribute": attribute, "describe": kwargs}
        forward = {name: settings for name, settings in forward.items() if settings}
        if phrases is None:
            if carrier is not None:
                raise ValueError(f"carrier {carrier!r} needs phrases: pass `phrases` as well")
            return {}, forward, {}
        tokens = self.processor(text=phrases, carrier=carrier)
        return {}, forward | {"phrases": tokens}, {"phrases": [phrases] if isinstance(phrases, str) else list(phrases)}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Describe one image, or a list of images (`batch_size` at a time)."""
        if isinstance(inputs, tuple) or (isinstance(inputs, (np.ndarray, torch.Tensor)) and inputs.ndim == 4):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            raise ValueError("no images given: pass at least one")
        return super().__call__(inputs, *args, **kwargs)

    def preprocess(self, input_: ImageSource) -> dict[str, torch.Tensor]:  # type: ignore[override]
        pictures = load_images(input_)
        if len(pictures) != 1:
            raise ValueError(f"expected one image per entry, got {len(pictures)}; pass a flat list of images")
        image_size = torch.tensor([[pictures[0].height, pictures[0].width]])
        return {**self.processor(images=pictures, return_tensors="pt"), "image_size": image_size}

    def _forward(  # type: ignore[override]
        self, model_inputs: dict[str, torch.Tensor], phrases=None, shared=None, describe=None, attribute=None
    ) -> dict[str, Any]:
        shared = shared or {}
        feature_maps = self.model.extract_features(model_inputs["pixel_values"])
        describe = (shared | describe) if describe else dict(shared)
        if phrases is not None and "locations" not in describe:
            describe.pop("window", None)  # of the maps alone
        output = self.model.describe(feature_maps=feature_maps, **describe)
        # The base class cuts batches along the first axis: every entry has one row per image.
        order = torch.argsort(output.image_index, stable=True)
        columns = {name: output[name] for name in _COLUMNS if name in output}
        batch = (len(model_inputs["pixel_values"]), -1)
        rows = {name: column[order.to(column.device)].unflatten(0, batch) for name, column in columns.items()}
        rows["image_size"] = model_inputs["image_size"]
        if phrases is not None:
            # "all", which descriptions know as all layers together, means every layer here.
            asked = resolve_layers(shared.get("layers"), self.model.layer_names, whole=ALL_LAYERS)
            names = [self.model.layer_names[index] for index in asked if index >= 0]
            settings = shared | (attribute or {}) | {"layers": names or None}
            attributed = self.model.attribute(feature_maps=feature_maps, phrases=phrases.to(self.device), **settings)
            rows |= {f"{_MAP_PREFIX}{layer}": values for layer, values in attributed.maps.items()}
        return rows

    def postprocess(self, model_outputs: dict[str, Any], phrases=None) -> dict[str, Any]:  # type: ignore[override]
        columns = {name: model_outputs[name][0] for name in _COLUMNS if name in model_outputs}
        here = torch.zeros(len(columns["sequences"]), dtype=torch.long)
        output = DescribeOutput(**columns, image_index=here, layer_names=self.model.layer_names)
        descriptions = self.processor.post_process_descriptions(output)
        for row in descriptions:
            del row["image"]  # there is one image in each result
        if phrases is None:
            return {"descriptions": descriptions}
        maps = {name: values for name, values in model_outputs.items() if name.startswith(_MAP_PREFIX)}
        placed = self.processor.post_process_attribution(maps, target_sizes=model_outputs["image_size"].tolist())
        placed = {name.removeprefix(_MAP_PREFIX): per_image[0] for name, per_image in placed.items()}
        return {"descriptions": descriptions, "phrases": phrases, "maps": placed}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and processor; the base class would leave out the processor, which loading needs."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(TASK, VisionFeatureDescriptionPipeline, pt_model=AutoModel, type="multimodal")
