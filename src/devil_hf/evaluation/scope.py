"""How often images are told to be unlike those of the training (see `devil_hf.checkpoints.scope`), source by source.

* `warned`: share of the images that are farther away than 99 of 100 training images: about .01 for held-out images of the
  training's kind, 1 for images that the warning is there for.
* `distance`: the median, in standard deviations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch

from devil_hf.checkpoints.scope import distances
from devil_hf.data.images import NumberedImages, open_images
from devil_hf.data.worlds import parse_world
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import Evaluation
from devil_hf.settings import option


@dataclass(kw_only=True)
class ScopeSettings(EvaluationSettings):
    """Which images are told apart."""

    sources: list[str] = option("folders of images, Hub data sets, or shapes:COUNT", ["shapes"], positional=True)
    split: str | None = option("of caption folders and data sets", None)
    limit: int | None = option("images of each source, from the first on", 200)
    output_dir: Path = option("rows, where a stopped run goes on, and scores.json", Path("devil-scope"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources {self.sources} name one twice: leave it out")


@EVALUATORS.register("scope")
class ScopeEvaluator(Evaluator):
    """Distances from the training images."""

    name = "scope"
    summary = "measure how often images are told to be unlike those of the training"
    example = "devil evaluate scope CHECKPOINT photos/ shapes:200"
    Settings = ScopeSettings

    def open(self) -> list[str]:
        """Every image of every source."""
        self.images: dict[str, tuple[NumberedImages, int]] = {}
        self.source_of: dict[str, str] = {}
        for source in self.settings.sources:
            split = None if parse_world(source) else self.settings.split
            images = open_images(source, split, limit=self.settings.limit)
            if not isinstance(images, NumberedImages):
                raise ValueError(f"{source} is a stream, which has no images by number: name a folder of some of its images")
            for number in images.numbers:
                key = f"{source} {images.key(number)}"
                self.images[key], self.source_of[key] = (images, number), source
        return list(self.images)

    def identity(self, key: str) -> str | None:
        """Hash of the image; None for a scene, whose name says it."""
        images, number = self.images[key]
        return None if images.hashes is None else images.hashes([number])[0]

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[float | None]:
        """Per image its distance; None for a bad one."""
        pictures = [images.picture(number) for images, number in (self.images[key] for key in keys)]
        good = [picture for picture in pictures if picture is not None]
        far = iter(self._distances(good) if good else [])
        return [None if picture is None else next(far) for picture in pictures]

    def _distances(self, pictures: list[Any]) -> list[float]:
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.model.device)
        found = distances(self.model, cast(list[torch.Tensor], self.model.extract_features(pixels)))
        if found is None:
            raise ValueError(f"{self.settings.checkpoint} has no scope_statistics: nothing says how far its images lie")
        return found.tolist()

    def score(self, rows: Mapping[str, float | None]) -> Evaluation:
        """Shares and medians by source."""
        most = float(cast(dict, self.model.config.scope_statistics)["most"])
        scores, sizes, bad = {}, {}, 0
        for source in self.settings.sources:
            found = [value for key, value in rows.items() if self.source_of[key] == source and value is not None]
            bad += sum(value is None for key, value in rows.items() if self.source_of[key] == source)
            sizes[source] = len(found)
            if found:
                scores[source] = {"warned": fmean(value > most for value in found), "distance": median(found)}
        dataset = {"name": ", ".join(self.settings.sources), "split": self.settings.split, "size": sum(sizes.values())}
        settings = {"most": most, "sizes": sizes, "bad": bad}
        return Evaluation("Images unlike those of the training", scores, dataset=dataset, settings=settings)
