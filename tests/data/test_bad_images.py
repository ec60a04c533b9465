"""Images as disks hold them: each is read as it is meant, or is bad; a bad one is named and ends no pass."""

import io
import os
import random

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from devil_hf.data.decoding import BadImage, BadSamples, PairDecoder, read_picture
from devil_hf.data.images import StreamedImages, open_images
from devil_hf.data.pairs import open_pairs
from devil_hf.data.unit_reader import pixel_batches
from devil_hf.model.image_processing_devil import load_images


def encoded(kind, size=(64, 48), colour="red", **options):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **options)
    return file.getvalue()


def bad_files():
    rotated = Image.Exif()
    rotated[0x112], rotated[0x10E] = 6, "x" * 50
    odd = bytearray(encoded("JPEG", exif=rotated))
    at = odd.find(b"Exif") + 6
    rng, refused = random.Random(0), None
    while refused is None:  # EXIF at which Pillow raises a struct.error
        tried = bytearray(odd)
        for _ in range(6):
            tried[at + rng.randrange(90)] = rng.randrange(256)
        try:
            load_images(Image.open(io.BytesIO(bytes(tried))))
        except ValueError:
            refused = bytes(tried)
    dds = bytearray(encoded("DDS"))
    dds[12:20] = b"\xff" * 8
    avif = encoded("AVIF")
    return {
        "exif.jpg": refused,
        "truncated.jpg": encoded("JPEG", size=(600, 400))[:900],
        "cut.png": encoded("PNG")[:60],
        "cut.webp": encoded("WEBP")[:30],
        "cut.tif": encoded("TIFF")[:40],
        "avif.png": avif[: len(avif) // 2],  # Pillow goes by the content
        "dds.bmp": bytes(dds),
        "empty.jpg": b"",
        "text.jpg": b"<html>404 not found</html>",
        "huge.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, content in bad_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink(tmp_path / "nothing", tmp_path / "gone.png")
    for number in range(2):
        Image.new("RGB", (64, 48), "red").save(tmp_path / f"folder.jpg/good {number}.png")
    return tmp_path


def test_a_pass_over_a_folder_does_without_bad_images_and_names_them(folder, processor, caplog):
    images = open_images(folder)
    assert {images.key(number) for number in images.numbers} == {*bad_files(), *(f"folder.jpg/good {n}.png" for n in range(2))}
    for workers in (0, 2):
        caplog.clear()
        batches = list(pixel_batches(images, processor.image_processor, 3, workers=workers))
        assert [images.key(number) for numbers, _, _ in batches for number in numbers] == [
            f"folder.jpg/good {n}.png" for n in range(2)
        ]
        assert workers or all(f"({name}) is left out: " in caplog.text for name in bad_files())
        assert "404" not in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_bad_image_that_is_read_twice_is_told_of_once(folder, caplog, streamed):
    listed = open_images(folder)
    read = lambda: ({"image": listed.load(number)} for number in listed.numbers)  # noqa: E731
    images = StreamedImages("a stream", read) if streamed else listed
    once = [number for number, picture in images.stream() if picture is None]
    assert once and [number for number, picture in images.stream() if picture is None] == once
    assert len([record for record in caplog.records if "is left out" in record.getMessage()]) == len(once)


def test_a_stream_of_pairs_does_without_bad_images_and_counts_them(folder, caplog):
    lines = [f'{{"image": "{name}", "text": "x"}}' for name in (*bad_files(), "folder.jpg/good 0.png", "folder.jpg/good 1.png")]
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    bad = BadSamples(limit=1.0)
    decode = PairDecoder(bad)
    found = [sample["key"] for row in open_pairs([{"kind": "folder", "path": str(folder)}], 0, False) if (sample := decode(row))]
    assert found == ["folder.jpg/good 0.png", "folder.jpg/good 1.png"]
    assert (bad.read, bad.bad) == (len(lines), len(bad_files()))
    assert all(f"skipped {name}: broken image" in caplog.text for name in bad_files())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_data_set_does_without_bad_images(folder, processor, caplog, streamed):
    contents = [*bad_files().values(), encoded("PNG"), None]
    rows = [None if content is None else {"bytes": content, "path": None} for content in contents]
    dataset = Dataset.from_dict({"image": rows, "key": list(map(str, range(len(rows))))}).cast_column("image", ImageFeature())
    images = open_images(dataset.to_iterable_dataset() if streamed else dataset)
    good = len(bad_files())
    assert [number for number, picture in images.stream() if picture is not None] == [good]
    assert [n for numbers, _, _ in pixel_batches(images, processor.image_processor, 4) for n in numbers] == [good]
    ((number, key, _),) = images.fetch([good])
    assert (number, key) == (good, str(good)) and f"image {good + 1} " in caplog.text


def test_whatever_is_wrong_with_exif_is_answered_or_a_value_error():
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "x" * 50
    raw, rng = encoded("JPEG", exif=exif), random.Random(1)
    start = raw.find(b"Exif") + 6
    for _ in range(300):
        changed = bytearray(raw)
        for _ in range(rng.choice([1, 2, 6])):
            changed[start + rng.randrange(90)] = rng.randrange(256)
        try:
            (image,) = load_images(Image.open(io.BytesIO(bytes(changed))))
        except (OSError, ValueError):
            continue
        assert image.size in ((64, 48), (48, 64))


def test_odd_but_sound_images_are_read(tmp_path):
    grey16 = np.full((48, 64), 65535, np.uint16)
    Image.fromarray(grey16).save(tmp_path / "16.png")
    Image.new("CMYK", (64, 48), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    first, second = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    first.convert("P").save(tmp_path / "palette.png", transparency=0)
    found = {path.name: np.asarray(read_picture(lambda path=path: path))[24, 32] for path in sorted(tmp_path.iterdir())}
    assert (found["16.png"] == 255).all()
    for name, wanted in {"cmyk.jpg": [255, 0, 0], "animated.gif": [255, 0, 0]}.items():
        assert np.abs(found[name].astype(int) - wanted).max() < 6, name


@pytest.mark.parametrize("image", [None, {}, {"bytes": None, "path": None}, 7, "none.png", {"bytes": b"secret", "path": "a"}])
def test_what_holds_no_image_is_bad(image):
    with pytest.raises(BadImage) as error:
        read_picture(lambda: image)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_split_that_cannot_be_chosen_is_an_error(folder, tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    rows = Dataset.from_dict({"image": [{"bytes": encoded("PNG"), "path": None}]}).cast_column("image", ImageFeature())
    rows.save_to_disk(saved / "one")
    DatasetDict({"val": rows}).save_to_disk(saved / "several")
    for source in ("shapes:3", str(saved / "one"), [Image.new("RGB", (8, 8))], rows, rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="split='test'"):
            open_images(source, split="test")
    with pytest.raises(ValueError, match=r"no split 'train'; its splits are \['val'\]"):
        open_images(str(saved / "several"))
    with pytest.raises(FileNotFoundError, match="hold none of"):
        open_images(folder, split="test")
    (folder / "test").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "test" / "c.png")
    (folder / "test" / "metadata.csv").write_text("file_name,text\nc.png,x\n", encoding="utf-8")
    assert [open_images(folder, split="test").key(0), len(open_images(folder, split="test"))] == ["c.png", 1]
    (folder / "metadata.csv").write_text("file_name,split\na.png,train\nb.png,test\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column captions"):
        open_images(folder, split="test")
    (folder / "metadata.csv").write_text("file_name,text,split\na.png,x,train\nb.png,y,test\n", encoding="utf-8")
    chosen = open_images(folder, split="test")
    assert [chosen.key(number) for number in chosen.numbers] == ["b.png"]
    with pytest.raises(ValueError, match="limit=0"):
        open_images(folder, limit=0)
