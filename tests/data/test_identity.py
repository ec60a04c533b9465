"""Images are known by what they show: a copy is the same one, an edited one is not."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from devil_hf.data.captioned import open_captioned
from devil_hf.data.identity import LARGE, PairIdentities, file_identity, image_identity
from devil_hf.data.images import open_images
from devil_hf.data.pairs import PAIR_FEATURES, open_pairs
from devil_hf.evaluation.localisation import MapsEvaluator, MapsSettings


@given(size=st.integers(1, LARGE), at=st.integers(0, LARGE), more=st.binary(min_size=1, max_size=3))
def test_a_copy_is_the_same_and_a_changed_file_is_not(size, at, more, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    content = bytearray(np.random.default_rng(size).bytes(size))
    (folder / "a").write_bytes(content)
    shutil.copy(folder / "a", folder / "b")
    os.utime(folder / "b", (0, 0))
    assert file_identity(folder / "a") == file_identity(folder / "b")
    flipped = bytearray(content)
    flipped[at % size] ^= 1
    for changed in (flipped, content + more):
        (folder / "b").write_bytes(changed)
        os.utime(folder / "b", (0, 0))
        assert file_identity(folder / "a") != file_identity(folder / "b")


@given(size=st.integers(LARGE + 1, 2 * LARGE), at=st.integers(0, LARGE))
def test_a_large_file_is_the_same_where_the_copy_keeps_its_time_and_a_changed_one_is_not(size, at, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    content = bytearray(size)
    (folder / "a").write_bytes(content)
    shutil.copy2(folder / "a", folder / "b")
    assert file_identity(folder / "a") == file_identity(folder / "b")
    content[at] ^= 1
    (folder / "b").write_bytes(content)
    os.utime(folder / "b", ns=(0, (folder / "a").stat().st_mtime_ns + 1))
    assert file_identity(folder / "a") != file_identity(folder / "b")


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "tiff"])
def test_pictures_that_differ_in_the_middle_alone_are_two(suffix, tmp_path):
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (128, 128), "white")
        picture.paste(colour, (48, 48, 80, 80))
        picture.save(tmp_path / f"{colour}.{suffix}")
    assert file_identity(tmp_path / f"red.{suffix}") != file_identity(tmp_path / f"blue.{suffix}")


def test_what_is_no_file_is_known_by_its_name(tmp_path):
    assert file_identity(tmp_path / "none") != file_identity(tmp_path / "nothing") != file_identity(None)
    assert len({file_identity("a\0"), file_identity("b\0"), file_identity("\ud800"), file_identity("x" * 300)}) == 4


ABSENT = """
import numpy as np
from datasets import Dataset, Image
from devil_hf.data.identity import PairIdentities, image_identity
from devil_hf.data.images import open_images
from devil_hf.data.pairs import PAIR_FEATURES

print([image_identity(one) for one in (None, {"bytes": None, "path": None}, np.array([None, "a"]), [[1, 2], [3]], object())])
print(open_images(Dataset.from_dict({"image": [None, None]}).cast_column("image", Image())).identity)
print(open_images([None, object()]).identity)
rows = {"key": ["a"], "image": [None], "captions": [["a dog"]], "region": [None], "problem": [None]}
pairs = PairIdentities([], Dataset.from_dict(rows, features=PAIR_FEATURES))
print(pairs(0), pairs.all())
"""


def test_what_is_no_image_is_known_alike_in_every_process():
    """numpy hands out the addresses of objects, which are others in the next process."""
    said = [subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert said[0] == said[1] and said[0]
    assert image_identity(None) == image_identity({"bytes": None, "path": None}) != image_identity(object())


def test_a_broken_picture_of_a_list_is_known_and_does_not_end_the_opening(images, tmp_path):
    images[0].save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    half = Image.open(tmp_path / "half.png")
    assert open_images([half, images[1]]).identity == open_images([half, images[1]]).identity


def test_which_of_two_rows_has_the_image_counts(tmp_path, images):
    images[0].save(tmp_path / "0.png")
    there, absent = {"bytes": None, "path": str(tmp_path / "0.png")}, None

    def known(*pictures):
        rows = {"key": ["a", "a"], "image": pictures, "captions": [["a dog"]] * 2, "region": [None] * 2, "problem": [None] * 2}
        return PairIdentities([], Dataset.from_dict(rows, features=PAIR_FEATURES)).all()

    assert known(there, absent) == known(there, absent) != known(absent, there)


def test_embedded_images_are_known_as_one_by_one_in_the_order_that_is_asked(images):
    rows = Dataset.from_dict({"image": images * 50 + [None]}).cast_column("image", ImageFeature())
    opened, asked = open_images(rows), [150, 3, 0, 149]
    stored = rows.cast_column("image", ImageFeature(decode=False))
    assert opened.hashes(asked) == [image_identity(stored[number]["image"]) for number in asked]


def test_tensors_are_known_by_their_values(images):
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 2, 2)
    assert image_identity(tensor) == image_identity(tensor.clone().requires_grad_()) != image_identity(tensor + 1)
    assert image_identity([images[0], images[1]]) != image_identity([images[1], images[0]])


@pytest.fixture
def masked(tmp_path):
    """A VOC folder of one image with two classes, whose mask is a file."""
    for name in ("Annotations", "JPEGImages", "SegmentationClass"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (60, 40), "grey").save(tmp_path / "JPEGImages/one.jpg")
    box = "<bndbox><xmin>11</xmin><ymin>9</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    objects = "".join(f"<object><name>{name}</name>{box}</object>" for name in ("dog", "cat"))
    (tmp_path / "Annotations/one.xml").write_text(f"<annotation><filename>one.jpg</filename>{objects}</annotation>")
    write_mask(tmp_path, 12)
    return tmp_path


def write_mask(folder, index):
    classes = np.zeros((40, 60), dtype=np.uint8)
    classes[8:20, 10:30], classes[8:20, 40:50] = index, 8
    Image.fromarray(classes).save(folder / "SegmentationClass/one.png")


def test_regions_are_known_by_their_mask_files_read_once_and_survive_their_absence(masked, monkeypatch):
    rows = open_pairs([{"kind": "regions", "path": str(masked)}], seed=0, shuffle=False)
    known = PairIdentities([], rows)
    before, read = known.all(), []
    assert before == known.all()
    write_mask(masked, 13)
    monkeypatch.setattr("devil_hf.data.identity.file_identity", lambda path: read.append(str(path)) or file_identity(path))
    assert before != known.all()
    assert len(rows) == 2 and sum(path.endswith("SegmentationClass/one.png") for path in read) == 1
    (masked / "SegmentationClass/one.png").unlink()
    assert known.all() == known.all() != before
    assert known(0) and known(1)  # the decoder says what is bad


def test_maps_are_made_anew_where_a_mask_file_is_another(masked):
    def known():
        run = MapsEvaluator(MapsSettings(source=str(masked), boards=0))
        (key,) = run.open()
        return run.identity(key)

    before = known()
    assert before == known()
    write_mask(masked, 13)
    assert known() != before


@pytest.fixture
def folder(images, tmp_path):
    for number in range(4):
        images[number % 3].rotate(number).save(tmp_path / f"{number}.png")
    return tmp_path


def open_folder(folder):
    return open_images(folder)


def open_list(folder):
    return open_images(sorted(folder.iterdir()))


def open_pictures(folder):
    return open_images([Image.open(path) for path in sorted(folder.iterdir())])


def open_dataset(folder):
    paths = [str(path) for path in sorted(folder.iterdir())]
    return open_images(Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature()))


@pytest.mark.parametrize("opened", [open_folder, open_list, open_pictures, open_dataset])
def test_a_source_is_another_one_when_any_image_is(opened, folder, images):
    before = opened(folder)
    assert before.identity == opened(folder).identity
    kept, held = before.split(2)
    assert len({before.identity, kept.identity, held.identity}) == 3
    images[0].rotate(77).save(folder / "2.png")
    assert opened(folder).identity != before.identity or opened is open_pictures  # whose files are not read twice
    assert opened(folder).split(2)[1].identity == held.identity


def test_pixels_decide_of_pictures_and_arrays(images):
    assert image_identity(images[0]) == image_identity(images[0].copy()) != image_identity(images[1])
    array = np.asarray(images[0])
    assert image_identity(array) == image_identity(array.copy()) != image_identity(array[:, ::-1])


def test_pairs_are_known_row_by_row_and_streams_by_their_shards(folder, images):
    lines = [f'{{"image": "{number}.png", "caption": "a dog"}}\n' for number in range(4)]
    (folder / "captions.jsonl").write_text("".join(lines))
    sources = [{"kind": "folder", "path": str(folder)}]

    def known():
        return PairIdentities(sources, open_pairs(sources, seed=0, shuffle=False))

    before = [known()(at) for at in range(5)]
    assert before == [known()(at) for at in range(5)] and before[4] is None
    images[0].rotate(77).save(folder / "2.png")
    assert [known()(at) == before[at] for at in range(4)] == [True, True, False, True]
    world = [{"kind": "shapes", "size": 3, "seed": 0}]
    stream = PairIdentities(sources + world, open_pairs(sources + world, seed=0, shuffle=False))
    assert stream.all() == stream(0) == stream(3)
    images[1].rotate(78).save(folder / "2.png")
    after = PairIdentities(sources + world, open_pairs(sources + world, seed=0, shuffle=False))
    assert stream.all() != after.all() == after(0)


def test_an_image_that_is_gone_is_named(folder):
    (folder / "captions.jsonl").write_text("".join(f'{{"image": "{number}.png", "caption": "a dog"}}\n' for number in range(4)))
    found = open_captioned(str(folder))
    (folder / "2.png").unlink()
    with pytest.raises(OSError, match=r"image .*2\.png.* cannot be read any more"):
        found.load(2)
