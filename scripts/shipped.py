"""How a trained model becomes a checkpoint that ships with the package: whole, in half precision, knowing its training images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devil_hf.checkpoints.loading import load
from devil_hf.checkpoints.scope import measure_scope
from devil_hf.folders import written

BATCH_IMAGES = 16


def write_shipped(trained: Path, images: Sequence[Any], folder: Path) -> None:
    """Write the checkpoint `trained` to `folder` as the package brings it.

    Args:
        images: some hundred training images, by which it knows what is unlike them.
    """
    model, processor = load(trained, device="cpu")
    batches = (images[begin : begin + BATCH_IMAGES] for begin in range(0, len(images), BATCH_IMAGES))
    pixels = (processor(images=list(batch), return_tensors="pt")["pixel_values"] for batch in batches)
    model.config.scope_statistics = measure_scope(model, pixels)
    # The checkpoint holds the weights itself; the folders they came from mean nothing elsewhere.
    model.config.backbone_config |= {"source": None, "revision": None}
    model.config.language_model_source = None
    with written(folder) as whole:
        model.half().save_pretrained(whole)
        processor.save_pretrained(whole)
        for code in whole.glob("*.py"):
            code.unlink()  # inside the package, the package is the code


__all__ = ["write_shipped"]
