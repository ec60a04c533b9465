"""The page: its pieces, how they are laid out, and which answer a click asks for."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import gradio as gr

from devil_hf.demo.messages import told
from devil_hf.demo.uploads import MAX_BYTES, MAX_PIXELS
from devil_hf.demo.visits import NO_MAPS, Visits
from devil_hf.report.templates import render

SESSION_SECONDS = 3600
# The pieces that answers may change.
CHANGING = (
    *("session", "layer", "stage", "row", "column", "place", "sentence", "features"),
    *("gallery", "maps", "phrases", "carrier", "upload", "head"),
)
PICKER = "A built-in checkpoint, or the Hub id of a DeViL, such as user/devil-resnet50-opt125m"
SCROLL_TO_MAPS = "() => document.getElementById('dv-maps').scrollIntoView({ behavior: 'smooth', block: 'nearest' })"


@contextmanager
def card(title: str, text: str = "") -> Iterator[None]:
    """A framed part of the page under a title."""
    with gr.Column(elem_classes="dv-card"):
        gr.HTML(render("demo/templates/title.html", title=title, text=text))
        yield


def piece(name: str, value: str = "") -> gr.HTML:
    """A part of the page whose clicks come to `Visits.act`."""
    script = files("devil_hf.demo").joinpath("page.js").read_text(encoding="utf-8")
    return gr.HTML(value, elem_id=name, js_on_load=script, apply_default_css=False)


class Page:
    """What a visitor sees.

    Args:
        visits: what answers.
        queue: how the answers share the machine, as gradio's events take it.
    """

    def __init__(self, visits: Visits, queue: dict[str, Any]):
        self.visits = visits
        self.queue = queue

    def build(self, demo: gr.Blocks) -> None:
        """Lay the page out, within the blocks that are being built."""
        self.session = gr.State(None, time_to_live=SESSION_SECONDS)
        self.head = gr.HTML(self.visits.head(self.visits.checkpoints.default))
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.build_choice()
            with gr.Column(scale=6, min_width=320):
                with card(
                    "What this place says",
                    "Tinted words owe more to the features. Click one for its map, after the words before it.",
                ):
                    self.place = piece("dv-place")
                with card("What the whole image says"):
                    self.sentence = piece("dv-sentence")
        self.build_maps()
        with card("The feature grid of each layer", "Like colours, like features. Click a tile to read there."):
            self.features = piece("dv-features")
        with gr.Accordion("Another checkpoint", open=False, visible=self.visits.checkpoints.picker):
            self.build_picker()
        with gr.Accordion("How to read this, and how not to", open=False):
            gr.HTML(render("demo/templates/help.html"))
        self.listen(demo)

    def build_choice(self) -> None:
        """The image, and the place in it that is asked."""
        limits = f"up to {MAX_BYTES >> 20} MB and {MAX_PIXELS // 1_000_000} million pixels"
        with card("1 · Choose an image", f"A photograph, a rendered scene, or a picture of yours ({limits})."):
            self.gallery = piece("dv-gallery")
            self.upload = gr.File(
                label="Image to look at", show_label=False, file_types=["image"], height=104, elem_id="dv-upload"
            )
        with card("2 · Click anywhere", "or move by arrow keys, or type a row and a column."):
            self.layer = gr.Radio([], label="Layer", elem_id="dv-layer", container=False)
            self.stage = piece("dv-stage")
            with gr.Row():
                self.row = gr.Number(0, label="Row", precision=0, minimum=0, min_width=70)
                self.column = gr.Number(0, label="Column", precision=0, minimum=0, min_width=70)
                self.read = gr.Button("Read this place", min_width=110, elem_id="dv-read")

    def build_maps(self) -> None:
        """Phrases, and where they are."""
        with card("3 · Where is it? Maps of words on every layer", "Any words, one colour scale for all the maps."):
            with gr.Row(equal_height=True):
                self.phrases = gr.Textbox(
                    label="Words or phrases, commas between",
                    placeholder="a cat, a cup, red, striped",
                    scale=5,
                    min_width=220,
                    max_lines=2,
                    elem_id="dv-phrases",
                )
                self.carrier = gr.Textbox("the", label="Words before", scale=1, min_width=90, max_lines=1)
                self.map_button = gr.Button("Show maps", variant="primary", scale=1, min_width=120, elem_id="dv-map")
            self.maps = piece("dv-maps", render(NO_MAPS))

    def build_picker(self) -> None:
        """Another checkpoint by its Hub id."""
        checkpoints = self.visits.checkpoints
        self.model = gr.Dropdown(
            [*checkpoints.own, *(checkpoints.listed or [])],
            value=checkpoints.default,
            allow_custom_value=checkpoints.listed is None,
            label=PICKER,
        )
        self.load_button = gr.Button("Load this checkpoint")

    def listen(self, demo: gr.Blocks) -> None:
        """Which answer each click asks for."""
        visits, layer, session = self.visits, self.layer, self.session
        self.on(demo.load, visits.start, None)
        self.on(self.upload.upload, visits.open_upload, [self.upload, session, layer])
        self.on(layer.input, visits.choose_layer, [session, layer])
        places = [self.read.click, self.row.submit, self.column.submit]
        self.on(places, visits.read_numbers, [session, layer, self.row, self.column])
        phrases = [self.map_button.click, self.phrases.submit, self.carrier.submit]
        self.on(phrases, visits.show_maps, [session, self.phrases, self.carrier], show_progress_on=[self.maps])
        for clicked in (self.gallery, self.stage, self.place, self.sentence, self.features):
            event = self.on(clicked.select, visits.act, [session, layer, self.carrier])
            if clicked in (self.place, self.sentence):
                event.success(None, None, None, js=SCROLL_TO_MAPS, api_visibility="private")
        # In a queue of its own: answers do not wait for a download.
        loads = {"concurrency_limit": 1, "concurrency_id": "load"}
        self.on(self.load_button.click, visits.load, [session, layer, self.model], show_progress_on=[self.model], **loads)

    def on(self, triggers: Any, answer: Callable, asked: list[Any] | None, **settings: Any) -> Any:
        """Let an answer, which names pieces of the page, change these."""

        @functools.wraps(answer)
        def answering(*args: Any, **kwargs: Any) -> dict[Any, Any]:
            return {getattr(self, name): value for name, value in answer(*args, **kwargs).items()}

        shown = [getattr(self, name) for name in CHANGING]
        usual = {"api_visibility": "private", "show_progress": "minimal", "show_progress_on": [self.place]}
        return gr.on(triggers, told(answering), asked, shown, **{**usual, **self.queue, **settings})


__all__ = ["Page"]
