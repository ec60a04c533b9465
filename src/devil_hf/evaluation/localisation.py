"""`devil evaluate maps`: attribution maps against masks and boxes; `maps/` has its parts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devil_hf.data.identity import combined, image_identity, region_identity
from devil_hf.data.objects import LocalisedImage, open_localised
from devil_hf.data.worlds import parse_world
from devil_hf.evaluation.evaluator import EVALUATORS, Evaluator
from devil_hf.evaluation.maps.collecting import (
    CENTRE,
    GRADCAM,
    Board,
    MapSettings,
    asked_layers,
    decisions,
    draw_boards,
    map_board,
    map_image,
)
from devil_hf.evaluation.maps.gradcam import ClassMapper, read_class_names
from devil_hf.evaluation.maps.scores import RANDOM_ORDER, as_table, beside, known_heads, maps_text, named_in_captions, score_maps
from devil_hf.evaluation.results import CHANCE, Evaluation
from devil_hf.evaluation.sources import ObjectSettings
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.settings import option, read_layers, read_windows


@dataclass(kw_only=True)
class MapsSettings(ObjectSettings):
    """Localised phrases, and how they are mapped."""

    layers: list[str] | None = option("names or indices of layers (default: every one)", None)
    carrier: str = option('neutral word read before each phrase; "" for none', "the")
    windows: list[str] = option(
        "pool the square of this odd side around each place of a layer, where its own grid is finer than what it knows; "
        "an index below zero needs the form --windows=-1=3",
        [],
        metavar="LAYER=SIDE",
    )
    joint: bool = option("also maps of all layers asked together", True)
    boards: int = option("of 2, 3 and 4 images, for the multi-object game", 40)
    captions: list[str] = option(
        "captions of the training: class names that fewer than --seen of their images name are reported apart",
        [],
        metavar="FOLDER:SPLIT",
    )
    seen: int = option("of the training's images must name a class that counts as known", 10)
    unseen: list[str] = option(
        "regions of the training, as SOURCE has them: phrases whose head word none of theirs has are reported apart",
        [],
        metavar="SOURCE",
    )
    gradcam: bool = option("also Grad-CAM of the backbone's classifier", False)
    class_names: Path | None = option("of that classifier, one a line (default: ImageNet's)", None)
    batch_size: int = option("images between two records, per process; each is mapped alone", 1)
    seed: int = option("of boards, random orders and intervals", 0)
    output_dir: Path = option("maps, records, scores.json and maps.png; goes on where it stopped", Path("devil-maps"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        for name, least in (("boards", 0), ("seen", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}")
        if self.class_names and not self.gradcam:
            raise ValueError(
                f"--class-names {self.class_names} are of the classifier that --gradcam asks: add it, or leave them out"
            )


@EVALUATORS.register("maps")
class MapsEvaluator(Evaluator):
    """Attribution maps of single layers and of combinations, against masks and boxes."""

    name = "maps"
    summary = "score attribution maps against masks and boxes"
    example = "devil evaluate maps CHECKPOINT coco/annotations/instances_val2017.json --carrier a --limit 500"
    Settings = MapsSettings

    def open(self) -> list[str]:
        """The keys of the images, then those of the boards that are drawn from them."""
        settings = self.settings
        self.examples = list(open_localised(settings.source, settings.images, settings.names)[: settings.limit])
        self.boards = {board.key: board for board in draw_boards(self.examples, settings.boards, settings.seed)}
        self.seen: set[str] | None = None
        if settings.captions:
            names = {phrase for one in self.examples for phrase in one.groups}
            self.seen = named_in_captions(names, settings.captions, settings.seen)
        self.heads = known_heads(settings.unseen) if settings.unseen else None
        self.by_key: dict[str, LocalisedImage | Board] = {one.key: one for one in self.examples}
        self.by_key |= self.boards
        return list(self.by_key)

    def prepare(self) -> None:
        """Layers, windows and classes, which must be the model's."""
        settings, known = self.settings, self.model.layer_names
        layers = tuple(read_layers(settings.layers, known) or ())
        asked = [known[index] for index in resolve_layers(list(layers) or None, list(known))]
        self.windows = read_windows(settings.windows, asked, known)
        self.asked = MapSettings(layers, settings.carrier or None, settings.joint, settings.seed, self.windows)
        asked_layers(self.model, self.asked)
        self.classes = None
        if settings.gradcam:
            names = read_class_names(settings.class_names) if settings.class_names else None
            self.classes = ClassMapper(self.model, names)

    def decides(self) -> dict[str, Any]:
        """The data by name, and how maps are made."""
        settings = self.settings
        source = {name: str(value) for name in ("images", "names") if (value := getattr(settings, name))}
        return {"source": settings.source, **source, **decisions(self.model, self.asked, self.classes)}

    def identity(self, key: str) -> str | None:
        """Of the images, their objects, and the content of mask files; scenes are known by their names."""
        if parse_world(self.settings.source):
            return None
        one = self.by_key[key]
        members, masks = one.members if isinstance(one, Board) else [one], dict[str, str]()
        shown = [[phrase, region_identity(each.region(phrase), masks)] for each in members for phrase in each.parts]
        asked = json.dumps([*(each.groups for each in members), shown])
        return combined([*(image_identity(each.read()) for each in members), asked])

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """One image or board after the other: their phrases are the batch."""
        folder, found = Path(self.settings.output_dir), []
        for key in keys:
            one = self.by_key[key]
            if isinstance(one, Board):
                found.append(map_board(self.model, self.processor, one, folder, self.asked))
            else:
                found.append(map_image(self.model, self.processor, one, folder, self.asked, self.classes))
        return found

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See `score_maps`."""
        settings, folder = self.settings, Path(self.settings.output_dir)
        self.recorded = rows
        self.content = score_maps(rows, folder, self.seen, self.heads, seed=settings.seed)
        world = parse_world(settings.source)
        noted: dict[str, Any] = {"carrier": settings.carrier, "seed": settings.seed, "images": len(self.examples)}
        noted |= {"windows": self.windows} if self.windows else {}
        noted |= {"unseen": settings.unseen} if settings.unseen else {}
        bad = sum("problem" in row for row in rows.values() if "board" not in row)
        noted |= {"bad_images": bad} if bad else {}
        scores = as_table(self.content)
        baselines = {name: scores.pop(name) for name in (CENTRE, GRADCAM, RANDOM_ORDER) if name in scores}
        return Evaluation(
            title="Attribution maps",
            controls={CHANCE: scores.pop(CHANCE)},
            scores=scores,
            dataset={"name": world.label if world else settings.source, "size": self.content["images"]},
            settings=noted | {"tolerance": "half a cell of a map's own grid, chance that of the finest"},
            details={
                "baselines": baselines,
                **{name: self.content[name] for name in ("intervals", "board_intervals", "counts", "over_centre")},
                **beside(self.content),
            },
        )

    def text(self, evaluation: Evaluation) -> str:
        """A table per group of phrases, then the multi-object game."""
        return maps_text(self.content)


__all__ = ["MapsEvaluator", "MapsSettings"]
