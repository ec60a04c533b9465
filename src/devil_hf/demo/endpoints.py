"""The answers of the demo for programs, by name: an image, a layer and numbers instead of clicks."""

from typing import Any

import gradio as gr
from PIL import Image

from devil_hf.demo.explorer import Explorer, read_phrases
from devil_hf.demo.messages import told
from devil_hf.demo.uploads import read_upload
from devil_hf.report.figures import attribution_figure


class Endpoints:
    """What programs may ask of the default checkpoint.

    Args:
        name: what the checkpoint is called.
        explorer: the checkpoint.
    """

    def __init__(self, name: str, explorer: Explorer):
        self.name = name
        self.explorer = explorer

    def describe(self, image: str | None) -> list[dict]:
        return self.explorer.describe(self.explorer.look(read_upload(image)))

    def describe_place(self, image: str | None, layer: str, x: float, y: float) -> dict:
        picture = read_upload(image)
        layer = self.explorer.check_layer(layer)
        point = shrunk_point(picture, x, y)
        return self.explorer.describe_pixel(self.explorer.look(picture), *point, [layer])[0]

    def map_phrases(self, image: str | None, phrases: str, carrier: str) -> tuple[Image.Image, list[dict]]:
        names = read_phrases(phrases)
        look = self.explorer.look(read_upload(image))
        outputs = self.explorer.map_phrases(look, names, carrier)
        peaks = []
        for layer, values in outputs.maps.items():
            for name, one in zip(names, values[0], strict=True):
                row, column = divmod(int(one.argmax()), one.shape[1])
                peaks.append({"layer": layer, "phrase": name, "highest": float(one.max()), "location": (row, column)})
        return attribution_figure(self.explorer.processor, look.image, outputs, names), peaks

    def model(self) -> dict:
        return {"checkpoint": self.name, "layers": self.explorer.layers, "scope": self.explorer.model.config.scope}


def build_endpoints(endpoints: Endpoints, **queue: Any) -> None:
    """Add the endpoints to the app that is being built; `queue` says how they share it."""
    with gr.Column(visible=False):
        image, layer, phrases = gr.File(label="image"), gr.Textbox(label="layer"), gr.Textbox(label="phrases")
        x, y, carrier = gr.Number(label="x"), gr.Number(label="y"), gr.Textbox("", label="carrier")
        answer, picture, caller = gr.JSON(), gr.Image(), gr.Button()
    described = "One row per layer, and one for all together: description, and evidence of each word in nats."
    at_pixel = "What one layer says at pixel (x, y) of the image, counted from its top left corner."
    mapped = "Maps of phrases (commas between) on every layer as one picture, and the highest place of each."
    for answering, asked, given, about in (
        (endpoints.describe, [image], [answer], described),
        (endpoints.describe_place, [image, layer, x, y], [answer], at_pixel),
        (endpoints.map_phrases, [image, phrases, carrier], [picture, answer], mapped),
        (endpoints.model, [], [answer], "Layers and scope of the model."),
    ):
        caller.click(told(answering), asked, given, api_name=answering.__name__, api_description=about, **queue)


def shrunk_point(picture: Image.Image, x: Any, y: Any) -> tuple[float, float]:
    """Pixel (x, y) of an image as it was sent -> (x, y) of the picture that is kept of it.

    Raises:
        ValueError: for what is no number, and for a place outside of the image.
    """
    width, height = picture.info["sent"]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in (x, y)):
        raise ValueError(f"x and y are numbers of pixels, not {str(x)[:40]!r} and {str(y)[:40]!r}.")
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"Pixel x={x}, y={y} is outside of the image, which is {width} wide and {height} high.")
    # The last pixel stays inside, whatever rounding does.
    return min(x * picture.width / width, picture.width - 0.5), min(y * picture.height / height, picture.height - 0.5)


__all__ = ["Endpoints", "build_endpoints", "shrunk_point"]
