"""The app: the page and its endpoints, built and served."""

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from devil_hf.data.shapes import make_scene
from devil_hf.demo.checkpoints import PHOTOGRAPHS, SCENES, Checkpoints, send_no_token_unasked
from devil_hf.demo.connections import CONNECTIONS, Bounds, PatientProtocol
from devil_hf.demo.endpoints import Endpoints, build_endpoints
from devil_hf.demo.page import Page
from devil_hf.demo.uploads import MAX_BYTES, UploadFolder, know_opened_files, own_folder, refuse_addresses
from devil_hf.demo.visits import Example, Visits
from devil_hf.model.image_processing_devil import load_images

EXAMPLE_SEED, EXAMPLES = 123, (0, 1, 2, 3)
PICTURES = Path(__file__).parent / "examples"
# All answers share one queue: more at once would only make each slower.
ANSWERS: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "model"}
QUEUE_SIZE = 100  # who comes when so many wait is told to come back
SESSIONS = 100
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # none is fetched from the network


def build_demo(checkpoints: Checkpoints) -> gr.Blocks:
    """The app, not yet launched. Loads the owner's checkpoints, so that the first visitor does not wait for them."""
    explorer, *_ = [checkpoints.get(name) for name in checkpoints.own]
    examples = example_images()
    with gr.Blocks(title="devil-hf: what does a vision network see?", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        Page(Visits(checkpoints, examples), ANSWERS).build(demo)
        build_endpoints(Endpoints(checkpoints.default, explorer), **ANSWERS)
    refuse_addresses(demo)
    return demo


def example_images() -> list[Example]:
    """Photographs and scenes, each with the built-in checkpoint that knows its world."""
    files = sorted(file for file in PICTURES.iterdir() if file.name.endswith(".jpg"))
    photographs = [Example(load_images(str(file))[0], PHOTOGRAPHS) for file in files]
    scenes = [Image.fromarray(make_scene(EXAMPLE_SEED, index).image) for index in EXAMPLES]
    return [*photographs, *(Example(scene, SCENES) for scene in scenes)]


def launch(
    checkpoint: str | None = None, device: str | None = None, host: str | None = None, port: int | None = None, block: bool = True
) -> gr.Blocks:
    """Start the demo.

    Args:
        checkpoint: name, directory or Hub id; None for `DEVIL_CHECKPOINT`, and without it those of the package.
        device: None chooses CUDA where there is one.
        host: address to listen on; None for `GRADIO_SERVER_NAME`, and without it this machine alone.
        port: None for the first free one from 7860 on.
        block: whether to serve until interrupted, or to return at once.
    """
    send_no_token_unasked()
    know_opened_files()
    folder = UploadFolder(own_folder())
    demo = build_demo(Checkpoints(checkpoint, device=device))
    demo.queue(max_size=QUEUE_SIZE, api_open=False)
    theme = gr.themes.Base(
        primary_hue="orange", neutral_hue="slate", radius_size="md", font=FONT, font_mono=("ui-monospace", "monospace")
    )
    demo.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=not block,
        max_file_size=MAX_BYTES,
        state_session_capacity=SESSIONS,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api"],
        theme=theme,
        css=files("devil_hf.demo").joinpath("page.css").read_text(encoding="utf-8"),
        app_kwargs={"middleware": [Middleware(Bounds, folder=folder, behind_proxy="SPACE_ID" in os.environ)]},
    )
    # gradio makes the server itself and asks for none of its options; each new connection reads them.
    demo.server.config.http_protocol_class = PatientProtocol
    demo.server.config.limit_concurrency = CONNECTIONS
    if block:
        demo.block_thread()
    return demo


__all__ = ["build_demo", "launch"]
