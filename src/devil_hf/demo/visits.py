"""What one visitor looks at, and what a click changes of it: answers by the name of the piece of the page that shows them."""

import math
import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
from PIL import Image

from devil_hf.checkpoints.scope import out_of_scope
from devil_hf.demo.checkpoints import BUILT_IN, Checkpoints
from devil_hf.demo.explorer import MAX_CARRIER_LENGTH, Explorer, Look, read_phrases
from devil_hf.demo.messages import message
from devil_hf.demo.uploads import read_upload
from devil_hf.report import html
from devil_hf.report.features import feature_picture
from devil_hf.report.templates import render

FEATURE_BYTES = 2 * 2**30  # of all visits
UNREADABLE = "This click cannot be read: reload the page."
NO_MAPS = "demo/templates/no_maps.html"
Answer = dict[str, Any]  # name of a piece of the page -> what it shows now


@dataclass(frozen=True)
class Example:
    """An image to choose, RGB, and the built-in checkpoint that knows its world."""

    image: Image.Image
    checkpoint: str


@dataclass
class Session:
    """What one visitor looks at."""

    checkpoint: str
    look: Look | None  # None while its features make room for those of others
    image: Image.Image
    rows: list[dict[str, Any]]  # of the whole image
    features: dict[str, Image.Image]  # per layer, one pixel per location
    point: tuple[float, float] | None = None  # (x, y), in pixels of the image
    place: list[dict[str, Any]] | None = None  # of the places under that point
    example: int | None = None


class Visits:
    """Every answer of the page.

    Args:
        checkpoints: those that may be asked.
        examples: images to choose from.
    """

    def __init__(self, checkpoints: Checkpoints, examples: list[Example]):
        self.checkpoints = checkpoints
        self.examples = examples
        self.thumbnails = [html.data_uri(example.image) for example in examples]
        # With features in memory, the latest last. Weak: gradio bounds the visits, and a new image ends the one before.
        self._looking: WeakValueDictionary[int, Session] = WeakValueDictionary()
        self._lock = threading.Lock()

    def start(self) -> Answer:
        return self.open_example(0, self.checkpoints.default, None)

    def open_example(self, index: int, checkpoint: str, layer: str | None) -> Answer:
        """An example by the checkpoint of its world, unless the visitor looks by one that he has brought."""
        example = self.examples[index]
        checkpoint = example.checkpoint if checkpoint in BUILT_IN else checkpoint
        return self.open(example.image, checkpoint, layer, example=index)

    def open_upload(self, path: str | None, session: Session | None, layer: str | None) -> Answer:
        try:
            return self.open(read_upload(path), session.checkpoint if session else self.checkpoints.default, layer)
        except ValueError as error:
            # A message, and not an error: the drop zone must be empty again for the next try.
            gr.Warning(message(error), title="This file was not read")
            return {"upload": None}

    def load(self, session: Session, layer: str, name: str) -> Answer:
        session = _opened(session)
        self.checkpoints.get(name)
        return self.open(session.image, name, layer, session.example)

    def open(self, image: Image.Image, checkpoint: str, layer: str | None, example: int | None = None) -> Answer:
        """Everything anew for one image and checkpoint."""
        explorer = self.checkpoints.held(checkpoint)
        look = explorer.look(image)
        features = {name: feature_picture(maps[0]) for name, maps in zip(explorer.layers, look.feature_maps, strict=True)}
        session = Session(checkpoint, look, image, explorer.describe(look), features, example=example)
        if layer not in explorer.layers:
            layer = explorer.layers[max(len(explorer.layers) - 2, 0)]
        left, top, right, bottom = explorer.crop(look)
        centre = (_middle(left, right) * image.width, _middle(top, bottom) * image.height)
        choices = [(f"{name}  {'×'.join(map(str, explorer.grid(look, name)))}", name) for name in explorer.layers]
        return {
            **self.show_point(session, explorer, str(layer), *centre),
            "layer": gr.Radio(choices, value=layer),
            "sentence": html.image_html(session.rows),
            "gallery": self.gallery(example),
            "maps": render(NO_MAPS),
            "upload": None,
            "head": self.head(checkpoint, look),
        }

    def show_point(self, session: Session, explorer: Explorer, layer: str, x: float, y: float) -> Answer:
        session.place = explorer.describe_pixel(self.look(session), x, y)
        session.point = (x, y)
        return self.show_layer(session, explorer, layer)

    def show_layer(self, session: Session, explorer: Explorer, layer: str) -> Answer:
        """What changes with the layer or the point."""
        layer = explorer.check_layer(layer)
        look, rows = self.look(session), session.place or []
        row, column = next(one["location"] for one in rows if one["layer"] == layer)
        grids = {name: explorer.grid(look, name) for name in explorer.layers}
        x, y = session.point or (0, 0)
        return {
            "session": session,
            "stage": html.stage_html(look.image, explorer.crop(look), grids[layer], (row, column), layer),
            "row": row,
            "column": column,
            "place": html.place_html(rows, layer, f" · pixel {x:.0f}, {y:.0f}"),
            "features": html.features_html(session.features, session.rows, grids, layer),
        }

    def choose_layer(self, session: Session, layer: str) -> Answer:
        session = _opened(session)
        return self.show_layer(session, self.explorer(session), layer)

    def read_numbers(self, session: Session, layer: str, row: float | None, column: float | None) -> Answer:
        session = _opened(session)
        explorer = self.explorer(session)
        if not all(isinstance(one, int | float) and math.isfinite(one) for one in (row, column)):
            raise ValueError("Type a row and a column first; both start at 0.")
        point = explorer.pixel_of(self.look(session), layer, int(row or 0), int(column or 0))
        return self.show_point(session, explorer, layer, *point)

    def show_maps(self, session: Session, text: str, carrier: str) -> Answer:
        session = _opened(session)
        explorer = self.explorer(session)
        phrases = read_phrases(text)
        outputs = explorer.map_phrases(self.look(session), phrases, carrier)
        return {"maps": html.maps_html(explorer.processor, session.image, outputs, phrases)}

    def act(self, event: gr.EventData, session: Session, layer: str, carrier: str) -> Answer:
        """A click on a word, a layer, an example, a tile of features or the stage."""
        session = _opened(session)
        names = ("example", "word", "before", "layer", "at", "x", "y")
        example, word, before, chosen, at, x, y = (getattr(event, name, None) for name in names)
        if example is not None:
            index = int(_number(example)) % len(self.examples)
            return self.open_example(index, session.checkpoint, layer)
        if word is not None:
            before = before[:MAX_CARRIER_LENGTH] if isinstance(before, str) else carrier  # a word in its sentence
            return {**self.show_maps(session, word, before), "phrases": word, "carrier": before}
        explorer, look = self.explorer(session), self.look(session)
        if chosen is None:
            x, y = _number(x) * look.image.width, _number(y) * look.image.height
            return self.show_point(session, explorer, layer, x, y)
        if not at:  # a name, or a tile by keyboard
            return {**self.show_layer(session, explorer, chosen), "layer": chosen}
        rows, columns = explorer.grid(look, chosen)
        if not isinstance(at, list) or len(at) != 2:
            raise ValueError(UNREADABLE)
        x, y = (min(max(_number(share), 0.0), 0.999999) for share in at)
        point = explorer.pixel_of(look, chosen, int(y * rows), int(x * columns))
        return {**self.show_point(session, explorer, chosen, *point), "layer": chosen}

    def explorer(self, session: Session) -> Explorer:
        return self.checkpoints.held(session.checkpoint)

    def look(self, session: Session) -> Look:
        """The features of a visit, made again if they had to go; those of the oldest visits go beyond `FEATURE_BYTES`."""
        look = session.look or self.explorer(session).look(session.image)
        with self._lock:
            session.look = look
            self._looking.pop(id(session), None)
            self._looking[id(session)] = session
            held = 0
            for one in reversed(list(self._looking.values())):
                held += one.look.size if one.look else 0
                if held > FEATURE_BYTES and one is not session:
                    one.look = None
                    del self._looking[id(one)]
        return look

    def gallery(self, chosen: int | None) -> str:
        """The examples as buttons."""
        return render("demo/templates/gallery.html", sources=self.thumbnails, chosen=chosen)

    def head(self, checkpoint: str, look: Look | None = None) -> str:
        """The title of the page, with what the checkpoint says that it knows, and a warning where an image is unlike that."""
        model = self.checkpoints.held(checkpoint).model
        warning = out_of_scope(model, look.feature_maps, ["this image"]) if look else None
        return render("demo/templates/head.html", scope=model.config.scope, warning=warning)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(UNREADABLE)
    return float(value)


def _middle(start: float, end: float) -> float:
    return (max(start, 0.0) + min(end, 1.0)) / 2


def _opened(session: Session | None) -> Session:
    if session is None:
        raise ValueError("This visit has expired: reload the page.")
    return session


__all__ = ["NO_MAPS", "Session", "Visits"]
