"""Files of strangers: bounded in bytes and pixels, each and together, opened by decoders of photographs only, and shrunk."""

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import route_utils
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from PIL import Image

from devil_hf.model.image_processing_devil import load_images

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000
LONGEST_SIDE = 1024  # of the picture that is kept: backbones look at less
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
VISITOR_BYTES, VISITOR_FILES = 60 * 2**20, 100  # of one visitor's uploads at a time
FOLDER_BYTES, FOLDER_FILES = 500 * 2**20, 5_000  # of everybody's, and of pictures that were answered with
LOOK_SECONDS = 30  # between two looks at a folder that is not full by what is known of it
EMPTY_SECONDS = 60  # that a folder inside may be empty: it is made just before its file comes

OPENED: ContextVar[list[Any]] = ContextVar("files that gradio opens for this request")


def own_folder() -> Path:
    """The folder of this process's uploads; gradio's own is shared with every other app of this machine."""
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="devil-demo-"))
    return Path(os.environ["GRADIO_TEMP_DIR"])


class _Parser(route_utils.GradioMultiPartParser):
    """gradio's, which leaves the files of an upload that breaks off or names them otherwise; here the request knows them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._files_to_close_on_error = OPENED.get(self._files_to_close_on_error)


def know_opened_files() -> None:
    """Let `OPENED` of a request hold every file that gradio opens for it, in this whole process."""
    route_utils.GradioMultiPartParser = _Parser  # type: ignore[misc]


class UploadFolder:
    """Bounds what lies in the folder of uploads: what is oldest is deleted, first of the visitor who brings too much.

    Args:
        folder: of this demo alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._kept: dict[str, tuple[str, int]] = {}  # path -> its visitor and bytes, oldest first
        self._new = self._new_files = 0  # bytes and files since the last look
        self._looked = -float(LOOK_SECONDS)
        self._lock = threading.Lock()

    def keep(self, visitor: str, paths: Sequence[str], opened: Sequence[Any] = ()) -> None:
        """Count files that a visitor has uploaded, and delete that visitor's oldest above `VISITOR_BYTES` or `VISITOR_FILES`.

        Args:
            visitor: who.
            paths: where they are kept.
            opened: what was opened on the way; what is still there is deleted.
        """
        for file in opened:
            with suppress(OSError):  # the disk is full
                file.close()
            with suppress(OSError):  # it is one that is kept
                os.unlink(file.name)
        with self._lock:
            for path in paths:
                self._kept.pop(path, None)
                size = _size(path)
                self._kept[path] = (visitor, size)
                self._new += size
            self._new_files += len(paths)
            mine = {path: size for path, (owner, size) in self._kept.items() if owner == visitor}
            surplus, files = sum(mine.values()) - VISITOR_BYTES, len(mine) - VISITOR_FILES
            for path, size in mine.items():
                if surplus <= 0 and files <= 0:
                    break
                self._delete(path)
                surplus, files = surplus - size, files - 1

    @property
    def due(self) -> bool:
        """Whether `make_room` should be called."""
        many = self._new > FOLDER_BYTES // 10 or self._new_files > FOLDER_FILES // 10
        return many or time.monotonic() - self._looked > LOOK_SECONDS

    def make_room(self) -> None:
        """Delete the oldest files of a folder that nears `FOLDER_BYTES` or `FOLDER_FILES`."""
        with self._lock:
            if not self.due:  # another thread was here
                return
            self._new, self._new_files, self._looked = 0, 0, time.monotonic()
            found = sorted(_files(self.folder))
            size, count = sum(one for _, one, _ in found), len(found)
            for _, one, path in found:
                if size <= FOLDER_BYTES * 0.8 and count <= FOLDER_FILES * 0.8:
                    break
                self._delete(path)
                size, count = size - one, count - 1
            self._kept = {path: entry for path, entry in self._kept.items() if os.path.exists(path)}

    def _delete(self, path: str) -> None:
        self._kept.pop(path, None)
        with suppress(OSError):  # somebody else's deletion
            os.unlink(path)
            if Path(path).parent != self.folder:
                os.rmdir(os.path.dirname(path))  # of this content alone; not empty where it has two names


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _files(folder: Path) -> list[tuple[float, int, str]]:
    """(time, bytes, path) of every file; folders that stay empty go."""
    found = []
    for parent, folders, names in os.walk(folder):
        if not folders and not names and parent != str(folder):
            with suppress(OSError):
                if time.time() - os.stat(parent).st_mtime > EMPTY_SECONDS:
                    os.rmdir(parent)
        for name in names:
            path = os.path.join(parent, name)
            try:
                status = os.lstat(path)
            except OSError:  # deleted meanwhile
                continue
            found.append((status.st_mtime, status.st_size, path))
    return found


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


def read_upload(path: str | Path | None) -> Image.Image:
    """An upright RGB picture of an uploaded file, at most `LONGEST_SIDE` on a side; `info["sent"]` is (width, height) before.

    Raises:
        ValueError: for no file, for what is too large in bytes or pixels, and for what is not a readable image.
    """
    if not path:
        raise ValueError("There is no image: upload one first.")
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise ValueError("This upload is no longer here: upload it again.") from error
    if size > MAX_BYTES:
        raise ValueError(f"This file has {size / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB are read.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _TooManyPixels(f"{image.width} × {image.height}")
            (picture,) = load_images(image)
    except Image.DecompressionBombError as error:
        raise _TooManyPixels("more than 100 million") from error
    except _TooManyPixels:
        raise
    except Exception as error:  # damaged files make Pillow's plugins raise almost anything
        raise ValueError(f"This file cannot be read as an image: it is broken, or none of {', '.join(FORMATS)}.") from error
    sent = picture.size
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    picture.info = {"sent": sent}  # nothing else: profiles and comments can be large
    return picture


class _TooManyPixels(ValueError):
    def __init__(self, pixels: str):
        limit = MAX_PIXELS // 1_000_000
        super().__init__(f"This image has {pixels} pixels; at most {limit} million are read. Make it smaller first.")
