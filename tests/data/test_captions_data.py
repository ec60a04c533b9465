"""Caption folders and caption files are read as they are handed out, and bad ones are named."""

import gzip
import json

import pytest
from PIL import Image

from devil_hf.data.decoding import BadSamples, PairDecoder
from devil_hf.data.pairs import open_pairs
from devil_hf.data.pairs.files import read_coco_captions, read_flickr_captions, without_images
from devil_hf.data.pairs.folder import read_caption_folder

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


def test_a_caption_folder_gives_names_paths_captions_and_splits(folder):
    first, second = read_caption_folder(folder)
    assert (first.name, first.path, first.split) == ("images/a.jpg", folder / "images/a.jpg", "train")
    assert first.captions == ["A red dog .", " A dog "] and second.captions == ["Grass .", ""]


def test_images_are_not_opened(folder):
    (folder / "images/b.jpg").write_bytes(b"no image")
    rows = open_pairs([{"kind": "folder", "path": str(folder)}], 0, False)
    assert rows[1]["image"] == {"path": str(folder / "images/b.jpg"), "bytes": None}


def test_a_split_is_chosen_and_an_unknown_one_names_the_known(folder):
    assert [one.name for one in read_caption_folder(folder, "val")] == ["images/b.jpg"]
    with pytest.raises(ValueError, match=r"'test'.*\['train', 'val'\]"):
        read_caption_folder(folder, "test")


def test_metadata_jsonl_with_file_name_is_read_too(folder):
    (folder / "captions.jsonl").rename(folder / "metadata.jsonl")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "images/a.jpg", "captions": ["A dog"]}))
    (one,) = read_caption_folder(folder)
    assert (one.name, one.captions, one.split) == ("images/a.jpg", ["A dog"], None)


def test_missing_files_are_named_before_any_work(folder, tmp_path):
    (folder / "images/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*b\.jpg"):
        open_pairs([{"kind": "folder", "path": str(folder)}], 0, False)
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl"):
        read_caption_folder(tmp_path / "images")


@pytest.mark.parametrize("line", ["{", '{"captions": ["a dog"]}', '{"image": 3}', '"text"'])
def test_a_malformed_line_is_named_with_its_number(folder, line):
    with (folder / "captions.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"captions\.jsonl:3"):
        read_caption_folder(folder)


@pytest.mark.parametrize("line", ['{"image": "images/a.jpg"}', '{"image": "images/a.jpg", "captions": [" "]}'])
def test_a_line_without_captions_is_a_bad_sample_and_not_the_end(folder, line):
    with (folder / "captions.jsonl").open("a") as file:
        file.write(line)
    bad_samples = BadSamples(limit=1)
    rows = open_pairs([{"kind": "folder", "path": str(folder)}], 0, False)
    assert [PairDecoder(bad_samples)(row) is None for row in rows] == [False, False, True]


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
