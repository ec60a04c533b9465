"""What a visitor reads when something does not work: our own refusals word for word, and nothing of the inside."""

import functools
import re
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr
from transformers.utils import logging

logger = logging.get_logger(f"transformers.{__name__}")

LONGEST = 400  # characters of a message
# Absolute paths (not those of an address, nor a single slash between two words), and access tokens.
INSIDE = re.compile(r"(?<![\w./])(?:/[^\s/'\"<>:,;()\[\]]+){2,}/?|\b[A-Za-z]:\\[^\s'\",;]+|\bhf_[A-Za-z0-9]{6,}")


def plain(error: object) -> str:
    """An error for strangers, on one line: without paths of this machine and tokens."""
    text = INSIDE.sub("…", " ".join(str(error).split()) or type(error).__name__)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def message(error: object) -> str:
    """The same as gradio takes it, which shows messages as HTML."""
    return escape(plain(error), quote=False)


def told(answer: Callable) -> Callable:
    """Errors as messages: ours word for word, others in general words to the visitor and in full to the log."""

    @functools.wraps(answer)
    def answering(*args: Any, **kwargs: Any) -> Any:
        try:
            return answer(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(message(error), title="This did not work", print_exception=False) from error
        except gr.Error:
            raise
        except Exception as error:
            logger.exception("the demo failed")
            raise gr.Error("The demo failed at this; the log says why.", print_exception=False) from error

    return answering


__all__ = ["message", "plain", "told"]
