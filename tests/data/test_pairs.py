"""Pairs of every kind of source: complete, in a reproducible order, and bad samples counted instead of fatal."""

import csv
import gzip
import json
import logging
import os
import tarfile
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import islice
from threading import Thread

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader

from devil_hf.data.decoding import BadSamples, PairDecoder, PairStream, PairTable, TooManyBadSamples
from devil_hf.data.pairs import open_pairs
from devil_hf.data.pairs.shards import expand_urls, shard_rows

datasets.disable_progress_bars()


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(value: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 6), (value % 256, 0, 0))


def write_shard(path, samples) -> None:
    """`samples`: (key, {ending: bytes}), in the order and with the end mark of img2dataset."""
    with tarfile.open(path, "w") as archive:
        for key, fields in samples:
            for ending, content in sorted(fields.items()):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))


def sample(key: str, caption: str | None = None, image: bytes | None = None) -> tuple[str, dict[str, bytes]]:
    caption = f"caption of {key}" if caption is None else caption
    description = json.dumps({"caption": f"json {key}", "key": key}).encode()
    return key, {"jpg": image or encoded(picture(int(key))), "json": description, "txt": caption.encode()}


@pytest.fixture
def cc3m(tmp_path):
    """Three shards of twelve samples; one image is broken, one caption empty, and the middle shard is cut in half."""
    folder = tmp_path / "cc3m"
    folder.mkdir()
    for shard in range(3):
        samples = [sample(f"{shard:05d}{number:04d}") for number in range(12)]
        if shard == 0:
            samples[3] = sample("000000003", image=encoded(picture())[:60])
            samples[5] = sample("000000005", caption=" \n")
        write_shard(folder / f"{shard:05d}.tar", samples)
    cut = folder / "00001.tar"
    with tarfile.open(cut) as archive:
        half_a_text = archive.getmember("000010006.txt").offset_data + 5
    os.truncate(cut, half_a_text)
    return str(folder / "{00000..00002}.tar")


READABLE = {f"{shard:05d}{number:04d}" for shard, count in enumerate((12, 6, 12)) for number in range(count)}
GOOD = READABLE - {"000000003", "000000005"}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    (root / "images").mkdir(parents=True)
    for number in range(6):
        picture(number).save(root / f"images/{number}.jpg")
    lines = [
        {"image": f"images/{n}.jpg", "captions": [f"c {n}", f"d {n}"], "split": "val" if n > 3 else "train"} for n in range(6)
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def keys(rows) -> list[str]:
    return [row["key"] for row in rows]


def decoded(rows, decoder: PairDecoder) -> list[dict]:
    return [item for item in map(decoder, rows) if item is not None]


def row_of(content: bytes, *captions: str) -> dict:
    image = {"bytes": content, "path": None}
    return {"key": "k", "image": image, "captions": list(captions), "region": None, "problem": None}


def read(stream, workers: int, batches: int | None = None) -> list:
    """The batches of a loader; `stream` gives rows or samples."""
    return list(islice(DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=list), batches))


def told(batches: list) -> list:
    return [(item["key"], item["caption"], item["seed"]) for batch in batches for item in batch]


# ----------------------------------------------------------------------------------------------------------------
# kinds of sources


def test_a_caption_folder_is_opened_without_decoding(folder):
    (folder / "images/1.jpg").write_bytes(b"no image")
    pairs = open_pairs([{"kind": "folder", "path": str(folder), "split": "train"}], seed=0, shuffle=False)
    assert keys(pairs) == [f"images/{n}.jpg" for n in range(4)]
    assert pairs[1]["image"] == {"bytes": None, "path": str(folder / "images/1.jpg")}
    assert pairs[1]["captions"] == ["c 1", "d 1"]


def test_imagefolder_metadata_as_json_csv_and_split_folders(folder):
    (folder / "captions.jsonl").unlink()
    with (folder / "images/metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["0.jpg", "a, b"], ["1.jpg", ""]])
    inner = open_pairs([{"kind": "folder", "path": str(folder), "split": "images"}], seed=0, shuffle=False)
    assert list(inner["captions"]) == [["a, b"], [""]]
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "images/2.jpg", "x": "one", "y": ["two", None]}))
    source = {"kind": "folder", "path": str(folder), "caption_column": ["x", "y"]}
    assert open_pairs([source], seed=0, shuffle=False)[0]["captions"] == ["one", "two"]


def test_flickr_and_coco_files_give_the_images_of_a_split(folder, tmp_path):
    tokens, names, coco = tmp_path / "tokens.txt.gz", tmp_path / "train.txt", tmp_path / "coco.json"
    with gzip.open(tokens, "wt") as file:
        file.writelines(f"{n}.jpg#{c}\ttext {n} {c}\n" for n in (2, 0, 9) for c in range(2))
    names.write_text("0.jpg\n2.jpg\n")
    annotations = [{"image_id": n, "caption": f"coco {n}"} for n in (4, 3)]
    coco.write_text(json.dumps({"images": [{"id": n, "file_name": f"{n}.jpg"} for n in (3, 4, 5)], "annotations": annotations}))
    images = str(folder / "images")
    flickr = {"kind": "flickr", "captions": str(tokens), "images": images}
    pairs = open_pairs([flickr | {"names": str(names)}, {"kind": "coco", "annotations": str(coco), "images": images}], 0, False)
    assert keys(pairs) == ["0.jpg", "2.jpg", "4.jpg", "3.jpg"]
    assert pairs[1]["captions"] == ["text 2 0", "text 2 1"] and pairs[2]["captions"] == ["coco 4"]
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are absent.*9\.jpg"):
        open_pairs([flickr], 0, False)
    assert keys(open_pairs([flickr | {"allow_missing": True}], 0, False)) == ["2.jpg", "0.jpg"]
    with pytest.raises(ValueError, match=r"1 of 1 images have no caption.*7\.jpg"):
        open_pairs([flickr | {"names": ["7.jpg"]}], 0, False)


@pytest.mark.parametrize(
    ("layout", "streaming"), [("parquet", False), ("parquet", True), ("save_to_disk", False), ("dataset_dict", True)]
)
def test_data_sets_are_opened_by_their_column_names(tmp_path, layout, streaming):
    rows = {"im": [picture(n) for n in range(5)], "text": [f"t {n}" for n in range(5)], "more": [["m"]] * 5}
    data = Dataset.from_dict(rows | {"name": list("abcde")}).cast_column("im", datasets.Image())
    if layout == "parquet":
        data.to_parquet(tmp_path / "data/train.parquet")
    else:
        (data if layout == "save_to_disk" else DatasetDict({"train": data})).save_to_disk(tmp_path / "data")
    source = {"kind": "hub", "path": str(tmp_path / "data"), "image_column": "im", "key_column": "name"}
    pairs = open_pairs([source | {"caption_column": ["text", "more"], "streaming": streaming}], 0, False)
    assert isinstance(pairs, IterableDataset if streaming else Dataset)
    rows = list(pairs)
    assert keys(rows) == list("abcde") and rows[2]["captions"] == ["t 2", "m"]
    assert np.array_equal(PairDecoder(BadSamples())(rows[3])["image"], np.asarray(picture(3)))


def test_shapes_are_drawn_alike_streamed_and_stored():
    stored, streamed = (
        open_pairs([{"kind": "shapes", "size": 7, "seed": 3, "streaming": streaming}], 0, False) for streaming in (False, True)
    )
    assert len(list(stored)) == len(list(streamed)) == 7 and len(stored[0]["captions"]) == 5
    for packed, plain in zip(stored, streamed, strict=True):
        one, other = (PairDecoder(BadSamples())(row) for row in (packed, plain))
        assert one["image"].size == (128, 128) and one["image"].tobytes() == other["image"].tobytes()
        assert packed | {"image": None} == plain | {"image": None}


def test_shards_give_text_or_a_json_field_as_caption(cc3m):
    pairs = list(open_pairs([{"kind": "webdataset", "urls": cc3m}], 0, False))
    assert set(keys(pairs)) >= READABLE and pairs[1]["captions"] == ["caption of 000000001"]
    pairs = list(open_pairs([{"kind": "webdataset", "urls": cc3m, "caption_field": "json.caption"}], 0, False))
    assert pairs[1]["captions"] == ["json 000000001"]


def test_shards_are_read_over_http(cc3m, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "cc3m"))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        urls = f"http://127.0.0.1:{server.server_port}/{{00000..00002}}.tar"
        remote = open_pairs([{"kind": "webdataset", "urls": urls}], 0, True)
        assert set(keys(remote)) & READABLE == READABLE
        with pytest.raises(FileNotFoundError, match=r"1 of 4 shards are missing.*00003\.tar"):
            open_pairs([{"kind": "webdataset", "urls": urls.replace("00002", "00003")}], 0, True)
    finally:
        server.shutdown()
        server.server_close()


def test_brace_patterns_expand_as_in_a_shell():
    assert expand_urls("s3://b/{08..11}.tar") == [f"s3://b/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_urls(["{a,b}/{0..1}.tar", "c.tar"]) == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar", "c.tar"]


def test_sources_of_several_kinds_are_one_data_set(folder, cc3m):
    table = {"kind": "folder", "path": str(folder)}
    shapes = {"kind": "shapes", "size": 5, "seed": 0}
    assert len(open_pairs([table, shapes | {"streaming": False}], 0, True)) == 11
    mixed = open_pairs([table, shapes, {"kind": "webdataset", "urls": cc3m}], 0, True)
    found = decoded(mixed, PairDecoder(BadSamples(limit=1)))
    assert Counter(source_of(item["key"]) for item in found) == {"folder": 6, "shapes": 5, "shard": len(GOOD)}


def source_of(key: str) -> str:
    return "folder" if key.startswith("images") else "shapes" if key.startswith("shapes") else "shard"


# ----------------------------------------------------------------------------------------------------------------
# errors before the first step


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "needs a `kind`, one of"),
        ({"kind": "parquet"}, "'parquet'"),
        ({"kind": "folder"}, r"lacks \['path'\]"),
        ({"kind": "folder", "path": "x", "pth": 1}, r"no field 'pth'; its fields are \['path'"),
        ({"kind": "shapes", "size": "5"}, "size='5' must be of type int"),
        ({"kind": "shapes", "size": 0, "seed": 0}, "must both be positive"),
        ({"kind": "folder", "path": "FOLDER", "split": "test"}, r"'test'; its splits are \['train', 'val'\]"),
        ({"kind": "folder", "path": "FOLDER", "caption_column": "alt"}, r"no column alt; its columns are \['captions'"),
        ({"kind": "webdataset", "urls": []}, "list of shards is empty"),
        ({"kind": "hub", "path": "HUB", "image_column": "im", "caption_column": "t", "split": "x"}, 'split "x"'),
        ({"kind": "hub", "path": "HUB", "image_column": "pic", "caption_column": "t"}, r"no column 'pic'.*\['im', "),
        ({"kind": "hub", "path": "HUB", "image_column": "n", "caption_column": "t"}, "'n' holds .*not images"),
        ({"kind": "hub", "path": "HUB", "image_column": "im", "caption_column": "n"}, "'n' holds .*not captions"),
        ({"kind": "hub", "path": "EMPTY", "image_column": "im", "caption_column": "t"}, "is empty"),
    ],
)
def test_a_wrong_source_is_named_with_the_remedy(folder, tmp_path, source, message):
    Dataset.from_dict({"im": [str(folder / "images/0.jpg")], "t": ["x"], "n": [1]}).to_parquet(tmp_path / "h/t.parquet")
    features = datasets.Features({"im": datasets.Image(), "t": datasets.Value("string")})
    Dataset.from_dict({"im": [], "t": []}, features=features).save_to_disk(tmp_path / "e")
    paths = {"FOLDER": str(folder), "HUB": str(tmp_path / "h"), "EMPTY": str(tmp_path / "e")}
    source = {name: paths.get(value, value) if isinstance(value, str) else value for name, value in source.items()}
    with pytest.raises(ValueError, match=rf"sources\[1\].*{message}"):
        open_pairs([{"kind": "shapes", "size": 1, "seed": 0}, source], 0, False)


def test_missing_files_are_found_before_the_first_step(folder, cc3m):
    (folder / "images/5.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"sources\[0\].*1 of 6 images are absent.*5\.jpg"):
        open_pairs([{"kind": "folder", "path": str(folder)}], 0, False)
    with pytest.raises(FileNotFoundError, match=r"1 of 4 shards are missing.*00003\.tar"):
        open_pairs([{"kind": "webdataset", "urls": cc3m.replace("00002", "00003")}], 0, False)
    with pytest.raises(ValueError, match="no member with the ending alt"):
        open_pairs([{"kind": "webdataset", "urls": cc3m, "caption_field": "alt"}], 0, False)


# ----------------------------------------------------------------------------------------------------------------
# bad samples


def test_whatever_the_cut_whole_samples_are_used_and_the_shard_is_reported(tmp_path):
    path = tmp_path / "0.tar"
    write_shard(path, [sample(f"{number:03d}") for number in range(10)])
    with tarfile.open(path) as archive:
        ends = [member.offset_data + member.size for member in archive if member.name.endswith("txt")]
        members = [member.offset for member in archive]
    for cut in sorted({*range(0, ends[-1], 1531), *members, *ends}, reverse=True):
        os.truncate(path, cut)
        *rows, damage = shard_rows([str(path)], "txt")
        assert keys(rows) == [f"{number:03d}" for number, end in enumerate(ends) if end <= cut]
        assert all(row["problem"] is None and row["captions"] for row in rows)
        assert damage["key"] == str(path) and f"behind {len(rows)} whole samples" in damage["problem"]


def test_bad_samples_are_left_out_counted_and_logged_with_their_keys(cc3m, caplog):
    bad = BadSamples(limit=0.2)
    with caplog.at_level(logging.WARNING):
        found = decoded(open_pairs([{"kind": "webdataset", "urls": cc3m}], 0, True), PairDecoder(bad))
    assert set(keys(found)) == GOOD and (bad.read, bad.bad) == (len(READABLE) + 1, 3)
    for key in ("000000003: broken image", "000000005: empty caption", "00001.tar: the shard is damaged behind 6 "):
        assert sum(key in record.message for record in caplog.records) == 1


def test_the_run_stops_when_more_than_the_limit_is_bad(cc3m):
    pairs = open_pairs([{"kind": "webdataset", "urls": cc3m}], 0, True)
    with pytest.raises(TooManyBadSamples, match=r"of \d+ samples .* are bad, more than the limit of 5\.0%"):
        decoded(pairs, PairDecoder(BadSamples(minimum=20)))
    bad = BadSamples()  # too few samples to judge while reading
    assert len(decoded(pairs, PairDecoder(bad))) == len(GOOD)
    with pytest.raises(TooManyBadSamples, match="3 of 31 samples"):
        bad.judge()


def test_workers_share_one_count_and_their_error_reaches_the_main_process(cc3m):
    pairs = open_pairs([{"kind": "webdataset", "urls": cc3m}], 0, True)
    bad = BadSamples(limit=1)
    used = read(PairStream(pairs, PairDecoder(bad)), 2, batches=20)
    assert {item["place"][0] for batch in used for item in batch} == {0, 1}
    assert bad.read >= 80 and bad.bad >= 3  # workers work ahead
    with pytest.raises(TooManyBadSamples, match=r"of \d+ samples"):
        read(PairStream(pairs, PairDecoder(BadSamples(limit=0, minimum=5))), 2, batches=20)


def test_a_stream_without_a_good_sample_ends_with_an_error(cc3m):
    pairs = open_pairs([{"kind": "webdataset", "urls": cc3m}], 0, True).filter(lambda row: row["problem"] is not None)
    with pytest.raises(TooManyBadSamples, match="passes gave not one good sample"):
        next(iter(PairStream(pairs, PairDecoder(BadSamples(limit=1)))))


def test_a_table_replaces_a_bad_row_always_by_the_same_other_row(folder):
    (folder / "images/2.jpg").write_bytes(b"no image")
    pairs = open_pairs([{"kind": "folder", "path": str(folder)}], 0, False)

    def samples(limit: float, epoch: int = 0) -> list[str]:
        table = PairTable(pairs, PairDecoder(BadSamples(limit), seed=1))
        return keys(table.sample(index, epoch) for index in range(len(table)))

    assert samples(0.5) == samples(0.5, epoch=3)
    assert samples(0.5)[:2] == ["images/0.jpg", "images/1.jpg"] and "images/2.jpg" not in samples(0.5)
    with pytest.raises(TooManyBadSamples):
        samples(0.05)  # one of six is more
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(TooManyBadSamples, match="mend the data"):
        samples(1)


def gradient(mode: str) -> Image.Image:
    return Image.fromarray(np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)).convert(mode)


EXOTIC = {
    "cmyk": encoded(gradient("CMYK"), "JPEG"),
    "palette with transparency": encoded(gradient("P"), "PNG", transparency=0),
    "16 bit": encoded(Image.fromarray(np.full((6, 8), 40_000, dtype=np.uint16)), "PNG"),
    "alpha": encoded(gradient("RGBA"), "PNG"),
    "grey and alpha": encoded(gradient("LA"), "PNG"),
    "one bit": encoded(gradient("1"), "PNG"),
    "float": encoded(Image.fromarray(np.full((6, 8), 0.5, dtype=np.float32)), "TIFF"),
    "animated": encoded(gradient("P"), "GIF", save_all=True, append_images=[gradient("P").rotate(180)]),
    "one pixel": encoded(Image.new("RGB", (1, 1)), "PNG"),
    "webp": encoded(gradient("RGB"), "WEBP"),
}


@pytest.mark.parametrize("name", EXOTIC)
def test_exotic_images_train_like_any_other(name):
    bad = BadSamples()
    item = PairDecoder(bad)(row_of(EXOTIC[name], "", " a  cat\n"))
    assert item["image"].mode == "RGB" and item["image"].size == ((1, 1) if name == "one pixel" else (8, 6))
    assert item["captions"] == ["a cat"] and item["caption"] == "a cat" and (bad.read, bad.bad) == (1, 0)


def test_a_rotated_photograph_is_made_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (8, 6)), exif=exif)
    assert PairDecoder(BadSamples())(row_of(content, "x"))["image"].size == (6, 8)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(encoded(picture())[:-40], "OSError"), (b"", "cannot identify"), (b"<svg/>", "cannot identify")],
)
def test_a_broken_image_is_a_bad_sample(content, problem, caplog):
    assert PairDecoder(BadSamples())(row_of(content, "x")) is None
    assert "skipped k: broken image" in caplog.text and problem in caplog.text


def test_a_decompression_bomb_is_a_bad_sample(monkeypatch):
    content = encoded(picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # of 48
    bad = BadSamples()
    assert PairDecoder(bad)(row_of(content, "x")) is None and bad.bad == 1


# ----------------------------------------------------------------------------------------------------------------
# order, coverage, resume


@pytest.mark.parametrize("shards", [2, 3, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_two_nodes_with_two_workers_each_see_every_row_exactly_once(cc3m, tmp_path, shards, shuffle):
    write_shard(tmp_path / "cc3m/00003.tar", [sample(f"00003{number:04d}") for number in range(5)])
    pairs = open_pairs([{"kind": "webdataset", "urls": cc3m.replace("00002", f"{shards - 1:05d}")}], 5, shuffle, 8)
    expected = Counter(keys(pairs))
    assert set(expected.values()) == {1}
    for epoch in range(2):
        seen = Counter()
        for node in range(2):
            part = split_dataset_by_node(pairs, node, 2)
            part.set_epoch(epoch)
            seen.update(key for batch in read(part, workers=2) for key in keys(batch))
        assert seen == expected


def test_a_mixed_stream_covers_every_row_over_nodes_and_workers(folder):
    pairs = open_pairs([{"kind": "folder", "path": str(folder)}, {"kind": "shapes", "size": 9, "seed": 0}], 0, True, 4)
    parts = [split_dataset_by_node(pairs, node, 2) for node in range(2)]
    seen = Counter(key for part in parts for batch in read(part, workers=2) for key in keys(batch))
    assert len(seen) == 15 and set(seen.values()) == {1}


def test_order_captions_and_seeds_depend_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list:
        pairs = open_pairs([{"kind": "shapes", "size": 40, "seed": 0}], seed, True, 8)
        return told(read(PairStream(pairs, PairDecoder(BadSamples(), seed), [(epoch, 0)]), 0, batches=10))

    first = order(0, 0)
    np.random.seed(1)
    torch.manual_seed(1)
    assert order(0, 0) == first
    other = order(0, 1)
    assert [key for key, _, _ in other] != [key for key, _, _ in first] != [key for key, _, _ in order(1, 0)]
    assert sorted(key for key, _, _ in other) == sorted(key for key, _, _ in first)
    assert {item[0]: item[1] for item in other} != {item[0]: item[1] for item in first}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_goes_on_exactly_from_its_places(cc3m, workers):
    pairs = open_pairs([{"kind": "webdataset", "urls": cc3m}], 0, True, 8)

    def batches(count: int, places=()) -> list:
        return read(PairStream(pairs, PairDecoder(BadSamples(limit=1)), places), workers, count)

    whole = batches(30)  # 120 samples are more than four passes
    assert {key for key, _, _ in told(whole)} <= GOOD and told(batches(30)) == told(whole)
    places = {item["place"][0]: item["place"][1:] for batch in whole[:16] for item in batch}
    assert max(epoch for epoch, _ in places.values()) > 0
    assert told(batches(14, [places[worker] for worker in range(workers)])) == told(whole[16:])
