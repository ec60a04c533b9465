"""What is filled into a template is a value: it is escaped, it is never run, and a forgotten name is an error."""

import ast
from pathlib import Path

import jinja2
import markupsafe
import pytest
from jinja2.sandbox import SecurityError

from devil_hf.report import html, templates
from devil_hf.report.templates import PACKAGE, _environment, card_folder, render

TEMPLATES = [
    *(path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("templates/*"))),
    *(path.name for path in sorted(card_folder().glob("*.jinja"))),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_can_be_read(name):
    assert _environment().get_template(name)


@pytest.mark.parametrize("text", ['"><script>alert(1)</script>', "{{ 7 * 7 }}", "' onclick='x", "{% endraw %}{{ self }}"])
def test_text_in_a_page_stays_text(text):
    rows = [{"layer": "all", "location": (0, 0), "description": text, "evidence": 0.5, "words": [(text, 1.0)]}]
    rows.append(rows[0] | {"layer": text})
    for page in (html.image_html(rows), html.place_html(rows, text, text)):
        assert "<script" not in page and "49" not in page and str(markupsafe.escape(text)) in page
        assert "' onclick='" not in page


def test_a_name_that_nobody_gave_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("report/templates/stage.html", layer="layer4")


def test_templates_reach_nothing_inside_of_their_values():
    for source in ("{{ value.__class__.__mro__ }}", "{{ value.append(1) }}"):
        with pytest.raises(SecurityError):
            _environment().from_string(source).render(value=[])


def test_nothing_else_of_the_package_makes_templates():
    for path in PACKAGE.rglob("*.py"):
        if path != Path(templates.__file__):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
            assert not {"from_template", "from_string"} & names, path
            assert not any(module.partition(".")[0] == "jinja2" for module in modules), path
