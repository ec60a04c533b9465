"""Caption folders and caption files are read as they are handed out, and bad ones are named."""

import gzip
import json

import pytest
from PIL import Image

from devil_hf.data.captions import (
    load_caption_folder,
    read_caption_records,
    read_coco_captions,
    read_flickr_captions,
    without_images,
)

ROWS = [
    {"image": "images/a.jpg", "captions": ["A red dog .", " A dog "], "split": "train"},
    {"image": "images/b.jpg", "captions": ["Grass .", ""], "split": "val"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for row in ROWS:
        Image.new("RGB", (5, 4), "red").save(tmp_path / row["image"])
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return tmp_path


def test_a_caption_folder_gives_images_captions_and_keys(folder):
    dataset = load_caption_folder(folder)
    assert dataset[0]["image"].size == (5, 4)
    assert dataset[0]["captions"] == ["A red dog .", "A dog"]
    assert dataset["key"][:] == ["a.jpg", "b.jpg"]


def test_images_are_decoded_only_when_a_row_is_read(folder):
    (folder / "images/b.jpg").write_bytes(b"no image")
    dataset = load_caption_folder(folder)
    assert dataset[0]["image"].size == (5, 4)
    with pytest.raises(Exception, match="identify"):
        dataset[1]


def test_a_split_is_chosen_and_an_unknown_one_names_the_known(folder):
    assert load_caption_folder(folder, "val")["captions"][:] == [["Grass ."]]
    with pytest.raises(ValueError, match=r"'test'.*\['train', 'val'\]"):
        read_caption_records(folder, "test")


def test_metadata_jsonl_with_file_name_is_read_too(folder):
    (folder / "captions.jsonl").rename(folder / "metadata.jsonl")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "images/a.jpg", "captions": ["A dog"]}))
    assert read_caption_records(folder) == [{"image": "images/a.jpg", "captions": ["A dog"], "split": None}]


def test_missing_files_are_named_before_any_work(folder, tmp_path):
    (folder / "images/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*b\.jpg"):
        load_caption_folder(folder)
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl"):
        load_caption_folder(tmp_path / "images")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"image": "a.jpg"}',
        '{"image": "a.jpg", "captions": [" "]}',
        '{"captions": ["a dog"]}',
        '"text"',
        '{"image": "a.jpg", "captions": "a dog"}',
    ],
)
def test_a_malformed_line_is_named_with_its_number(folder, line):
    with (folder / "captions.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"captions\.jsonl:3"):
        read_caption_records(folder)


def test_flickr_and_coco_files_give_captions_by_image_name(tmp_path):
    tokens = "a.jpg#0\tA red dog .\na.jpg#1\tA dog .\nb#c.jpg#0\tGrass .\n"
    with gzip.open(tmp_path / "tokens.txt.gz", "wt") as file:
        file.write(tokens)
    assert read_flickr_captions(tmp_path / "tokens.txt.gz") == {
        "a.jpg": ["A red dog .", "A dog ."],
        "b#c.jpg": ["Grass ."],
    }
    coco = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": " Grass.\n"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert read_coco_captions(tmp_path / "coco.json") == {"7.jpg": ["Grass."]}


def test_a_flickr_line_without_tab_is_named(tmp_path):
    (tmp_path / "tokens.txt").write_text("a.jpg#0\tA dog .\nnonsense\n")
    with pytest.raises(ValueError, match=r"tokens\.txt:2"):
        read_flickr_captions(tmp_path / "tokens.txt")


def test_excluded_images_give_no_text():
    assert without_images({"a.jpg": ["x", ""], "b.jpg": ["y"], "c.jpg": [""]}, {"b.jpg", "z.jpg"}) == [["x"]]
