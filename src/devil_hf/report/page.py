"""`devil report page`: sentences about many images, where each word comes from, and controls, on one page that opens from disk.

A row per image, made by the driver of evaluations (records that a stopped run goes on from, progress, several processes) and
shown as it is: what all layers together say, word by word (`explain_words`), what each layer says alone, and a small picture.
What they add up to is in `scores.json` and at the top of the page (`page_figures.py`).

Places are asked one by one in the layers that have at most `--map-places` of them. Maps are kept as bytes, 127 for the strongest
value of a sentence, on a grid of at most 16 to a side (fewer where
a sentence has more than 12 words), and drawn by the page.

The control is the same sentence with the features of other images: of `--others` of the source, evenly spread, without the image
itself.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from devil_hf.data.identity import combined
from devil_hf.data.images import ImageStream, NumberedImages, open_images
from devil_hf.evaluation.evaluator import FIGURES, EvaluationSettings, Evaluator
from devil_hf.evaluation.results import Evaluation
from devil_hf.evaluation.units.labels import null_label
from devil_hf.folders import written
from devil_hf.model.explaining_devil import INFORMED
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.questions.word_evidence import MOST_TILES, SentenceEvidence, explain_words
from devil_hf.report.html import data_uri
from devil_hf.report.page_figures import add_up, page_html, page_text
from devil_hf.report.places import crop_box
from devil_hf.settings import option, read_layers

logger = logging.get_logger(f"transformers.{__name__}")

PAGE = "index.html"
THUMBNAIL, QUALITY = 208, 60  # pixels of the longer side, and of WEBP
MOST_VALUES = 3_200  # of the maps of a sentence; longer ones have coarser maps
LARGE = 30_000_000  # bytes of a page that is slow to open
FULL = 127  # the byte of the strongest value of a sentence's maps


@dataclass(kw_only=True)
class PageSettings(EvaluationSettings):
    """What `devil report page` shows."""

    images: str = option("folder of images, caption folder, Hub data set, or shapes:COUNT[:SEED]", positional=True)
    split: str | None = option("of a caption folder or a data set", None)
    column: str = option("of the images in a data set", "image")
    limit: int | None = option("only this many images from the beginning", 1000)
    layers: list[str] | None = option("names or indices of layers (default: every one)", None)
    map_places: int = option("layers with more places are not asked place by place, but for the coarsest", 256, least=1)
    others: int = option("images of the source whose features are the control; 0 for no control", 20, least=0)
    max_new_tokens: int = option("at most so many tokens", 30, least=1)
    batch_size: int = option("images at once, per process", 8)
    output_dir: Path = option("index.html, scores.json, and rows, where a stopped run goes on", Path("devil-report"))


class Page(Evaluator):
    """Rows of the page, and what they add up to."""

    name, verb = "page", "report"
    summary = "write one page of sentences, where their words come from, and controls"
    example = "devil report page CHECKPOINT photos"
    Settings = PageSettings

    def open(self) -> Sequence[str] | Iterator[str]:
        """Numbers of the images."""
        settings = self.settings
        self.images = open_images(settings.images, settings.split, settings.column)
        self._reading: Iterator[tuple[int, Any]] | None = None
        if isinstance(self.images, NumberedImages):
            return [str(number) for number in self.images.numbers[: settings.limit]]
        return map(str, islice(count(), settings.limit))

    def prepare(self) -> None:
        """The layers, and the prefixes of the other images."""
        settings, names = self.settings, self.model.layer_names
        visible = resolve_layers(read_layers(settings.layers, names), names)
        self.layers = [names[index] for index in visible]
        self.others, self.prefixes = _other_images(self.images, settings.others), []
        with torch.no_grad():
            for _, picture in self.others:
                inputs = self.processor(images=picture, return_tensors="pt")
                self.prefixes.append(self.model.ask(**inputs, layers=self.layers).cpu())

    def decides(self) -> dict[str, Any]:
        """Images and layers, how maps are combined, and what else is asked."""
        asked = {name: getattr(self.settings, name) for name in ("split", "column", "map_places", "max_new_tokens")}
        others = [str(number) for number, _ in self.others]
        if isinstance(self.images, NumberedImages) and self.images.hashes is not None:
            others = list(self.images.hashes([number for number, _ in self.others]))
        return {"images": self.images.name, "layers": self.layers, "others": combined(others), "informed": INFORMED, **asked}

    def identity(self, key: str) -> str | None:
        """Of the image."""
        if not isinstance(self.images, NumberedImages) or self.images.hashes is None:
            return None
        return self.images.hashes([int(key)])[0]

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[dict[str, Any] | None]:
        """What the page shows of each image; None for a broken one."""
        pictures = dict(self._pictures([int(key) for key in keys]))
        good = [number for number, picture in pictures.items() if picture is not None]
        made: dict[int, dict[str, Any]] = {}
        if good:
            pixels = self.processor(images=[pictures[number] for number in good], return_tensors="pt")["pixel_values"]
            features = self.model.extract_features(pixels, self.layers)
            made = dict(zip(good, self._rows([pictures[number] for number in good], good, features), strict=True))
        return [made.get(int(key)) for key in keys if int(key) in pictures]

    def _pictures(self, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        if isinstance(self.images, NumberedImages):
            yield from ((number, self.images.picture(number)) for number in numbers)
            return
        self._reading = self._reading or self.images.stream()  # once through, whatever of it is known already
        for number, picture in self._reading:
            if number in numbers:
                yield number, picture
            if number >= max(numbers):
                return

    def _rows(self, pictures: Sequence[Image.Image], numbers: Sequence[int], features: list[Tensor | None]) -> list[dict]:
        options = {"max_new_tokens": self.settings.max_new_tokens, "num_beams": 1, "do_sample": False}
        sequences = self.model.generate(layers=self.layers, feature_maps=features, **options)
        sentences = [text.strip() for text in self.processor.batch_decode(sequences, skip_special_tokens=True)]
        alone = self.model.describe(layers=self.layers, feature_maps=features, evidence=True, **options)
        by_layer: list[list[dict]] = [[] for _ in pictures]
        for row in self.processor.post_process_descriptions(alone):
            words = [[word, round(nats, 2)] for word, nats in row["words"]]
            by_layer[row["image"]].append({"layer": row["layer"], "words": words})
        rows = []
        for at, (picture, sentence) in enumerate(zip(pictures, sentences, strict=True)):
            own = [None if maps is None else maps[at : at + 1] for maps in features]
            shown = self._shown(picture, self.images.key(numbers[at]) if isinstance(self.images, NumberedImages) else "")
            row = {**shown, "text": sentence, "layers": by_layer[at], "words": []}
            rows.append(row | (self._explained(sentence, own, numbers[at]) if sentence else {}))
        return rows

    def _shown(self, picture: Image.Image, key: str) -> dict[str, Any]:
        """A small picture, and where in it the crop is that the backbone sees: left, top, width and height as shares."""
        small = picture.convert("RGB")
        left, top, right, bottom = crop_box(self.processor.image_processor.geometry((small.height, small.width)))
        box = [left / small.width, top / small.height, (right - left) / small.width, (bottom - top) / small.height]
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        place = {"key": key, "crop": [round(share, 4) for share in box], "size": list(small.size)}
        return place | {"picture": data_uri(small, quality=QUALITY)}

    def _explained(self, sentence: str, features: list[Tensor | None], number: int) -> dict[str, Any]:
        grids = {
            name: maps.shape[-2:].numel() for name, maps in zip(self.model.layer_names, features, strict=True) if maps is not None
        }
        mapped = [name for name, places in grids.items() if places <= self.settings.map_places] or [
            min(grids, key=grids.__getitem__)
        ]
        prefixes = [one for (other, _), one in zip(self.others, self.prefixes, strict=True) if other != number]
        others = torch.cat(prefixes) if prefixes else None
        asked: dict[str, Any] = {"layers": self.layers, "mapped": mapped, "others": others, "feature_maps": features}
        try:
            (found,) = explain_words(self.model, self.processor, sentences=[sentence], **asked)
        except ValueError as error:  # of a text that is longer, or nothing, when it is read again as tokens
            logger.warning(f"image {number}: the words of {sentence!r:.100} are not explained: {error}")
            return {}
        return _as_row(found, self.layers)

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See `page_figures.add_up`."""
        self.shown = [row for row in rows.values() if row is not None]
        if not self.shown:
            raise ValueError(f"{self.images.name}: none of {len(rows)} images can be read")
        evaluation = add_up(self.shown, self.layers, self.settings.seed)
        source, name = Path(self.settings.images), self.images.name
        if source.exists():  # whoever gets the page need not know where the folder is
            name = name.replace(str(source), source.resolve().name, 1)
        evaluation.dataset = {"name": name, "size": len(self.shown)}
        evaluation.settings = {"decoding": "greedy", "layers": ", ".join(self.layers), "others": len(self.others)}
        evaluation.details |= {"left_out": len(rows) - len(self.shown)}
        evaluation.details["null_text"] = null_label(self.model, self.processor, self.settings.max_new_tokens)
        return evaluation

    def text(self, evaluation: Evaluation) -> str:
        """The table, and the words of most and of least evidence."""
        return page_text(evaluation, super().text(evaluation))


def _other_images(images: ImageStream, wanted: int) -> list[tuple[int, Any]]:
    """(number, picture) of images evenly spread over the source; of a stream, the first."""
    if not isinstance(images, NumberedImages):
        found = islice(images.stream(), wanted)
    else:
        places = np.unique(np.linspace(0, len(images.numbers) - 1, min(wanted, len(images.numbers))).round().astype(int))
        numbers = [images.numbers[at] for at in places]
        found = ((number, images.picture(number)) for number in numbers)  # type: ignore[assignment]
    return [(number, picture) for number, picture in found if picture is not None]


def _as_row(found: SentenceEvidence, layers: Sequence[str]) -> dict[str, Any]:
    words = [
        {
            "text": word.text,
            "evidence": round(word.evidence, 3),
            "alone": [round(word.alone[layer], 3) for layer in layers],
            "lost": [round(word.lost[layer], 3) for layer in layers],
        }
        for word in found.words
    ]
    maps = {name: packed(values[0]) for name, values in found.maps.maps.items()}
    judged = (
        {}
        if found.p_value is None
        else {
            "p": round(found.p_value, 4),
            "permutations": found.permutations,
            "elsewhere": round(float(found.elsewhere or 0), 3),
        }
    )
    return {"words": words, "maps": maps, **judged}


def packed(maps: Tensor) -> dict[str, Any]:
    """Maps (words, H, W) as bytes: `bytes` (base64, signed), of `peak` nats at 127, words x `rows` x `columns`."""
    rows, columns = maps.shape[-2:]
    most = min(MOST_TILES, int((MOST_VALUES / len(maps)) ** 0.5) or 1)
    if max(rows, columns) > most:
        size = [max(round(edge * most / max(rows, columns)), 1) for edge in (rows, columns)]
        maps = F.interpolate(maps[:, None].float(), size, mode="area")[:, 0]
        rows, columns = size
    peak = max(float(maps.abs().max()), 1e-9)
    values = (maps / peak * FULL).round().to(torch.int8).cpu().numpy()
    return {"rows": rows, "columns": columns, "peak": float(f"{peak:.3g}"), "bytes": base64.b64encode(values.tobytes()).decode()}


@FIGURES.register(Page.name)
def write_page(run: Page, evaluation: Evaluation) -> None:
    """Write the page of a run into its folder."""
    with written(Path(run.settings.output_dir) / PAGE) as unfinished:
        text = page_html(run.model, evaluation, run.shown, run.layers).encode()
        if len(text) > LARGE:
            logger.warning(f"the page has {len(text) / 1e6:.0f} MB and may be slow to open: write one of fewer images (--limit)")
        unfinished.write_bytes(text)


__all__ = ["PAGE", "Page", "PageSettings", "packed", "write_page"]
