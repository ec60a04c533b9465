"""Files of statements are read in their three forms, and what is none of them is named."""

import json

import pytest
from PIL import Image

from devil_hf.data.statements import Said, read_statements

PAIR = {"image": "a.png", "type": "swap_att", "caption": "A red hat.", "negative_caption": "A hot red.", "image_split": "val"}
ONE = {"image": "a.png", "caption": "A hat is on a cat.", "label": 1, "relation": "on", "split": "val"}
SEVERAL = {"image": "b.png", "statements": [{"caption": "A cat is in a hat.", "label": 0}], "split": "train"}


@pytest.fixture
def write(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")

    def lines(*rows):
        (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "said.jsonl"

    return lines


def test_the_three_forms_are_read_and_an_image_comes_once(write, tmp_path):
    (one,) = read_statements(write(PAIR, PAIR | {"type": "add_obj", "split": "train"}))
    assert one.said == [Said(kind, "A red hat.", True, "A hot red.") for kind in ("swap_att", "add_obj")]
    assert one.path == tmp_path / "a.png"
    single, several = read_statements(write(ONE, SEVERAL))
    assert single.said == [Said("on", "A hat is on a cat.")] and several.said == [Said("", "A cat is in a hat.", False)]
    assert [image.key for image in read_statements(write(ONE, SEVERAL), split="train")] == ["b.png"]
    (tmp_path / "other").mkdir()
    (tmp_path / "said.jsonl").rename(tmp_path / "other" / "said.jsonl")
    assert len(read_statements(tmp_path / "other" / "said.jsonl", tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": None}, "said.jsonl:1 names no image"),
        ({"caption": ""}, r"said.jsonl:1 needs caption and negative_caption"),
        ({"label": 2}, "label must be 0 or 1, not 2"),
        ({"label": None}, "needs caption and negative_caption"),
        ({"negative_caption": "A hat."}, "needs caption and negative_caption"),
        ({"relation": 5}, "needs caption and negative_caption"),
        ({"statements": "none"}, "statements must be a list of objects"),
        ({"statements": []}, "says nothing of any image"),
    ],
    ids=str,
)
def test_lines_of_another_form_are_named(write, change, reason):
    with pytest.raises(ValueError, match=reason):
        read_statements(write(ONE | change))


def test_what_does_not_belong_together_is_refused(write):
    with pytest.raises(ValueError, match="pairs and single statements"):
        read_statements(write(PAIR, ONE))
    with pytest.raises(ValueError, match=r"split 'test'; its splits are \['train', 'val'\]"):
        read_statements(write(ONE, SEVERAL), split="test")
    with pytest.raises(FileNotFoundError, match="1 of 2 images are absent"):
        read_statements(write(ONE, SEVERAL | {"image": "c.png"}))
