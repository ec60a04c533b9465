"""Texts of strangers: whatever a score file, a recipe, a name or a label may hold, and what breaks templates, pages, tables."""

from html.parser import HTMLParser

from hypothesis import strategies as st

PARTS = [
    *("{% endraw %}", "{{ 7 * 7 }}", "{#", "#}", "{% if %}"),
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</table>", "<!--", "-->", "<![CDATA[", "&lt;", "&"),
    *("](javascript:alert(1))", "[a](b)", "![", "<http://a.b>", "|", "||", "\\|", "\\", "`", "``", "```", "~~~"),
    *(
        "\n",
        "\r\n",
        "\n\n",
        "\n---\n",
        "---",
        "...",
        ": ",
        "- ",
        "? ",
        "!!python/object/apply:os.system ['touch ran']",
        "&a",
        "*a",
    ),
    *(
        "**",
        "*",
        "_",
        "__",
        "~~",
        "$",
        "$$",
        "#",
        "# ",
        "1. ",
        "1) ",
        ">",
        "> ",
        "+ ",
        "=",
        "===",
        "'",
        '"',
        "\t",
        " ",
        "a",
        "word",
    ),
    *(
        "=HYPERLINK(1)",
        "\u2028",
        "\x85",
        "\x00",
        "\x1b[31m",
        "\ufeff",
        "\u202e",
        "狗",
        "🐶",
        "e\u0301",
        "%s",
        "%(a)s",
        "../",
        "/",
    ),
]
TEXTS = st.one_of(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join), st.text(min_size=1, max_size=30)).filter(
    lambda text: text.split()
)


class Page(HTMLParser):
    """The elements of a page with the names of their attributes, in their order, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, *(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag):
        self.elements.append((f"/{tag}",))

    def handle_comment(self, data):
        self.elements.append(("comment",))

    def handle_decl(self, decl):
        self.elements.append(("declaration",))

    def unknown_decl(self, data):
        self.elements.append(("declaration",))

    def handle_pi(self, data):
        self.elements.append(("instruction",))

    def handle_data(self, data):
        self.text += data
