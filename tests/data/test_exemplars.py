"""Exemplars of any network: the right images, the right quantiles, in one pass that can be stopped and shared."""

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTModel

from devil_hf.build import backbone_from_source, image_processor_of
from devil_hf.data.exemplar_set import ExemplarSet, layer_file
from devil_hf.data.exemplars import find_exemplars, to_uint8
from devil_hf.data.images import StreamedImages, open_images
from devil_hf.data.quantiles import QuantileSketch
from devil_hf.data.unit_reader import UnitReader, open_network
from devil_hf.folders import CLAIM

COUNT = 23


class Colours(nn.Module):
    """A network of one's own: two layers of small convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 5, 3, 2, 1), nn.ReLU())

    def forward(self, pixels):
        return self.second(self.first(pixels))


@pytest.fixture(scope="module")
def network():
    backbone = backbone_from_source(
        Colours(), ["first", "second"], backbone_kwargs={"data_config": {"input_size": (3, 32, 32), "crop_pct": 1.0}}
    )
    return backbone, image_processor_of(backbone.config["data_config"])


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (COUNT, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((40, 32), Image.Resampling.BILINEAR) for one in coarse]


@pytest.fixture(scope="module")
def found(network, pictures, tmp_path_factory):
    backbone, processor = network
    folder = tmp_path_factory.mktemp("exemplars") / "found"
    return find_exemplars(UnitReader(backbone), processor, open_images(pictures), folder, k=4, batch_size=5)


def naive(network, pictures, layer):
    """Feature maps of all the pictures at once."""
    backbone, processor = network
    pixel_values = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return backbone(pixel_values)[backbone.layers.index(layer)], pixel_values


def test_exemplars_are_the_images_of_the_highest_peaks_with_their_maps(network, pictures, found):
    for layer in ("first", "second"):
        maps, _ = naive(network, pictures, layer)
        own = found.tensors[layer]
        for unit in range(maps.shape[1]):
            peaks = maps[:, unit].amax(dim=(1, 2))
            order = sorted(range(COUNT), key=lambda n: (-peaks[n].item(), n))[:4]
            assert own["images"][unit].tolist() == order
            torch.testing.assert_close(own["activations"][unit], maps[order, unit])
            low, high = np.quantile(maps[:, unit].flatten().numpy(), (0.986, 0.994))
            assert low - 1e-5 <= own["threshold"][unit].item() <= high + 1e-5


def test_own_features_are_pooled_where_the_unit_exceeds_its_threshold(network, pictures, found):
    maps, _ = naive(network, pictures, "second")
    own = found.tensors["second"]
    for unit in range(maps.shape[1]):
        vectors = []
        for slot, number in enumerate(own["images"][unit].tolist()):
            inside = own["activations"][unit, slot] > own["threshold"][unit]
            if inside.any():
                vectors.append(maps[number][:, inside].mean(dim=1))
        assert own["counted"][unit] == len(vectors)
        expected = torch.stack(vectors).mean(dim=0) if vectors else torch.zeros(maps.shape[1])
        torch.testing.assert_close(own["features"][unit], expected, rtol=1e-4, atol=1e-5)


def test_the_folder_reads_back_as_a_dataset_with_pictures_and_masks(network, pictures, found):
    rows = found.dataset()
    assert isinstance(rows, datasets.Dataset) and len(rows) == 11
    row, unit = rows[8], found[8]
    assert (row["layer"], row["unit"]) == ("second", 2) == (unit.layer, unit.unit)
    assert row["peaks"] == sorted(row["peaks"], reverse=True) and len(row["images"]) == 4
    assert row["images"][0].size == row["masks"][0].size == (32, 32)
    np.testing.assert_array_equal(np.asarray(row["masks"][1]), unit.masks[1].numpy())
    # JPEG at quality 95 stays close to what the network saw.
    _, pixel_values = naive(network, pictures, "second")
    seen = to_uint8(pixel_values[int(row["keys"][0])], network[1]).permute(1, 2, 0)
    assert np.abs(np.asarray(row["images"][0]).astype(int) - seen.numpy().astype(int)).mean() < 4
    plain = datasets.load_dataset("parquet", data_files=str(found.folder / "exemplars.parquet"), split="train")
    assert plain[8]["keys"] == row["keys"]


def test_a_killed_pass_goes_on_and_gives_the_same(network, pictures, found, tmp_path, monkeypatch):
    backbone, processor = network
    read = []

    class Killed(Exception):
        pass

    def load(number):
        if number == 13 and not read.count(13):
            read.append(number)
            raise Killed
        read.append(number)
        return pictures[number]

    images = open_images(pictures)
    images.load = load
    arguments = (UnitReader(backbone), processor, images, tmp_path)
    with pytest.raises(Killed):
        find_exemplars(*arguments, k=4, batch_size=5, save_every=5)
    before = len(read)
    again = find_exemplars(*arguments, k=4, batch_size=5, save_every=5)
    first_reads = read[before : before + COUNT - 10]
    assert first_reads == list(range(10, COUNT))  # the ten images that were saved are not read again
    for layer in found.layers:
        for name, tensor in found.tensors[layer].items():
            torch.testing.assert_close(again.tensors[layer][name], tensor)
    with pytest.raises(ValueError, match="k is 4, asked for 5"):
        find_exemplars(*arguments, k=5, batch_size=5)


@pytest.mark.parametrize("finished", [True, False])
def test_exemplars_of_another_preprocessing_are_refused(finished, network, pictures, tmp_path):
    backbone, processor = network
    images = open_images(pictures)

    def load(number):
        if number == 13 and not finished:
            raise KeyboardInterrupt
        return pictures[number]

    images.load = load
    arguments = {"images": images, "output_dir": tmp_path, "k": 4, "batch_size": 5, "save_every": 5}
    with contextlib.nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        find_exemplars(UnitReader(backbone), processor, **arguments)
    finished = True
    for name, value in {"image_mean": [0.1, 0.5, 0.5], "image_std": [0.1, 0.5, 0.5], "resample": 0}.items():
        changed = copy.deepcopy(processor)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=f"exemplars of other settings: preprocessing is .*{name}"):
            find_exemplars(UnitReader(backbone), changed, **arguments)
    find_exemplars(UnitReader(backbone), processor, **arguments)


@pytest.fixture
def folder(pictures, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "pictures" / f"{number:02d}.png")
    return tmp_path / "pictures"


def stopped_at(images, number):
    """A source that ends in an error once, when an image is read."""
    load, once = images.load, [1]

    def read(asked):
        if asked == number and once:
            once.clear()
            raise KeyboardInterrupt
        return load(asked)

    images.load = read
    return images


def test_a_stopped_pass_does_not_go_on_over_other_images(network, pictures, folder, tmp_path):
    backbone, processor = network
    stopping = stopped_at(open_images(folder), 13)
    with pytest.raises(KeyboardInterrupt):
        find_exemplars(UnitReader(backbone), processor, stopping, tmp_path / "out", k=4, batch_size=5, save_every=5)
    pictures[3].rotate(90).save(folder / "-first.png")  # every number is another picture's now
    with pytest.raises(ValueError, match=r"of other images: those of .*pictures have changed since"):
        find_exemplars(UnitReader(backbone), processor, open_images(folder), tmp_path / "out", k=4)
    (folder / "-first.png").unlink()
    (folder / "03.png").touch()  # the same again, though later
    again = find_exemplars(UnitReader(backbone), processor, open_images(folder), tmp_path / "out", k=4, batch_size=5)
    whole = find_exemplars(UnitReader(backbone), processor, open_images(folder), tmp_path / "whole", k=4, batch_size=5)
    assert again.keys == whole.keys and torch.equal(again.tensors["first"]["images"], whole.tensors["first"]["images"])
    pictures[0].save(folder / "07.png")
    with pytest.raises(ValueError, match="have changed since"):  # of a finished one, too
        find_exemplars(UnitReader(backbone), processor, open_images(folder), tmp_path / "out", k=4)


def test_finished_exemplars_are_opened_while_another_run_has_the_folder(network, pictures, found):
    backbone, processor = network
    claim = found.folder / CLAIM
    claim.write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    again = find_exemplars(UnitReader(backbone), processor, open_images(pictures), found.folder, k=4, batch_size=5)
    assert again.summary == found.summary
    with pytest.raises(ValueError, match="k"):
        find_exemplars(UnitReader(backbone), processor, open_images(pictures), found.folder, k=3, batch_size=5)
    claim.unlink()


def test_images_that_change_between_the_two_passes_are_found(network, pictures, tmp_path):
    backbone, processor = network
    read = []

    def rows():
        read.append(1)
        return [{"image": picture} for picture in (pictures if len(read) == 1 else [pictures[1], *pictures])]

    with pytest.raises(ValueError, match=r"image \d+ is another one than when the pass read it"):
        find_exemplars(UnitReader(backbone), processor, StreamedImages("rows", rows), tmp_path, k=4, batch_size=5)


SHARED = """
import sys
from pathlib import Path
from accelerate import PartialState
from PIL import Image
from tests.data.test_exemplars import (
    Colours, UnitReader, backbone_from_source, find_exemplars, image_processor_of, open_images
)
backbone = backbone_from_source(
    Colours(), ["first", "second"], backbone_kwargs={"data_config": {"input_size": (3, 32, 32), "crop_pct": 1.0}}
)
processor = image_processor_of(backbone.config["data_config"])
state = PartialState(cpu=True)
assert state.num_processes == 2, state
find_exemplars(UnitReader(backbone), processor, open_images(sys.argv[1]), sys.argv[2], k=4, batch_size=5)
# The second process has nothing to read, and in the end none has: no process waits for another for ever.
alone = find_exemplars(UnitReader(backbone), processor, open_images(sys.argv[1], limit=1), sys.argv[2] + "_one", k=4)
assert alone.summary["images"] == 1
(Path(sys.argv[1]) / "00.png").write_bytes(b"no picture")
try:
    find_exemplars(UnitReader(backbone), processor, open_images(sys.argv[1], limit=1), sys.argv[2] + "_none", k=4)
except ValueError as error:
    assert "could be read" in str(error)
else:
    raise AssertionError
"""


def test_two_processes_find_what_one_finds(network, pictures, found, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02d}.png")
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    root = Path(__file__).parents[2]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "src"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    subprocess.run([*command, str(script), str(folder), str(tmp_path / "out")], check=True, env=environment, cwd=root)
    shared = ExemplarSet(tmp_path / "out")
    assert shared.summary["processes"] == 2 and shared.summary["images"] == COUNT
    for layer in found.layers:
        for name in ("images", "peaks", "activations"):
            torch.testing.assert_close(shared.tensors[layer][name], found.tensors[layer][name])
        # Sketches that were merged answer as exactly as others, and not the same.
        torch.testing.assert_close(shared.tensors[layer]["threshold"], found.tensors[layer]["threshold"], rtol=0.05, atol=0)


def test_a_stream_and_a_list_give_the_same_exemplars(network, pictures, found, tmp_path):
    backbone, processor = network
    stream = datasets.IterableDataset.from_generator(lambda: ({"image": one} for one in pictures))
    images = open_images(stream)
    assert isinstance(images, StreamedImages)
    again = find_exemplars(UnitReader(backbone), processor, images, tmp_path, k=4, batch_size=5)
    for layer in found.layers:
        assert torch.equal(again.tensors[layer]["images"], found.tensors[layer]["images"])


def test_images_that_cannot_be_read_are_left_out(network, pictures, tmp_path):
    backbone, processor = network
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures[:6]):
        picture.save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no picture")
    broken = open_images([str(folder / "2.png")])
    with pytest.raises(ValueError, match="no image of list of 1 images could be read"):
        find_exemplars(UnitReader(backbone), processor, broken, tmp_path / "nothing")
    found = find_exemplars(UnitReader(backbone), processor, open_images(folder), tmp_path / "out", k=2)
    assert found.summary["images"] == 5 and "2.png" not in found.keys.values()


@pytest.mark.parametrize("kind", ["timm cnn", "timm vit", "transformers vit"])
def test_any_network_has_exemplars(kind, pictures, tmp_path):
    torch.manual_seed(0)
    options = {"data_config": {"input_size": (3, 32, 32)}}
    if kind == "timm cnn":
        module, layers = timm.create_model("test_resnet", pretrained=False), ["layer2"]
    elif kind == "timm vit":
        module, layers = timm.create_model("test_vit", img_size=32, pretrained=False), ["blocks.1"]
    else:
        module = ViTModel(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=32,
                patch_size=8,
            )
        )
        names = [name for name, _ in module.named_modules()]
        layers = [next(name for name in names if name.endswith(("layer.1", "layers.1")))]
    backbone, processor = open_network(module, layers, backbone_kwargs=options)
    found = find_exemplars(UnitReader(backbone), processor, open_images(pictures[:8]), tmp_path, k=3)
    own, (channels,) = found.tensors[backbone.layers[0]], backbone.channels
    assert own["peaks"].shape == (channels, 3) and own["activations"].shape[2] > 1
    assert len(found) == channels and found[0].masks.shape == (3, 32, 32)


def test_directions_are_units_that_follow_the_channels(network, pictures, tmp_path):
    backbone, processor = network
    vectors, bias = torch.randn(2, 5), torch.tensor([0.5, -1.0])
    reader = UnitReader(backbone, {"second": vectors}, {"second": bias}, layers="second")
    found = find_exemplars(reader, processor, open_images(pictures), tmp_path, k=2)
    maps, _ = naive(network, pictures, "second")
    read = torch.einsum("bchw,mc->bmhw", maps, vectors) + bias[:, None, None]
    own = found.tensors["second"]
    assert own["peaks"].shape == (7, 2) and own["features"].shape == (7, 5)
    torch.testing.assert_close(own["peaks"][5:], read.amax(dim=(2, 3)).T.topk(2, dim=1).values)
    with pytest.raises(ValueError, match=r"needs \(directions, 5\)"):
        UnitReader(backbone, {"second": torch.randn(2, 4)})


def test_held_out_images_are_other_images(pictures):
    kept, held = open_images(pictures).split(5)
    numbers = [number for number, _ in held.stream()]
    assert numbers == [4, 9, 14, 19]
    assert sorted(numbers + [number for number, _ in kept.stream()]) == list(range(COUNT))
    stream = StreamedImages("rows", lambda: ({"image": n} for n in range(COUNT)))
    assert [n for n, _ in stream.split(5)[1].stream()] == numbers
    assert [n for n, _ in stream.split(5)[0].stream(1, 2)] == [n for n, _ in kept.stream(1, 2)]


def test_names_of_sources_tell_which_images_they_are(pictures, tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    rows = datasets.Dataset.from_dict({"image": pictures[:4]}, features=datasets.Features({"image": datasets.Image()}))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    stream = rows.to_iterable_dataset()
    names = [
        open_images(*source).name
        for source in (
            [tmp_path, None, "image", 2],
            [tmp_path],
            [tmp_path / "saved", "test"],
            [tmp_path / "saved", "train"],
            [pictures],
            [pictures[:5]],
            [rows],
            [stream, None, "image", 3],
            [stream],
            ["shapes:9", None, "image", 4],
            ["shapes:9"],
        )
    ]
    assert len(set(names)) == len(names)
    assert names[0] == f"{tmp_path}, first 2" and names[9] == "shapes:9:1, first 4"


def test_sources_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no image"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="shapes:COUNT"):
        open_images("shapes:many")
    with pytest.raises(ValueError, match="neither a folder"):
        open_images(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("values", ["normal", "mostly zero"])
def test_sketched_quantiles_are_close_in_rank_and_small(values):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(6, 60_000, generator=generator) * torch.arange(1, 7)[:, None]
    if values == "mostly zero":
        data = data.clamp(min=0)
    sketch = QuantileSketch(6)
    parts = [QuantileSketch(6) for _ in range(2)]
    for at, chunk in enumerate(data.split(700, dim=1)):
        sketch.add(chunk)
        parts[at % 2].add(chunk)
    parts[0].merge(parts[1])
    for one in (sketch, parts[0]):
        assert one.count == 60_000 and sum(level.shape[1] for level in one.levels) < 3.2 * one.size
        for share in (0.5, 0.9, 0.99):
            answer = one.quantile(share)[:, None]
            below, upto = (data < answer).double().mean(dim=1), (data <= answer).double().mean(dim=1)
            assert ((below - 0.003 <= share) & (share <= upto + 0.003)).all()


def test_a_sketch_of_few_values_is_exact():
    data = torch.randn(3, 501)
    sketch = QuantileSketch(3)
    sketch.add(data[:, :200])
    sketch.add(data[:, 200:])
    expected = np.quantile(data.numpy(), 0.99, axis=1, method="inverted_cdf")
    np.testing.assert_array_equal(sketch.quantile(0.99).numpy(), expected)
    again = QuantileSketch.from_state(sketch.state())
    assert torch.equal(again.quantile(0.3), sketch.quantile(0.3))


MEMORY = """
import sys, torch
from pathlib import Path
from devil_hf.data.exemplars import find_exemplars
from devil_hf.data.unit_reader import UnitReader, open_network
from devil_hf.data.images import open_images
import timm
torch.set_num_threads(1)
torch.manual_seed(0)
count = int(sys.argv[1])
backbone, processor = open_network(timm.create_model("test_resnet", pretrained=False), ["layer3"],
    backbone_kwargs={"data_config": {"input_size": (3, 64, 64)}})
found = find_exemplars(UnitReader(backbone), processor, open_images(f"shapes:{count}"), sys.argv[2])
assert found.summary["images"] == count
# VmHWM, not ru_maxrss: the latter would be the peak of the test process where that is higher.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    peaks = {}
    for count in (1_000, 10_000):
        command = [sys.executable, "-c", MEMORY, str(count), str(tmp_path / str(count))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        peaks[count] = int(done.stdout.split()[-1])
    assert peaks[10_000] < 1.1 * peaks[1_000], json.dumps(peaks)


def test_masks_of_a_pass_without_exemplars_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="find exemplars first"):
        ExemplarSet(tmp_path)
    assert layer_file("blocks.1:class") == "blocks.1_class.safetensors"
