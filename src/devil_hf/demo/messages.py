"""What a visitor reads when something does not work: our own refusals word for word, and nothing of the inside."""

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr
from transformers.utils import logging

logger = logging.get_logger(f"transformers.{__name__}")


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


__all__ = ["told"]
