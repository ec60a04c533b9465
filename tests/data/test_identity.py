"""Images are known by what they show: a copy is the same one, an edited one is not."""

import os
import shutil

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from devil_hf.data.captioned import open_captioned
from devil_hf.data.identity import BLOCK, PairIdentities, file_identity, image_identity
from devil_hf.data.images import open_images
from devil_hf.data.pairs import open_pairs


@given(size=st.integers(0, 4 * BLOCK), at=st.integers(0, 2**20), more=st.binary(max_size=3))
def test_a_copy_is_the_same_and_a_changed_small_file_is_not(size, at, more, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    content = bytearray(np.random.default_rng(size).bytes(size))
    (folder / "a").write_bytes(content)
    shutil.copy(folder / "a", folder / "b")
    os.utime(folder / "b", (0, 0))
    assert file_identity(folder / "a") == file_identity(folder / "b")
    changed = content + more
    if not more and 0 < size <= 2 * BLOCK:
        changed[at % size] ^= 1
    (folder / "b").write_bytes(changed)
    assert (file_identity(folder / "a") == file_identity(folder / "b")) == (changed == content)


def test_what_is_no_file_is_known_by_its_name(tmp_path):
    assert file_identity(tmp_path / "none") != file_identity(tmp_path / "nothing") != file_identity(None)


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
