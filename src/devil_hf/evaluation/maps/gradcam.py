"""Grad-CAM of the backbone's own classifier: what the class says about the place, beside what the phrase says.

A phrase is a class where a class's name, or one of its synonyms, is the phrase or ends with it ("sports car" for "car"); the
target is then the log-sum-exp of all these logits. Phrases without a class have no map. Selvaraju et al., 2017, as
pytorch-grad-cam has it, on the deepest layer that the model reads.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F

from devil_hf.model.modeling_devil import DevilModel
from devil_hf.text_files import read_list


class ClassMapper:
    """Grad-CAM maps of phrases that are classes of a model's backbone.

    Args:
        model: its backbone is one module that ends in a classifier.
        names: names of the classes, in the order of the logits, synonyms separated by commas; None for ImageNet's thousand.

    Raises:
        ValueError: if pytorch-grad-cam is not installed, the backbone has no classifier, the names do not fit it, or the deepest
            layer gives no feature map (transformers give tokens).
    """

    def __init__(self, model: DevilModel, names: Sequence[str] | None = None):
        try:
            from pytorch_grad_cam import GradCAM
        except ImportError as error:
            raise ValueError("Grad-CAM needs pytorch-grad-cam: pip install 'devil-hf[gradcam]'") from error
        self.module: nn.Module = model.backbone.module
        self.layer = model.layer_names[-1].split(":")[0]
        height, width = model.backbone.config["input_size"][1:]
        shapes: list[tuple[int, ...]] = []
        handles = [
            module.register_forward_hook(lambda _, __, output: shapes.append(tuple(getattr(output, "shape", ()))))
            for name, module in self.module.named_modules()
            if name == self.layer
        ]
        with torch.no_grad():
            logits = self.module(self._placed(torch.zeros(1, 3, height, width)))
        for handle in handles:
            handle.remove()
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not getattr(self.module, "num_classes", 1):
            raise ValueError("Grad-CAM needs the backbone's classifier, and this backbone was made without one (num_classes=0)")
        if not shapes or len(shapes[0]) != 4 or shapes[0][1] != model.backbone.channels[-1]:
            raise ValueError(
                f"Grad-CAM needs a feature map (images, channels, rows, columns) of the deepest layer, and {self.layer!r} gives "
                f"{shapes[0] if shapes else 'nothing'}: leave it out for this backbone"
            )
        if names is None:
            info = ImageNetInfo()
            names = [info.index_to_description(index) for index in range(info.num_classes())]
        if len(names) != logits.shape[1]:
            raise ValueError(f"{len(names)} class names for the {logits.shape[1]} classes of the backbone: give its own names")
        self.names = [[part.strip().lower() for part in name.split(",")] for name in names]
        self.cam = GradCAM

    def _placed(self, pixel_values: Tensor) -> Tensor:
        """Where the weights are, and as precise."""
        return pixel_values.to(next(self.module.parameters()))

    def classes_of(self, phrase: str) -> list[int]:
        """The classes that a phrase names."""
        phrase = phrase.lower()
        return [
            index
            for index, synonyms in enumerate(self.names)
            if any(name == phrase or name.endswith(f" {phrase}") for name in synonyms)
        ]

    def maps(self, pixel_values: Tensor, phrases: Sequence[str]) -> dict[str, np.ndarray]:
        """Phrase -> Grad-CAM (rows, columns) on the layer's grid, for one image (1, 3, H, W) and the phrases that are classes."""
        found = {}
        # Hooks for these phrases only: they would keep the activations of every later pass.
        with self.cam(model=self.module, target_layers=[self.module.get_submodule(self.layer)]) as cam:
            for phrase in phrases:
                classes = self.classes_of(phrase)
                if classes:
                    # The frozen weights need no gradient, the features do: it enters with the pixels.
                    pixels = self._placed(pixel_values).detach().clone().requires_grad_()
                    with torch.enable_grad():
                        enlarged = cam(pixels, targets=[lambda logits, of=classes: logits[of].logsumexp(dim=0)])
                    grid = cam.activations_and_grads.activations[0].shape[-2:]
                    # Enlarged bilinearly by the library; its own grid is what lies at the centres of the cells.
                    values = F.interpolate(torch.tensor(enlarged)[None].float(), grid, mode="bilinear", align_corners=False)
                    found[phrase] = values[0, 0].numpy()
        return found


def read_class_names(file: str | Path) -> list[str]:
    """Class names from a text file, one class a line in the order of the logits."""
    return read_list(file)
