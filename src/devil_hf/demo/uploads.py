"""Files of strangers: bounded in bytes and pixels, opened by decoders of photographs only, and shrunk."""

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from devil_hf.image_processing_devil import load_images

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000
LONGEST_SIDE = 1024  # of the picture that is kept: backbones look at less
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def upload_field(**settings: Any) -> gr.File:
    """A field for a file of the visitor's own device: unlike a plain one, it never fetches an address that a request names."""
    field = gr.File(**settings)
    keep = field.move_resource_to_block_cache

    def keep_uploads(url_or_file_path: Any) -> str | None:
        if str(url_or_file_path).startswith(("http://", "https://")):
            raise gr.Error("Upload the file itself: addresses are not fetched.", print_exception=False)
        return keep(url_or_file_path)

    # Set on the object: of a subclass, gradio would write a stub file beside this one.
    field.move_resource_to_block_cache = keep_uploads  # type: ignore[method-assign]
    return field


def read_upload(path: str | Path) -> Image.Image:
    """An upright RGB picture of an uploaded file, at most `LONGEST_SIDE` on a side.

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
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def _too_many_pixels(pixels: str) -> str:
    return f"This image has {pixels} pixels; at most {MAX_PIXELS // 1_000_000} million are read. Make it smaller first."
