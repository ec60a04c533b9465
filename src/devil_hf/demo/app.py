"""The page: how it is laid out, and what a click asks of the explorer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import gradio as gr
from PIL import Image
from transformers.utils import logging

from devil_hf.data.shapes import make_scene
from devil_hf.demo.checkpoints import Checkpoints
from devil_hf.demo.explorer import Explorer, Look, read_phrases
from devil_hf.demo.uploads import MAX_BYTES, MAX_PIXELS, read_upload, refuse_addresses
from devil_hf.report import html
from devil_hf.report.features import feature_picture
from devil_hf.report.figures import attribution_figure

logger = logging.get_logger(f"transformers.{__name__}")

EXAMPLE_SEED, EXAMPLES = 123, (0, 1, 2, 3, 4, 5)
# All answers share one queue: more at once would only make each slower.
ANSWERS: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "model"}
QUEUE_SIZE = 100  # who comes when so many wait is told to come back
SESSIONS, SESSION_SECONDS = 100, 3600
NO_MAPS = '<p class="dv-empty">Click a word of any answer, or type phrases.</p>'
PAPER = "https://arxiv.org/abs/2309.01617"

HELP = """
<div class="dv-help"><ul>
<li>A small <em>translator</em> turns features of the frozen network into a prefix, which a frozen language model reads.</li>
<li><b>A fluent sentence proves nothing.</b> The language model would have said something anyway. The tint of a word is its
evidence: log p(word | feature) − log p(word | nothing), in nats. Untinted words are the language model's own.</li>
<li>Features of deep layers have seen far beyond their cell of the grid; their maps point less exactly than those of middle
layers.</li>
<li>Colours of a feature grid are its three main directions: like colours mean like features, within one layer and image.</li>
<li>A map is about the translator's reading of a feature, not about what a classifier on top would do with it.</li>
</ul></div>
"""
HEAD = f"""
<header class="dv-head"><h1>What does a vision network see?</h1>
<p>Ask any layer, at any place. It answers in words, and shows how much of each word came from its features.
Method: <a href="{PAPER}">DeViL, GCPR 2023</a></p></header>
"""
TRUST = (
    "Weights come as safetensors, and this demo answers with its own code. Some repositories bring code of their own; it would "
    "run on this machine, with all its rights. It never runs unless you tick this."
)


@dataclass
class Session:
    """What one visitor looks at."""

    checkpoint: str
    trust: bool
    look: Look
    rows: list[dict[str, Any]]  # of the whole image
    features: dict[str, Image.Image]  # per layer, one pixel per location
    point: tuple[float, float] | None = None  # (x, y), in pixels of the image
    place: list[dict[str, Any]] | None = None  # of the places under that point
    example: int | None = None


def told(answer: Callable) -> Callable:
    """Errors as messages: ours word for word, others in general words to the visitor and in full to the log."""

    @functools.wraps(answer)
    def answering(*args: Any, **kwargs: Any) -> Any:
        try:
            return answer(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(str(error), title="This did not work", print_exception=False) from error
        except gr.Error:
            raise
        except Exception as error:
            logger.exception("the demo failed")
            raise gr.Error("The demo failed at this; the log says why.", print_exception=False) from error

    return answering


def build_demo(checkpoints: Checkpoints) -> gr.Blocks:
    """The app, not yet launched. Loads the default checkpoint, so that the first visitor does not wait for it."""
    checkpoints.get(checkpoints.default)
    examples = [Image.fromarray(make_scene(EXAMPLE_SEED, index).image) for index in EXAMPLES]
    with gr.Blocks(
        title="devil-hf: what does a vision network see?", analytics_enabled=False, delete_cache=(600, 3600)
    ) as demo:
        _Page(checkpoints, examples).build(demo)
    refuse_addresses(demo)
    return demo


class _Page:
    def __init__(self, checkpoints: Checkpoints, examples: list[Image.Image]):
        self.checkpoints = checkpoints
        self.examples = examples
        self.thumbnails = [html.data_uri(example) for example in examples]

    # ------------------------------------------------------------------------------------------------------- layout

    def build(self, demo: gr.Blocks) -> None:
        self.session = gr.State(None, time_to_live=SESSION_SECONDS)
        self.head = gr.HTML(self.head_html(self.checkpoints.default))
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                with gr.Column(elem_classes="dv-card"):
                    limits = f"up to {MAX_BYTES >> 20} MB and {MAX_PIXELS // 1_000_000} million pixels"
                    gr.HTML(_title("1 · Choose an image", f"A rendered scene, or a picture of yours ({limits})."))
                    self.gallery = self.piece("dv-gallery")
                    self.upload = gr.File(
                        label="Image to look at",
                        show_label=False,
                        file_types=["image"],
                        height=104,
                        elem_id="dv-upload",
                    )
                with gr.Column(elem_classes="dv-card"):
                    gr.HTML(_title("2 · Click anywhere", "or move by arrow keys, or type a row and a column."))
                    self.layer = gr.Radio([], label="Layer", elem_id="dv-layer", container=False)
                    self.stage = self.piece("dv-stage")
                    with gr.Row():
                        self.row = gr.Number(0, label="Row", precision=0, minimum=0, min_width=70)
                        self.column = gr.Number(0, label="Column", precision=0, minimum=0, min_width=70)
                        self.read = gr.Button("Read this place", min_width=110, elem_id="dv-read")
            with gr.Column(scale=6, min_width=320):
                with gr.Column(elem_classes="dv-card"):
                    gr.HTML(
                        _title(
                            "What this place says", "Tinted words owe more to the features. Click one to see its map."
                        )
                    )
                    self.place = self.piece("dv-place")
                with gr.Column(elem_classes="dv-card"):
                    gr.HTML(_title("What the whole image says", ""))
                    self.sentence = self.piece("dv-sentence")
        with gr.Column(elem_classes="dv-card"):
            gr.HTML(
                _title("3 · Where is it? Maps of words on every layer", "Any words, one colour scale for all the maps.")
            )
            with gr.Row(equal_height=True):
                self.phrases = gr.Textbox(
                    label="Words or phrases, commas between", placeholder="red, star, striped", scale=5, min_width=220,
                    max_lines=2, elem_id="dv-phrases",
                )  # fmt: skip
                self.carrier = gr.Textbox("the", label="Neutral word before", scale=1, min_width=90, max_lines=1)
                self.map_button = gr.Button("Show maps", variant="primary", scale=1, min_width=120, elem_id="dv-map")
            self.maps = self.piece("dv-maps", NO_MAPS)
        with gr.Column(elem_classes="dv-card"):
            gr.HTML(
                _title("The feature grid of each layer", "Like colours, like features. Click a tile to read there.")
            )
            self.features = self.piece("dv-features")
        with gr.Accordion("Another checkpoint", open=False, visible=self.checkpoints.picker):
            self.build_picker()
        with gr.Accordion("How to read this, and how not to", open=False):
            gr.HTML(HELP)
        self.listen(demo)
        self.build_endpoints()

    def build_picker(self) -> None:
        listed = self.checkpoints.listed
        self.model = gr.Dropdown(
            [self.checkpoints.default, *(listed or [])],
            value=self.checkpoints.default,
            allow_custom_value=listed is None,
            label="Hub id of a DeViL checkpoint, such as user/devil-resnet50-opt125m",
        )
        tickable = not self.checkpoints.public or bool(listed)
        self.trust = gr.Checkbox(
            False, label="I trust this repository and let its code run", info=TRUST, visible=tickable
        )
        self.load_button = gr.Button("Load this checkpoint")

    @staticmethod
    def piece(name: str, value: str = "") -> gr.HTML:
        """A part of the page whose clicks come to `act`."""
        script = files("devil_hf.demo").joinpath("page.js").read_text(encoding="utf-8")
        return gr.HTML(value, elem_id=name, js_on_load=script, apply_default_css=False)

    def head_html(self, checkpoint: str, trust: bool = False) -> str:
        scope = self.checkpoints.get(checkpoint, trust).model.config.scope
        note = f'<p class="dv-scope" role="note"><b>What this model knows.</b> {escape(scope)}</p>' if scope else ""
        return f"{HEAD}{note}"

    # ------------------------------------------------------------------------------------------------------- events

    def listen(self, demo: gr.Blocks) -> None:
        shown = [self.session, self.layer, self.stage, self.row, self.column, self.place, self.sentence, self.features]
        shown += [self.gallery, self.maps, self.phrases, self.upload, self.head]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal", **ANSWERS}
        demo.load(told(self.start), None, shown, **hidden)
        self.upload.upload(told(self.open_upload), [self.upload, self.session, self.layer], shown, **hidden)
        self.layer.input(told(self.choose_layer), [self.session, self.layer], shown, **hidden)
        gr.on(
            [self.read.click, self.row.submit, self.column.submit],
            told(self.read_numbers), [self.session, self.layer, self.row, self.column], shown, **hidden,
        )  # fmt: skip
        gr.on(
            [self.map_button.click, self.phrases.submit, self.carrier.submit],
            told(self.show_maps), [self.session, self.phrases, self.carrier], shown, **hidden,
        )  # fmt: skip
        for piece in (self.gallery, self.stage, self.place, self.sentence, self.features):
            asked = [self.session, self.layer, self.carrier]
            event = piece.select(told(self.act), asked, shown, show_progress_on=[self.place], **hidden)
            if piece in (self.place, self.sentence):
                event.success(None, None, None, js=SCROLL_TO_MAPS, api_visibility="private")
        self.load_button.click(told(self.load), [self.session, self.layer, self.model, self.trust], shown, **hidden)

    def start(self) -> dict:
        return self.open(self.examples[0], self.checkpoints.default, False, None, example=0)

    def open_upload(self, path: str, session: Session | None, layer: str) -> dict:
        checkpoint, trust = (session.checkpoint, session.trust) if session else (self.checkpoints.default, False)
        try:
            return self.open(read_upload(path), checkpoint, trust, layer)
        except ValueError as error:
            # A message, and not an error: the drop zone must be empty again for the next try.
            gr.Warning(str(error), title="This file was not read")
            return {self.upload: None}

    def load(self, session: Session, layer: str, name: str, trust: bool) -> dict:
        look = _opened(session).look
        return self.open(look.image, name, bool(trust), layer, session.example)

    def open(
        self, image: Image.Image, checkpoint: str, trust: bool, layer: str | None, example: int | None = None
    ) -> dict:
        """Everything anew for one image and checkpoint."""
        explorer = self.checkpoints.get(checkpoint, trust)
        look = explorer.look(image)
        features = {
            name: feature_picture(maps[0]) for name, maps in zip(explorer.layers, look.feature_maps, strict=True)
        }
        session = Session(checkpoint, trust, look, explorer.describe(look), features, example=example)
        if layer not in explorer.layers:
            layer = explorer.layers[max(len(explorer.layers) - 2, 0)]
        left, top, right, bottom = explorer.crop(look)
        centre = (_middle(left, right) * image.width, _middle(top, bottom) * image.height)
        choices = [(f"{name}  {'×'.join(map(str, explorer.grid(look, name)))}", name) for name in explorer.layers]
        return {
            **self.show_point(session, explorer, str(layer), *centre),
            self.layer: gr.Radio(choices, value=layer),
            self.sentence: html.image_html(session.rows),
            self.gallery: self.gallery_html(example),
            self.maps: NO_MAPS,
            self.upload: None,
            self.head: self.head_html(checkpoint, trust),
        }

    def show_point(self, session: Session, explorer: Explorer, layer: str, x: float, y: float) -> dict:
        session.place = explorer.describe_pixel(session.look, x, y)
        session.point = (x, y)
        return self.show_layer(session, explorer, layer)

    def show_layer(self, session: Session, explorer: Explorer, layer: str) -> dict:
        """What changes with the layer or the point."""
        look, rows = session.look, session.place or []
        row, column = next(one["location"] for one in rows if one["layer"] == layer)
        grids = {name: explorer.grid(look, name) for name in explorer.layers}
        x, y = session.point or (0, 0)
        return {
            self.session: session,
            self.stage: html.stage_html(look.image, explorer.crop(look), grids[layer], (row, column), layer),
            self.row: row,
            self.column: column,
            self.place: html.place_html(rows, layer, f" · pixel {x:.0f}, {y:.0f}"),
            self.features: html.features_html(session.features, session.rows, grids, layer),
        }

    def choose_layer(self, session: Session, layer: str) -> dict:
        session = _opened(session)
        return self.show_layer(session, self.explorer(session), layer)

    def read_numbers(self, session: Session, layer: str, row: float | None, column: float | None) -> dict:
        session = _opened(session)
        explorer = self.explorer(session)
        if row is None or column is None:
            raise ValueError("Type a row and a column first; both start at 0.")
        point = explorer.pixel_of(session.look, layer, int(row), int(column))
        return self.show_point(session, explorer, layer, *point)

    def show_maps(self, session: Session, text: str, carrier: str) -> dict:
        session = _opened(session)
        explorer = self.explorer(session)
        phrases = read_phrases(text)
        outputs = explorer.map_phrases(session.look, phrases, carrier[:40])
        return {self.maps: html.maps_html(explorer.processor, session.look.image, outputs, phrases)}

    def act(self, event: gr.EventData, session: Session, layer: str, carrier: str) -> dict:
        """A click on a word, a layer, an example, a tile of features or the stage."""
        session = _opened(session)
        example, word, chosen = (getattr(event, name, None) for name in ("example", "word", "layer"))
        if example is not None:
            index = int(example) % len(self.examples)
            return self.open(self.examples[index], session.checkpoint, session.trust, layer, example=index)
        if word is not None:
            return {**self.show_maps(session, word, carrier), self.phrases: word}
        explorer, look = self.explorer(session), session.look
        if chosen is None:
            x, y = float(event.x) * look.image.width, float(event.y) * look.image.height
            return self.show_point(session, explorer, layer, x, y)
        if not event.at:  # a name, or a tile by keyboard
            return {**self.show_layer(session, explorer, chosen), self.layer: chosen}
        rows, columns = explorer.grid(look, chosen)
        x, y = (min(max(float(share), 0.0), 0.999999) for share in event.at)
        point = explorer.pixel_of(look, chosen, int(y * rows), int(x * columns))
        return {**self.show_point(session, explorer, chosen, *point), self.layer: chosen}

    def explorer(self, session: Session) -> Explorer:
        return self.checkpoints.get(session.checkpoint, session.trust)

    def gallery_html(self, chosen: int | None) -> str:
        buttons = "".join(
            f'<button class="dv-example" data-example="{index}" aria-pressed="{str(index == chosen).lower()}" '
            f'aria-label="example scene {index + 1}"><img src="{source}" alt=""></button>'
            for index, source in enumerate(self.thumbnails)
        )
        return f'<div class="dv-examples">{buttons}</div>'

    # ---------------------------------------------------------------------------------------------------- endpoints

    def build_endpoints(self) -> None:
        """The same answers for programs, by name: an image, a layer and numbers instead of clicks."""
        default = self.checkpoints.get(self.checkpoints.default)

        def describe(image: str) -> list[dict]:
            return default.describe(default.look(read_upload(image)))

        def describe_place(image: str, layer: str, x: float, y: float) -> dict:
            look = default.look(read_upload(image))
            return default.describe_pixel(look, x, y, [layer])[0]

        def map_phrases(image: str, phrases: str, carrier: str) -> tuple[Image.Image, list[dict]]:
            look, names = default.look(read_upload(image)), read_phrases(phrases)
            outputs = default.map_phrases(look, names, carrier)
            peaks = []
            for layer, values in outputs.maps.items():
                for name, one in zip(names, values[0], strict=True):
                    row, column = divmod(int(one.argmax()), one.shape[1])
                    peaks.append(
                        {"layer": layer, "phrase": name, "highest": float(one.max()), "location": (row, column)}
                    )
            return attribution_figure(default.processor, look.image, outputs, names), peaks

        def model() -> dict:
            config = default.model.config
            return {"checkpoint": self.checkpoints.default, "layers": default.layers, "scope": config.scope}

        with gr.Column(visible=False):
            image, layer, phrases = gr.File(label="image"), gr.Textbox(label="layer"), gr.Textbox(label="phrases")
            x, y, carrier = gr.Number(label="x"), gr.Number(label="y"), gr.Textbox("", label="carrier")
            answer, picture, caller = gr.JSON(), gr.Image(), gr.Button()
        described = "One row per layer, and one for all together: description, and evidence of each word in nats."
        at_pixel = "What one layer says at pixel (x, y) of the image, counted from its top left corner."
        mapped = "Maps of phrases (commas between) on every layer as one picture, and the highest place of each."
        for answering, asked, given, about in (
            (describe, [image], [answer], described),
            (describe_place, [image, layer, x, y], [answer], at_pixel),
            (map_phrases, [image, phrases, carrier], [picture, answer], mapped),
            (model, [], [answer], "Layers and scope of the model."),
        ):
            caller.click(told(answering), asked, given, api_name=answering.__name__, api_description=about, **ANSWERS)


SCROLL_TO_MAPS = "() => document.getElementById('dv-maps').scrollIntoView({ behavior: 'smooth', block: 'nearest' })"


def _title(title: str, text: str) -> str:
    return f'<div class="dv-title"><h3>{title}</h3>{f"<p>{text}</p>" if text else ""}</div>'


def _middle(start: float, end: float) -> float:
    return (max(start, 0.0) + min(end, 1.0)) / 2


def _opened(session: Session | None) -> Session:
    if session is None:
        raise ValueError("This visit has expired: reload the page.")
    return session


def launch(
    checkpoint: str | None = None,
    device: str | None = None,
    host: str | None = None,
    port: int | None = None,
    block: bool = True,
) -> gr.Blocks:
    """Start the demo.

    Args:
        checkpoint: directory or Hub id; None for `DEVIL_CHECKPOINT`, and without it the shapes world of the package.
        device: None chooses CUDA where there is one.
        host: address to listen on; None for `GRADIO_SERVER_NAME`, and without it this machine alone.
        port: None for the first free one from 7860 on.
        block: whether to serve until interrupted, or to return at once.
    """
    demo = build_demo(Checkpoints(checkpoint, device=device))
    demo.queue(max_size=QUEUE_SIZE)
    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # none is fetched from the network
    demo.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        quiet=not block,
        max_file_size=MAX_BYTES,
        state_session_capacity=SESSIONS,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=["api"],
        theme=gr.themes.Base(
            primary_hue="orange",
            neutral_hue="slate",
            radius_size="md",
            font=sans,
            font_mono=("ui-monospace", "monospace"),
        ),
        css=files("devil_hf.demo").joinpath("page.css").read_text(encoding="utf-8"),
    )
    return demo
