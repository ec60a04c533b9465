"""Every page and every card is filled here. Templates are files of this package; what they are filled with is only ever a value.

There is one environment. It is sandboxed, an undefined name is an error, and each value is escaped for the kind of its file:
HTML in `*.html`, Markdown in `*.md.jinja`. No text of a model, a file or a user ever becomes the source of a template.

Templates are named by their path in the package (`report/templates/maps.html`). In Markdown a value is text unless a filter says
otherwise: `code` for a word in a code font, `python` for a literal, `fenced` for a block of another language.
"""

import json
import re
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, pass_eval_context
from jinja2.nodes import EvalContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

PACKAGE = Path(__file__).parents[1]
MARKDOWN = ".md.jinja"
# In Markdown: escapes, code, links, cells and formulas; emphasis and strikes, but no star between spaces nor what_is_in_a_name;
# and what a line may begin with: headings, quotes, fences, lists.
_MARKS = re.compile(r"[\\`\[\]|$]|\*(?!\s)|(?<!\s)\*|~(?=~)|(?<=~)~|(?<![^\W_])_|_(?![^\W_])|^>|^[#+=-]+(?=\s|$)")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
# Control characters, and those that turn the direction of what stands around them.
_UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Written(str):
    """Markdown that is finished: its values were escaped when it was written."""


def render(name: str, **values: Any) -> str:
    """A template of the package, filled.

    Args:
        name: its path in the package, such as `report/templates/maps.html`.
        values: what it names; a name that it uses and nobody gives is an error.
    """
    return _environment().get_template(name).render(values)


@cache
def card_folder() -> Path:
    """`hub_cards/`: within an installed package, else at the top of the source tree."""
    installed = PACKAGE / "hub_cards"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "hub_cards"


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader([PACKAGE, card_folder()]),
        autoescape=lambda name: not (name or "").endswith(MARKDOWN),
        undefined=StrictUndefined,
        finalize=_finalize,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "python": python, "fenced": fenced, "hub_link": hub_link}
    return environment


@pass_eval_context
def _finalize(context: EvalContext, value: Any) -> Any:
    return value if context.autoescape else markdown(value)


def one_line(value: Any) -> str:
    """Text on one line, with the sign of a broken character for each that nobody would see."""
    return _UNSEEN.sub("\ufffd", " ".join(str(value).split()))


def markdown(value: Any) -> str:
    """Text as Markdown that shows it letter by letter, on one line: no markup, no HTML, no cell's end."""
    if isinstance(value, Written):
        return value
    text = escape(one_line(value), quote=False).replace("&gt;", ">")
    return Written(_NUMBERED.sub(r"\1\\\2", _MARKS.sub(r"\\\g<0>", text)))


def code(value: Any) -> str:
    """Text in a code font."""
    text = one_line(value)
    if re.fullmatch(r"[^`|<>&]+", text):
        return Written(f"`{text}`")
    # What would end the span or the cell, and what an entity may not stand for in backticks.
    return Written(f"<code>{''.join(c if c.isalnum() or c == ' ' else f'&#{ord(c)};' for c in text)}</code>")


def python(value: Any) -> str:
    """A string, or a list of strings, as a literal of Python on one line."""
    return Written(json.dumps(value, ensure_ascii=False))


def fenced(text: str, language: str) -> str:
    """A block of code, between fences that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Written(f"{fence}{language}\n{text}\n{fence}")


def hub_link(identifier: str) -> str:
    """A Hub id, checked by its reader, as a link."""
    return Written(f"[{identifier}](https://huggingface.co/{identifier})")


__all__ = ["Written", "card_folder", "code", "fenced", "hub_link", "markdown", "python", "render"]
