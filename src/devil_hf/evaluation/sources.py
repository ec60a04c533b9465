"""What evaluators on images with known objects can be told of them: one set of options for all, read by `open_localised`."""

from dataclasses import dataclass
from pathlib import Path

from devil_hf.evaluation.evaluator import EvaluationSettings
from devil_hf.settings import option


@dataclass(kw_only=True)
class ObjectSettings(EvaluationSettings):
    """Images whose objects are known."""

    source: str = option(
        "shapes:COUNT[:SEED], COCO instances JSON, VOC folder, folder of YOLO labels, or Flickr30k Entities: FOLDER[:SPLIT]",
        "shapes:150",
        positional=True,
    )
    images: Path | None = option("folder of the images, where it is not the usual one", None)
    names: str | None = option("class names of YOLO labels: data.yaml, a text file, or FILE#KEY in JSON or YAML", None)


__all__ = ["ObjectSettings"]
