"""Whatever lies in a file, its reader gives the right answer or a documented error: one line that names file or field."""

import csv
import gzip
import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from devil_hf.data.decoding import BadImage, read_picture
from devil_hf.data.images import open_images
from devil_hf.data.objects import open_localised
from devil_hf.data.objects.masks import draw_region
from devil_hf.data.pairs import open_pairs
from devil_hf.data.pairs.files import read_flickr_captions
from devil_hf.data.pairs.folder import read_caption_folder
from devil_hf.data.pairs.shards import shard_rows
from devil_hf.data.specifications import caption_sources, read_specification
from devil_hf.data.worlds import World
from devil_hf.text_files import parse_yaml, read_csv, read_json, read_json_lines, read_list, read_yaml

SIZE = (24, 32)
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)
WORDS = TEXT.map(str.strip).filter(bool)
NAMES = WORDS.filter(lambda name: "/" not in name and name not in (".", ".."))
NUMBERS = st.one_of(st.floats(), st.integers(), st.floats(-50, 50), st.integers(-3, 40))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
JSONS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("readers")
    for name in ("a.png", "b.png"):
        Image.new("RGB", SIZE[::-1]).save(place / name)
    return place


def outcome(call, named=""):
    """What a call gives, or its error, which must be a line that is not too long and names what it is about."""
    try:
        return call()
    except (ValueError, OSError) as error:
        found = error
    assert str(named) in str(found), found
    assert "\n" not in str(found) and len(str(found)) < 1500, str(found)
    return found


def failed(found):
    return isinstance(found, Exception)


@st.composite
def damaged(draw, document):
    """A document in which up to three values, somewhere, are others."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(0, 3))):
        place = document
        while isinstance(place, dict | list) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
                action = draw(st.sampled_from(["other", "gone"]))
                if action == "gone" and isinstance(place, dict):
                    del place[key]
                else:
                    place[key] = draw(JSONS)
                break
            place = place[key]
    return document


def saved(file, text, style):
    """Text as different editors save it; `style` is (line end, encoding, gzipped)."""
    ends, encoding, zipped = style
    content = text.replace("\n", ends).encode(encoding)
    file.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    return file


STYLES = st.tuples(st.sampled_from(["\n", "\r\n"]), st.sampled_from(["utf-8", "utf-8-sig"]), st.booleans())


@given(st.lists(st.dictionaries(TEXT, JSONS, max_size=3), max_size=4), STYLES)
def test_json_lines_come_back(folder, rows, style):
    file = saved(folder / "rows.jsonl", "\n \n".join(json.dumps(row, ensure_ascii=False) for row in rows), style)
    assert json.dumps([row for _, row in read_json_lines(file)]) == json.dumps(rows)


@given(
    st.binary(max_size=60),
    st.sampled_from([read_json, read_yaml, read_list, lambda file: list(read_csv(file)), read_flickr_captions]),
)
def test_any_bytes_are_read_or_named(folder, content, reader):
    file = folder / "bytes"
    file.write_bytes(content)
    outcome(lambda: reader(file), file)


@given(st.lists(NAMES, min_size=1, max_size=4, unique=True), st.data())
def test_a_table_comes_back_whatever_its_fields_hold(folder, columns, data):
    fields = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters='\n\t,"'), max_size=20)
    rows = data.draw(st.lists(st.lists(fields, min_size=len(columns), max_size=len(columns)), max_size=4))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    file = saved(folder / "table.csv", text.getvalue(), data.draw(STYLES))
    assert [list(row.values()) for _, row in read_csv(file)] == [row for row in rows if any(field.strip() for field in row)]


@given(st.text("ab,\"\n'; \t", max_size=40))
def test_a_table_with_slips_is_read_or_named(folder, text):
    file = saved(folder / "slips.csv", text, ("\n", "utf-8", False))
    found = outcome(lambda: list(read_csv(file)), file)
    assert failed(found) or len({len(row) for _, row in found}) <= 1


@given(st.lists(st.tuples(NAMES.filter(lambda name: "#" not in name), TEXT.map(str.strip)), min_size=1, max_size=5), STYLES)
def test_token_files_come_back(folder, lines, style):
    file = saved(folder / "tokens.txt", "\n".join(f"{name}#{n}\t{text}" for n, (name, text) in enumerate(lines)), style)
    wanted: dict[str, list[str]] = {}
    for name, text in lines:
        wanted.setdefault(name, []).append(text)
    assert read_flickr_captions(file) == wanted


@given(damaged([{"image": "a.png", "captions": ["a dog"], "split": "train"}, {"image": "b.png", "captions": "a cat"}]), STYLES)
def test_caption_folders_are_read_or_named(folder, rows, style):
    place = folder / "captions"
    place.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        (place / name).write_bytes((folder / name).read_bytes())
    rows = rows if isinstance(rows, list) else [rows]
    file = saved(place / "captions.jsonl", "\n".join(map(json.dumps, rows)), style)
    listed = outcome(lambda: read_caption_folder(place), file)
    found = outcome(lambda: [*open_pairs([{"kind": "folder", "path": str(place)}], 0, False)], "captions")
    assert not failed(listed) or failed(found)
    for one in [] if failed(found) else found:
        assert Path(one["image"]["path"]).is_file() and all(isinstance(text, str) for text in one["captions"])


COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [4, 4, 8, 8], "segmentation": [[4, 4, 12, 4, 12, 12]], "caption": "a"},
        {"id": 2, "image_id": 1, "category_id": 3, "segmentation": {"counts": [100, 668], "size": list(SIZE)}, "caption": "b"},
        {"id": 3, "image_id": 1, "category_id": 3, "segmentation": {"counts": "T3d0000", "size": list(SIZE)}, "caption": "c"},
    ],
    "categories": [{"id": 3, "name": "dog"}],
}


@given(damaged(COCO), STYLES)
def test_coco_files_are_read_or_named(folder, content, style):
    file = saved(folder / "coco.json", json.dumps(content), style)
    source = {"kind": "coco", "annotations": str(file), "images": str(folder)}
    for row in [] if failed(found := outcome(lambda: [*open_pairs([source], 0, False)], "sources[0] (coco)")) else found:
        assert row["key"] == "a.png" and set(row["captions"]) <= {"a", "b", "c"} | {text for text in row["captions"] if text}
    found = outcome(lambda: open_localised(file, folder))
    for image in [] if failed(found) else found:
        masks = outcome(lambda image=image: image.draw(SIZE), image.key)
        assert failed(masks) or all(mask.shape == SIZE and mask.dtype == bool for mask in masks.values())


VOC = """<annotation><filename>a.png</filename><object><name>dog</name>
<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>12</xmax><ymax>12</ymax></bndbox></object></annotation>"""


@given(st.lists(st.tuples(st.integers(0, len(VOC) - 1), st.sampled_from(list("<>/&0-.\0\ufffeaé"))), max_size=4))
def test_voc_annotations_are_read_or_named(tmp_path_factory, changes):
    place = tmp_path_factory.mktemp("voc")
    (place / "Annotations").mkdir()
    (place / "JPEGImages").mkdir()
    Image.new("RGB", SIZE[::-1]).save(place / "JPEGImages" / "a.png")
    text = list(VOC)
    for at, character in changes:
        text[at] = character
    (place / "Annotations" / "a.xml").write_text("".join(text), encoding="utf-8")
    found = outcome(lambda: open_localised(place), place)
    for image in [] if failed(found) else found:
        assert all(mask.shape == SIZE for mask in image.draw(SIZE).values())


@given(st.lists(st.lists(st.one_of(NUMBERS, st.just(0), st.floats(0, 1), WORDS), max_size=9), max_size=3), STYLES)
def test_yolo_labels_are_read_or_named(folder, lines, style):
    (folder / "labels").mkdir(exist_ok=True)
    names = saved(folder / "names.txt", "dog\nhot dog\n", style)
    saved(folder / "labels" / "a.txt", "\n".join(" ".join(map(str, line)) for line in lines), style)
    found = outcome(lambda: open_localised(folder / "labels", folder, names), folder / "labels")
    for image in [] if failed(found) else found:
        assert set(image.groups) <= {"dog", "hot dog"}
        masks = outcome(lambda image=image: image.draw(SIZE), image.key)
        assert failed(masks) or all(mask.shape == SIZE for mask in masks.values())


PARTS = st.one_of(
    st.fixed_dictionaries({"box": st.lists(NUMBERS, min_size=4, max_size=4)}, optional={"shares": st.booleans()}),
    st.fixed_dictionaries({"polygons": st.lists(st.lists(NUMBERS, max_size=9), max_size=3)}, optional={"shares": st.booleans()}),
    st.fixed_dictionaries({"runs": st.text(max_size=12) | st.lists(NUMBERS, max_size=5), "size": st.just(list(SIZE)) | JSONS}),
    st.fixed_dictionaries({"runs": st.text([chr(code) for code in range(48, 112)], max_size=12), "size": st.just(list(SIZE))}),
    st.fixed_dictionaries({"classes": TEXT, "index": NUMBERS}),
    st.dictionaries(st.sampled_from(["box", "polygons", "runs", "size", "shares"]), JSONS, max_size=3),
)


@given(st.lists(PARTS, max_size=3))
def test_regions_are_drawn_or_named_and_never_end_the_process(parts):
    mask = outcome(lambda: draw_region({"parts": parts}, SIZE))
    assert failed(mask) or (mask.shape == SIZE and mask.dtype == bool)


@given(st.lists(st.tuples(st.floats(-40, 70), st.floats(-40, 70)), min_size=2, max_size=2))
def test_a_box_is_the_pixels_whose_centres_it_holds(corners):
    (left, right), (top, bottom) = (sorted(edge) for edge in zip(*corners, strict=True))
    mask = draw_region({"parts": [{"box": [left, top, right, bottom]}]}, SIZE)
    for row, column in np.ndindex(*SIZE):
        assert mask[row, column] == (top <= row + 0.5 < bottom and left <= column + 0.5 < right)


@given(
    st.one_of(
        TEXT, st.text("shape:0123456789-{}[]kind, ", max_size=20), st.from_regex(r"shapes(:[0-9]{1,6}){0,3}", fullmatch=True)
    )
)
def test_data_specifications_are_read_or_named(text):
    found = outcome(lambda: read_specification(text))
    if isinstance(found, World):
        numbers = [int(number) for number in text.split(":")[1:]]
        assert [found.count, found.seed][: len(numbers)] == numbers
    for call in (caption_sources, open_images, open_localised):
        if isinstance(found, World) and (call is open_localised or found.count > 100):
            continue  # scenes are drawn
        if not (call is open_images and text.count("/") == 1):  # which is a name of the Hub
            outcome(lambda call=call: call(text))


@given(JSONS)
def test_yaml_comes_back(value):
    text = yaml.safe_dump(value, allow_unicode=True)
    assert json.dumps(parse_yaml(text, "here")) == json.dumps(yaml.safe_load(text))


@given(st.text("ab: -[]{}\n\t'\"&*!|>%@#0.,", max_size=40))
def test_yaml_slips_are_named(text):
    outcome(lambda: parse_yaml(text, "here"), "here")


SOURCES = [
    {"kind": "folder", "path": "nowhere", "split": "train"},
    {"kind": "coco", "annotations": "nowhere.json", "images": "nowhere"},
    {"kind": "shapes", "size": 3, "seed": 0},
    {"kind": "regions", "path": "nowhere.json"},
    {"kind": "webdataset", "urls": "nowhere.tar"},
]


@given(st.sampled_from(SOURCES).flatmap(damaged))
def test_sources_are_opened_or_named(source):
    found = outcome(lambda: open_pairs([source], 0, False), "sources[0]")
    assert failed(found) or (isinstance(source, dict) and source["kind"] == "shapes")


def pictures():
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x112] = 6
    kinds = {"JPEG": {"exif": exif}, "PNG": {}, "WEBP": {}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {}}
    kinds |= {"AVIF": {}} if ".avif" in Image.registered_extensions() else {}
    found = []
    for kind, options in (kinds | {"DDS": {}}).items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append(file.getvalue())
    return found


@given(st.sampled_from(pictures()), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5), st.floats(0, 2))
def test_damaged_pictures_are_read_or_bad(content, changes, cut):
    changed = bytearray(content)
    for at, value in changes:
        changed[int(at * min(len(changed) - 1, 400))] = value
    changed = bytes(changed[: int(len(changed) * cut) + 1]) if cut < 1 else bytes(changed)
    picture = outcome(lambda: read_picture(lambda: {"bytes": changed, "path": None}))
    if failed(picture):
        assert isinstance(picture, BadImage) and changed != content
        return
    assert picture.mode == "RGB" and min(picture.size) > 0
    assert changed != content or picture.size in ((40, 30), (30, 40))


def shard():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in {"1.jpg": b"x" * 300, "1.txt": b"a dog", "2.jpg": b"y", "2.json": b'{"text": "a cat"}'}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.floats(0, 2),
    st.booleans(),
    st.sampled_from(["txt", "json.text"]),
)
def test_damaged_shards_give_rows_or_a_problem(folder, changes, cut, zipped, field):
    changed = bytearray(gzip.compress(shard(), mtime=0) if zipped else shard())
    for at, value in changes:
        changed[int(at * (len(changed) - 1) * (1 if zipped else 0.4))] = value
    file = folder / "shard.tar"
    file.write_bytes(bytes(changed[: int(len(changed) * cut) + 1]) if cut < 1 else bytes(changed))
    rows = list(shard_rows([str(file)], field))
    assert all(row["problem"] or (row["image"]["bytes"] and row["captions"]) for row in rows)
    assert changes or cut < 1 or len(rows) == 2


@given(
    st.lists(NAMES, min_size=1, max_size=3, unique_by=lambda name: unicodedata.normalize("NFC", name)),
    st.sampled_from(["NFC", "NFD"]),
)
def test_names_of_any_script_are_found(tmp_path_factory, names, form):
    place = tmp_path_factory.mktemp("names")
    wanted = []
    for name in names:
        on_disk = unicodedata.normalize(form, name)
        if len(on_disk.encode()) < 200:
            (place / on_disk).write_bytes(b"")
            wanted.append(name)
    lines = [json.dumps({"image": name, "caption": "x"}) for name in wanted]
    (place / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if wanted:
        found = [*open_pairs([{"kind": "folder", "path": str(place)}], 0, False)]
        assert [row["key"] for row in found] == wanted and all(Path(row["image"]["path"]).is_file() for row in found)
