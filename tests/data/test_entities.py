"""Flickr30k Entities: both layouts give the same phrases and boxes, and what cannot be used is counted."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from devil_hf.data.objects import open_localised
from devil_hf.data.objects.entities import read_entities
from devil_hf.data.pairs import open_pairs

HEIGHT, WIDTH = 40, 60
SENTENCES = """[/EN#1/people A small girl] with [/EN#2/clothing/other a red hat] runs on [/EN#4/scene the beach] .
[/EN#1/people A child] and [/EN#3/animals two dogs] play in [/EN#0/notvisual the sun] .
"""
OBJECTS = {
    "1": [(11, 9, 30, 20)],  # counted from 1, both ends included
    "2": [(15, 5, 24, 10)],
    "3": [(1, 21, 20, 40), (41, 21, 75, 40)],  # the second hangs over the border
}


@pytest.fixture
def original(tmp_path):
    """A folder as the authors distribute it, with one image."""
    for name in ("Sentences", "Annotations", "flickr30k-images"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (WIDTH, HEIGHT), "grey").save(tmp_path / "flickr30k-images" / "36979.jpg")
    (tmp_path / "Sentences" / "36979.txt").write_text(SENTENCES)
    corners = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    objects = "".join(
        f"<object><name>{name}</name><bndbox>{corners.format(*box)}</bndbox></object>"
        for name, found in OBJECTS.items()
        for box in found
    )
    scene = "<object><name>4</name><scene>1</scene><nobndbox>1</nobndbox></object>"
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    (tmp_path / "Annotations" / "36979.xml").write_text(f"<annotation>{size}{objects}{scene}</annotation>")
    return tmp_path


@pytest.fixture
def lines(original, tmp_path_factory):
    """The same as a folder with a `regions.jsonl`."""
    folder = tmp_path_factory.mktemp("lines")
    Image.new("RGB", (WIDTH, HEIGHT), "grey").save(folder / "36979.jpg")
    regions = [
        {"entity": "1", "types": ["people"], "phrases": ["A small girl", "A child"], "boxes": [[10, 8, 20, 12]]},
        {"entity": "2", "types": ["clothing", "other"], "phrases": ["a red hat"], "boxes": [[14, 4, 10, 6]]},
        {"entity": "3", "types": ["animals"], "phrases": ["two dogs"], "boxes": [[0, 20, 20, 20], [40, 20, 35, 20]]},
    ]
    line = {"image": "36979.jpg", "split": "train", "size": [WIDTH, HEIGHT], "regions": regions, "scene_phrases": ["the beach"]}
    (folder / "regions.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"split": "val"}) + "\n")
    return folder


def test_both_layouts_give_the_same_masks_by_type(original, lines):
    (ours,), (theirs,) = open_localised(f"{lines}:train"), open_localised(original)
    assert ours.groups == {"a small girl": "people", "a child": "people", "a red hat": "clothing", "two dogs": "animals"}
    assert ours.groups == theirs.groups and ours.size == theirs.size == (HEIGHT, WIDTH)
    masks, same = ours.draw((HEIGHT, WIDTH)), theirs.draw((HEIGHT, WIDTH))
    truth = np.zeros((HEIGHT, WIDTH), dtype=bool)
    truth[20:40, 0:20] = truth[20:40, 40:60] = True  # any box of the phrase, cut at the border
    assert (masks["two dogs"] == truth).all()
    for phrase, mask in masks.items():
        assert (mask == same[phrase]).all()


@pytest.mark.parametrize(
    "change",
    [{"size": [float("inf"), HEIGHT]}, {"phrases": [5]}, {"types": []}, {"types": [None]}, {"boxes": [[1, 2, "3", 4]]}],
    ids=str,
)
def test_a_line_that_is_none_is_named(lines, change):
    content = json.loads((lines / "regions.jsonl").read_text().splitlines()[0])
    for name, value in change.items():
        (content if name == "size" else content["regions"][0])[name] = value
    (lines / "regions.jsonl").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"regions\.jsonl:1 is no line of entities"):
        open_localised(lines)


def test_an_image_whose_name_no_file_can_have_is_absent(lines):
    content = json.loads((lines / "regions.jsonl").read_text().splitlines()[0])
    (lines / "regions.jsonl").write_text(json.dumps(content | {"image": "x" * 300}))
    with pytest.raises(FileNotFoundError, match="1 of 1 images are absent"):
        open_localised(lines)


def test_regions_of_a_split_are_read_anew_when_its_lines_change(lines):
    def first():
        return open_pairs([{"kind": "regions", "path": f"{lines}:train"}], seed=0, shuffle=False)[0]["captions"][0]

    before = first()
    file = lines / "regions.jsonl"
    file.write_text(file.read_text().replace("A small girl", "A small boy"))
    assert first() == "a small boy" != before


def test_a_source_is_recognised_whichever_format_was_imported_first(original):
    code = "import sys, devil_hf.data.objects.voc as _; from devil_hf.data.objects import open_localised as read; "
    code += "print(list(read(sys.argv[1])[0].groups))"
    done = subprocess.run([sys.executable, "-c", code, str(original)], capture_output=True, text=True, check=True)
    assert "a small girl" in done.stdout


def test_each_entity_is_a_region_with_all_of_its_phrases(original, lines):
    for source in ({"path": str(original)}, {"path": str(lines), "split": "train"}):
        rows = open_pairs([{"kind": "entities", **source}], seed=0, shuffle=False)
        assert [row["captions"] for row in rows] == [["A small girl", "A child"], ["a red hat"], ["two dogs"]]
        assert all(json.loads(row["region"])["size"] == [HEIGHT, WIDTH] for row in rows)
    rows = open_pairs([{"kind": "entities", "path": str(original), "smallest_share": 0.05}], seed=0, shuffle=False)
    assert [row["captions"][0] for row in rows] == ["A small girl", "two dogs"]


def test_an_image_stands_before_its_entities_with_the_captions_of_its_layout(original, lines):
    (original / "flickr30k-images" / "7.jpg").write_bytes((original / "flickr30k-images" / "36979.jpg").read_bytes())
    (lines / "captions.jsonl").write_text(json.dumps({"image": "36979.jpg", "captions": ["A girl runs."], "split": "train"}))
    sentences = ["A small girl with a red hat runs on the beach .", "A child and two dogs play in the sun ."]
    for source, captions in (
        ({"path": str(original)}, sentences),
        ({"path": str(lines), "split": "train"}, ["A girl runs."]),
    ):
        rows = open_pairs([{"kind": "entities", "whole": 2, **source}], seed=0, shuffle=False)
        assert [row["region"] is None for row in rows] == [True, True, False, False, False]
        assert rows[0]["captions"] == rows[1]["captions"] == captions
        assert len({row["key"] for row in rows}) == 5
    (lines / "captions.jsonl").write_text(json.dumps({"image": "other.jpg", "captions": ["A girl."]}))
    with pytest.raises(ValueError, match=r"no captions of 1 images, the first is 36979\.jpg"):
        open_pairs([{"kind": "entities", "whole": 1, "path": str(lines), "split": "train"}], seed=0, shuffle=False)
    with pytest.raises(ValueError, match="whole=-1"):
        open_pairs([{"kind": "entities", "whole": -1, "path": str(lines)}], seed=0, shuffle=False)


def test_one_phrase_of_two_entities_has_the_boxes_of_both(lines):
    line = json.loads((lines / "regions.jsonl").read_text().splitlines()[0])
    line["regions"][1]["phrases"] = ["two dogs"]
    (lines / "regions.jsonl").write_text(json.dumps(line))
    (image,) = open_localised(lines)
    assert image.groups["two dogs"] == "clothing" and len(image.parts["two dogs"]) == 3


def test_what_cannot_be_used_is_counted(original, lines, caplog):
    from transformers.utils import logging

    file = original / "Annotations" / "36979.xml"
    file.write_text(file.read_text().replace("<xmin>41</xmin>", "<xmin>81</xmin>").replace("<xmax>75</xmax>", "<xmax>99</xmax>"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        read_entities(original)
        read_entities(f"{lines}:val")
    finally:
        logging.set_verbosity(verbosity)
    assert "1 boxes outside of their image, 4 phrases, 1 phrases of nothing to be seen, 1 phrases without a box" in caplog.text
    assert "1 images; 4 boxes, 4 phrases, 1 phrases of scenes" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "36979.jpg").unlink(), r"1 of 1 images are absent, the first is .*36979\.jpg"),
        (lambda folder: (folder / "regions.jsonl").write_text('{"image": "a.jpg"}'), r"regions\.jsonl:1 is no line of entities"),
        (lambda folder: (folder / "regions.jsonl").write_text('{"image": 3}\n{"image"'), r"regions\.jsonl:2 is not JSON"),
    ],
)
def test_a_broken_folder_is_named(lines, change, message):
    line = (lines / "regions.jsonl").read_text().splitlines()[0]
    (lines / "regions.jsonl").write_text(line)
    change(lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_localised(lines)


def test_wrong_splits_and_files_are_errors(original, lines):
    with pytest.raises(ValueError, match=r"split 'tset'; its splits are \['train', 'val'\]"):
        open_localised(f"{lines}:tset")
    with pytest.raises(ValueError, match="has no splits"):
        open_localised(f"{original}:train")
    (original / "Annotations" / "36979.xml").write_text("<annotation><size>")
    with pytest.raises(ValueError, match=r"36979\.xml is no annotation"):
        open_localised(original)
    with pytest.raises(ValueError, match=r"smallest_share=1\.5"):
        open_pairs([{"kind": "entities", "path": str(original), "smallest_share": 1.5}], seed=0, shuffle=False)
