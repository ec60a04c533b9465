"""Files of strangers: bounded in bytes and pixels, opened by decoders of photographs only, and shrunk."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from PIL import Image

from devil_hf.model.image_processing_devil import load_images

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000
LONGEST_SIDE = 1024  # of the picture that is kept: backbones look at less
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def refuse_addresses(demo: gr.Blocks) -> None:
    """Let the server fetch no address that a request names: gradio would, for every field of every endpoint."""
    prepare = demo.preprocess_data

    async def prepare_uploads(block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        traverse(inputs, _refuse_address, is_file_obj_with_meta)
        return await prepare(block_fn, inputs, *args, **kwargs)

    # Set on the whole: gradio makes fields anew for each visitor, which would know nothing of what is set on the old ones.
    demo.preprocess_data = prepare_uploads  # type: ignore[method-assign]


def _refuse_address(file: dict) -> dict:
    if is_http_url_like(file["path"]):
        raise gr.Error("Upload the file itself: addresses are not fetched.", print_exception=False)
    return file


def read_upload(path: str | Path) -> Image.Image:
    """An upright RGB picture of an uploaded file, at most `LONGEST_SIDE` on a side; `info["shrunk"]` is by how much, as (x, y).

    Raises:
        ValueError: for what is too large in bytes or pixels, and for what is not a readable image.
    """
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"This file has {size / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB are read.")
    accepted = ", ".join(FORMATS)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(_too_many_pixels(f"{image.width} × {image.height}"))
            (picture,) = load_images(image)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_many_pixels("more than 100 million")) from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"This file cannot be read as an image: it is broken, or none of {accepted}.") from error
    width, height = picture.size
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    picture.info["shrunk"] = (picture.width / width, picture.height / height)
    return picture


def _too_many_pixels(pixels: str) -> str:
    return f"This image has {pixels} pixels; at most {MAX_PIXELS // 1_000_000} million are read. Make it smaller first."
