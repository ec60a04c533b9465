"""The page of a difference shows what changed, and its text is no markup."""

import pytest
from PIL import Image

from devil_hf.questions.difference import Difference, Example, WordChange
from devil_hf.report.difference import distinct_names, write_difference


def test_the_page_names_what_was_lost_and_shows_the_images(tmp_path):
    words = (
        WordChange("all", "<b>red</b>", 1.3, 0.1, 0.001, 0.002, "lost"),
        WordChange("layer1", "<b>red</b>", 0.4, 0.4, 0.9, 0.9, None),
        WordChange("layer1", "dog", 0.2, 0.9, 0.001, 0.002, "gained"),
        WordChange("all", "cat", 0.2, 0.2, 0.5, 0.6, None),
    )
    example = Example("one.png", 7.25, (("a", 0.1), ("red", 3.0)), (("a", 0.1), ("<i>dog</i>", 1.0)), "red red", None)
    found = Difference(words, (example,), ("all", "layer1"), 30, 0.001, 0.33, ("zyx",))
    page = write_difference(
        found,
        tmp_path / "page.html",
        "/home/1/checkpoint",
        "/home/2/checkpoint",
        "photos",
        {"one.png": Image.new("RGB", (900, 600))},
    )
    text = page.read_text(encoding="utf-8")
    assert "<b>red" not in text and "&lt;b&gt;red" in text and "<i>dog" not in text
    lost, gained = text.index("<h2>Lost</h2>"), text.index("<h2>Gained</h2>")
    assert lost < text.index("&lt;b&gt;red") < gained < text.index("<b>dog</b>") < text.index("Images that changed most")
    assert "1 words without" in text and "7.2 nats" in text and "data:image/webp" in text and "zyx" in text
    assert "1.30 <i>→</i> 0.10" in text and "0.1% at most" in text
    assert "What changed from 1/checkpoint to 2/checkpoint" in text and "home" not in text


@pytest.mark.parametrize(
    ("a", "b", "shown"),
    [
        ("runs/1/checkpoint", "runs/2/checkpoint", ("1/checkpoint", "2/checkpoint")),
        ("/x/runs/1/checkpoint/", "user/checkpoint", ("1/checkpoint", "user/checkpoint")),
        ("checkpoint", "runs/checkpoint", ("checkpoint", "runs/checkpoint")),
        ("shapes", "finetuned.safetensors", ("shapes", "finetuned.safetensors")),
        ("runs/1", "runs/1", ("1", "1")),
        (".", "..", (".", "..")),
    ],
)
def test_names_are_as_long_as_tells_them_apart(a, b, shown):
    assert distinct_names(a, b) == shown
