"""Files as Windows, other tools and slips leave them: read as they are meant, or an error that names the place."""

import gzip
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from devil_hf.data.images import open_images
from devil_hf.data.objects import open_localised
from devil_hf.data.objects.masks import draw_region, runs_of
from devil_hf.data.pairs import open_pairs

SQUARE = [4, 4, 12, 4, 12, 12, 4, 12]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "my photo.png", "café.png"):
        Image.new("RGB", (32, 24)).save(tmp_path / name)
    return tmp_path


def rows(**source):
    return [(row["key"], row["captions"]) for row in open_pairs([source], 0, False)]


def write(file, text, encoding="utf-8-sig"):
    file.write_text(text, encoding=encoding, newline="")
    return str(file)


def coco(folder, annotations=(), name="c.json", **more):
    content = {"images": [{"id": 1, "file_name": "a.png", "height": 24, "width": 32}], "annotations": list(annotations)}
    return write(folder / name, json.dumps(content | {"categories": [{"id": 3, "name": "dog"}]} | more))


def test_a_byte_order_mark_is_no_part_of_a_name(folder):
    write(folder / "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\r\n\r\n')
    tokens, names = write(folder / "t.txt", "a.png#0\tx\r\n \r\n"), write(folder / "n.txt", "a.png\r\n")
    (folder / "labels").mkdir()
    write(folder / "labels" / "a.txt", "0 .5 .5 .5 .5\r\n\r\n")
    assert rows(kind="folder", path=str(folder)) == [("a.png", ["x"])]
    assert rows(kind="flickr", captions=tokens, images=str(folder), names=names) == [("a.png", ["x"])]
    assert rows(kind="coco", annotations=coco(folder, [{"image_id": 1, "caption": "x"}]), images=str(folder)) == [
        ("a.png", ["x"])
    ]
    (one,) = open_localised(folder / "labels", folder, write(folder / "names.txt", "dog\r\n"))
    assert list(one.groups) == ["dog"]


def test_names_hold_spaces_accents_and_number_signs(folder):
    Image.new("RGB", (8, 8)).save(folder / "b#1.png")
    apart = unicodedata.normalize("NFD", "café.png")
    tokens = write(folder / "t.txt", f"my photo.png#0\ta dog\nb#1.png\ta cat\n{apart}#0\ttea\na.png#0\tbed\n")
    names = write(folder / "names.txt", "my photo.png\nb#1.png\n" + unicodedata.normalize("NFC", apart))
    found = rows(kind="flickr", captions=tokens, images=str(folder), names=names)
    assert found == [("my photo.png", ["a dog"]), ("b#1.png", ["a cat"]), (apart, ["tea"])]


@pytest.mark.parametrize("line", ["no tab", "\tcaption of nothing", "#0\tcaption of nothing"])
def test_a_line_without_an_image_is_named(folder, line):
    with pytest.raises(ValueError, match=r"t\.txt:2 "):
        rows(kind="flickr", captions=write(folder / "t.txt", f"a.png#0\tx\n{line}\n"), images=str(folder))


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0.png"])
def test_a_name_that_no_file_can_have_is_an_absent_image(folder, name):
    tokens = write(folder / "t.txt", f"{name}#0\tx\n")
    write(folder / "metadata.jsonl", json.dumps({"file_name": name, "text": "x"}))
    for source in ({"kind": "folder", "path": str(folder)}, {"kind": "flickr", "captions": tokens, "images": str(folder)}):
        with pytest.raises(FileNotFoundError, match=r"1 of 1 images are absent"):
            rows(**source)
    with pytest.raises(FileNotFoundError, match="name the folder"):
        open_localised(coco(folder, images=[{"id": 1, "file_name": name, "height": 24, "width": 32}]))


def test_a_list_where_an_image_is_named_is_told(folder):
    write(folder / "metadata.jsonl", '{"file_name": ["a.png"], "text": "x"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: file_name must be the name of one file, not \['a\.png'\]"):
        rows(kind="folder", path=str(folder))


def test_commas_that_nobody_quoted_are_named_and_not_cut(folder):
    write(folder / "metadata.csv", "file_name,text\r\na.png,a dog, a cat and a ball\r\n")
    with pytest.raises(ValueError, match=r"metadata\.csv:2 has 3 fields.*double quotes"):
        rows(kind="folder", path=str(folder))
    write(folder / "metadata.csv", 'file_name,text\r\na.png,"a dog, a cat and a ball"\r\n')
    assert rows(kind="folder", path=str(folder)) == [("a.png", ["a dog, a cat and a ball"])]


@pytest.mark.parametrize("content", ["", "\n\n", "file_name,text\n"])
def test_an_empty_table_is_an_error(folder, content):
    write(folder / "metadata.csv", content)
    with pytest.raises(ValueError, match=r"metadata\.csv is empty"):
        rows(kind="folder", path=str(folder))


def test_captions_that_are_no_text_are_left_out(folder, caplog):
    good = {"image_id": 1, "caption": "a dog"}
    for more in ({"image_id": 1, "caption": None}, {"image_id": 9, "caption": "a cat"}, None, {"image_id": [1], "caption": "x"}):
        caplog.clear()
        file = coco(folder, [good, more])
        assert rows(kind="coco", annotations=file, images=str(folder)) == [("a.png", ["a dog"])]
        assert more is None or "left out" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotations": [{"image_id": 1, "bbox": [0, 0, 4, 4]}]}, "without a caption"),
        ({"images": None}, "no list 'images'"),
        ({"images": [7]}, "something else than objects"),
        ({"images": [{"id": 1}]}, "needs an id and a file_name"),
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]}, "both have the id 1"),
    ],
)
def test_what_is_no_captions_file_is_named(folder, content, message):
    file = coco(folder, **content)
    with pytest.raises(ValueError, match=rf"c\.json.*{message}"):
        rows(kind="coco", annotations=file, images=str(folder))


def test_gzipped_instances_are_read(folder):
    file = coco(folder, [{"image_id": 1, "category_id": 3, "bbox": [4, 4, 8, 8]}], "instances.json")
    (folder / "instances.json.gz").write_bytes(gzip.compress((folder / "instances.json").read_bytes()))
    for place in (file, folder / "instances.json.gz"):
        (one,) = open_localised(place)
        assert one.draw((24, 32))["dog"].sum() == 64


@pytest.mark.parametrize("outline", [[[16.0, 16.0]], [[]], [], None, [[1, 2, 3, 4]], [[1, 2, None, 4, 5, 6]], [SQUARE[:-1]], [7]])
def test_the_box_stands_in_for_an_outline_that_goes_around_nothing(folder, outline):
    (one,) = open_localised(coco(folder, [{"image_id": 1, "category_id": 3, "bbox": [4, 4, 8, 8], "segmentation": outline}]))
    assert one.draw((24, 32))["dog"].sum() == 64


def test_objects_without_a_place_are_left_out(folder, caplog):
    good = {"image_id": 1, "category_id": 3, "bbox": [4, 4, 8, 8]}
    for place in (
        {"bbox": None},
        {"bbox": [1, 2]},
        {"bbox": [1, 2, float("nan"), 4]},
        {"segmentation": {"counts": None}, "bbox": None},
    ):
        caplog.clear()
        (one,) = open_localised(coco(folder, [good, good | place]))
        assert one.draw((24, 32))["dog"].sum() == 64 and "1 objects" in caplog.text


@pytest.mark.parametrize(
    "part",
    [
        {"polygons": [[0, 0, 1e9, 0, 1e9, 1e9]]},
        {"polygons": [[0, 0, float("nan"), 0, 5, 5]]},
        {"runs": "`0000", "size": [24, 32]},
        {"runs": "P" * 200, "size": [24, 32]},
        {"runs": "\u00e9", "size": [24, 32]},
        {"runs": [10**12], "size": [24, 32]},
        {"runs": [-5, 24 * 32 + 5], "size": [24, 32]},
        {"runs": [24 * 32], "size": None},
        {"runs": [], "size": [24, 32]},
        {"box": [1, 2]},
        {"box": None},
        {},
    ],
)
def test_damaged_places_are_errors_and_not_the_end_of_the_process(part):
    """pycocotools ends the process (a segmentation fault) for most of these."""
    with pytest.raises(ValueError, match=r".{20}"):
        draw_region({"parts": [part]}, (24, 32))


def test_packed_codes_are_unpacked_as_pycocotools_does():
    packing = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = rng.random((24, 32)) < rng.random()
        mask[:, : rng.integers(32)] = bool(rng.integers(2))
        counts = packing.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        for runs in (counts, runs_of(mask)["runs"]):
            assert (draw_region({"parts": [{"runs": runs, "size": [24, 32]}]}, (24, 32)) == mask).all()


@pytest.mark.parametrize(
    "line", ["0 .5 .5 nan .5", "0.5 .5 .5 .5 .5", "inf .5 .5 .5 .5", "nan .5 .5 .5 .5", "0 .5 .5", "dog .5 .5 .5 .5"]
)
def test_labels_that_are_none_are_named(folder, line):
    (folder / "labels").mkdir()
    write(folder / "labels" / "a.txt", f"\n{line}\n")
    with pytest.raises(ValueError, match=r"a\.txt:2 "):
        open_localised(folder / "labels", folder, write(folder / "names.txt", "dog"))


def test_a_label_of_two_images_is_an_error(folder):
    (folder / "labels").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    write(folder / "labels" / "a.txt", "0 .5 .5 .5 .5")
    with pytest.raises(ValueError, match=r"a\.jpg or of a\.png"):
        open_localised(folder / "labels", folder, write(folder / "names.txt", "dog"))
    assert open_images(folder, limit=1).key(0) == "a.jpg"
