"""Captioned regions: the translator sees an object's places, and nothing else, from the file of labels to the cached feature."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from devil_hf.data.captioned import open_captioned
from devil_hf.data.decoding import BadSamples, PairDecoder, PairTable, TooManyBadSamples
from devil_hf.data.identity import PairIdentities
from devil_hf.data.objects.masks import draw_region, unpack_region
from devil_hf.data.pairs import open_pairs
from devil_hf.model.pooling_devil import region_weights
from devil_hf.training.draws import location_dropout
from devil_hf.training.feature_cache import _draw
from devil_hf.training.feed import CaptionCollator, ImageTable, batch_regions, sees_with, view_of
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train

WIDTH, HEIGHT = 128, 96  # of the images of conftest; the crop of the tiny backbone cuts their left and right edges
BOXES = {"dog": (40, 20, 40, 30), "cat": (64, 48, 32, 40), "edge": (0, 0, 6, 90)}


@pytest.fixture
def labels(images, tmp_path):
    """COCO instances: a dog and a cat in the first image, a dog in the second, something at the edge of the third."""
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    objects = [(0, "dog"), (0, "cat"), (1, "dog"), (2, "edge")]
    names = list(BOXES)
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT} for number in range(len(images))
        ],
        "categories": [{"id": names.index(name), "name": name} for name in names],
        "annotations": [
            {"id": n, "image_id": image, "category_id": names.index(name), "bbox": BOXES[name], "iscrowd": 0}
            for n, (image, name) in enumerate(objects)
        ],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    return file


def rows_of(labels, **more):
    return open_pairs([{"kind": "regions", "path": str(labels), "images": str(labels.parent)} | more], 0, False)


def box_mask(name: str) -> np.ndarray:
    left, top, width, height = BOXES[name]
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_every_object_is_a_row_with_its_mask_and_its_name(labels):
    decoder = PairDecoder(BadSamples())
    samples = list(map(decoder, rows_of(labels)))
    assert [sample["key"] for sample in samples] == ["0.png dog", "0.png cat", "1.png dog", "2.png edge"]
    assert samples[1]["captions"] == ["cat", "a cat", "the cat"]
    for sample, name in zip(samples, ("dog", "cat", "dog", "edge"), strict=True):
        assert sample["image"].size == (WIDTH, HEIGHT)
        np.testing.assert_array_equal(sample["region"], box_mask(name))
    assert decoder(rows_of(labels, templates=["{} there"])[0])["captions"] == ["dog there"]
    with pytest.raises(ValueError, match="a dog"):
        rows_of(labels, templates=["a dog"])


def test_what_a_source_does_not_need_is_named_as_a_recipe_has_it():
    with pytest.raises(ValueError, match=r": names='x' is nothing that shapes:3:7 "):
        open_pairs([{"kind": "regions", "path": "shapes:3:7", "names": "x"}], 0, False)


def test_regions_join_captioned_images_and_scenes_have_them_too(labels):
    scenes = {"kind": "shapes", "size": 2, "seed": 0, "streaming": False}
    rows = open_pairs([scenes, {"kind": "regions", "path": "shapes:3:7"}], 0, False)
    assert rows[0]["region"] is None and rows[1]["region"] is None and len(rows) > 2
    for row in rows.select(range(2, len(rows))):
        mask = draw_region(unpack_region(row["region"]), (128, 128))
        assert 0 < mask.mean() < 0.5


def test_what_the_crop_cuts_off_is_left_out_and_is_not_bad(labels, processor):
    bad_samples = BadSamples()
    decoder = PairDecoder(bad_samples, sees=sees_with(processor))
    table = PairTable(rows_of(labels), decoder)
    keys = [table.sample(index, 0)["key"] for index in range(4)]
    assert keys[:3] == ["0.png dog", "0.png cat", "1.png dog"] and keys[3] in keys[:3]
    assert bad_samples.bad == 0 and bad_samples.out_of_sight >= 1
    assert "lay outside of what the model sees" in str(bad_samples)
    only_edge = rows_of(labels).select([3])
    with pytest.raises(TooManyBadSamples, match="100 lay outside"):
        PairTable(only_edge, PairDecoder(BadSamples(), sees=sees_with(processor))).sample(0, 0)


def test_a_broken_image_is_one_bad_row_and_no_objects_are_an_error(labels):
    (labels.parent / "1.png").write_bytes(b"no image")
    rows = rows_of(labels)
    assert list(rows["key"]) == ["0.png dog", "0.png cat", "1.png dog", "2.png edge"]
    bad_samples = BadSamples(limit=1)
    assert [PairDecoder(bad_samples)(row) is None for row in rows] == [False, False, True, False]
    assert bad_samples.bad == 1
    content = json.loads(labels.read_text())
    for annotation in content["annotations"]:
        annotation["bbox"] = [0, 0, 0, 0]
    labels.write_text(json.dumps(content))
    (labels.parent / "1.png").unlink()
    Image.new("RGB", (WIDTH, HEIGHT)).save(labels.parent / "1.png")
    with pytest.raises(ValueError, match="no object"):
        rows_of(labels)


def test_a_cache_knows_the_regions_and_what_is_said_of_them_also_in_a_stream(labels):
    scenes = {"kind": "shapes", "size": 2, "seed": 0, "streaming": True}
    content = json.loads(labels.read_text())

    def fingerprint(**more) -> str:
        sources = [scenes, {"kind": "regions", "path": str(labels), "images": str(labels.parent)} | more]
        return PairIdentities(sources, open_pairs(sources, 0, False)).all()

    first = fingerprint()
    assert fingerprint() == first != fingerprint(templates=["{}"])
    content["annotations"][0]["bbox"][0] += 1  # 40 to 41: the file keeps its size
    labels.write_text(json.dumps(content))
    assert fingerprint() != first


@pytest.mark.parametrize(
    ("file", "before", "after"), [("data.yaml", "names: [cat]", "names: [dog]"), ("classes.txt", "cat\n", "dog\n")]
)
def test_class_names_that_nobody_gave_are_read_anew_when_they_change(images, tmp_path, file, before, after):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    images[0].save(tmp_path / "images" / "one.png")
    (tmp_path / "labels" / "one.txt").write_text("0 .5 .5 .5 .5\n")

    def names():
        return open_pairs([{"kind": "regions", "path": str(tmp_path / "labels")}], 0, False)[0]["captions"][0]

    (tmp_path / file).write_text(before)
    assert names() == "cat"
    (tmp_path / file).write_text(after)
    assert names() == "dog"


@pytest.mark.parametrize("schedule", ["constant", "log_uniform"])
def test_dropout_stays_inside_of_a_region_and_is_never_empty(schedule):
    torch.manual_seed(0)
    masks = torch.zeros(2000, 32, 32)
    masks[:, 8:20, 4:12] = 1.0
    masks[1000:] = 1.0  # whole images in the same batch
    (weights,) = location_dropout(2000, [(8, 8)], 0.5, schedule, 0.2, regions=masks)
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(2000))
    allowed = torch.zeros(8, 8, dtype=torch.bool)
    allowed[2:5, 1:3] = True
    inside, whole = (weights[:1000] > 0), (weights[1000:] > 0)
    assert not inside[:, ~allowed].any()
    assert inside[:, allowed].any(dim=0).all()
    kept = inside.sum(dim=(1, 2))
    assert kept.min() == 1 and kept.max() == 6
    assert whole[:, ~allowed].any(dim=0).all()


def test_the_places_of_a_region_count_as_much_as_they_lie_in_it():
    mask = torch.zeros(1, 16, 16)
    mask[0, :4, :7] = 1.0  # two cells of a 4 x 4 grid, the second by three quarters
    (weights,) = location_dropout(1, [(4, 4)], 0.0, "constant", 1.0, regions=mask)
    expected = region_weights(mask[None], (4, 4))[0][0, 0]
    expected = expected * (expected >= 0.5 * expected.max())
    torch.testing.assert_close(weights[0], expected / expected.sum())
    assert weights[0, 0, 0] > weights[0, 0, 1] > 0


def test_regions_may_be_drawn_by_a_schedule_of_their_own():
    masks = torch.ones(4000, 32, 32)
    masks[::2, :, :16] = 0
    torch.manual_seed(0)
    (weights,) = location_dropout(4000, [(4, 4)], 0.5, "constant", 0.25, regions=masks, region_schedule="log_uniform")
    kept = weights.flatten(1).gt(0).sum(dim=1)
    assert kept[1::2].float().mean().item() == pytest.approx(8, abs=0.15), "half of the places of whole images"
    assert (kept[1::2] == 1).float().mean() < 0.01
    # One place: three quarters of the draws exp(u log 8), u in [0, 1), that round to 1.
    expected = 0.75 * torch.tensor(1.5).log().item() / torch.tensor(8.0).log().item()
    assert (kept[::2] == 1).float().mean().item() == pytest.approx(expected, abs=0.03)
    assert not weights[::2, :, :2].any()
    torch.manual_seed(0)
    (same,) = location_dropout(4000, [(4, 4)], 0.5, "log_uniform", 0.25, regions=masks, region_schedule="log_uniform")
    torch.manual_seed(0)
    (alone,) = location_dropout(4000, [(4, 4)], 0.5, "log_uniform", 0.25, regions=masks)
    assert torch.equal(same, alone) and torch.equal(same[::2], weights[::2])


def test_a_view_moves_image_and_region_alike_and_never_loses_the_region(processor):
    mask = box_mask("dog")
    picture = Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
    sample = {"image": picture, "region": mask}
    moved = 0
    for seed in range(30):
        view, region = view_of(sample, 0.2, seed, sees_with(processor))
        np.testing.assert_array_equal(np.asarray(view)[..., 0] > 127, region)
        assert region.any()
        moved += view.size != picture.size
    assert moved > 15
    corner = np.zeros_like(mask)
    corner[:3, 20:23] = True  # most crops lose it: the whole image stands in
    sizes = [view_of(sample | {"region": corner}, 0.2, seed, np.any)[0].size for seed in range(30)]
    assert sizes.count(picture.size) > 15


def test_an_image_and_a_cache_give_the_same_region_features(model, processor, labels):
    """Both paths of training, and a loop over the locations."""
    decoder = PairDecoder(BadSamples(), sees=sees_with(processor))
    table = ImageTable(PairTable(rows_of(labels), decoder))
    items = [table.sample(index, 0) for index in range(2)]
    items.append({"image": items[0]["image"], "region": None, "caption": "grass"})
    batch = CaptionCollator(processor)(items)
    assert batch["regions"].shape[0] == 3 and batch["regions"][2].min() == 1.0
    features = model.extract_features(batch["pixel_values"])
    prefix = model(**{name: batch[name] for name in ("pixel_values", "regions")}).prefix
    pooled = []
    for maps in features:
        weights = region_weights(batch["regions"][:, None], tuple(maps.shape[-2:]))[0][:, 0]
        rows = []
        for one, weight in zip(maps, weights, strict=True):
            total = torch.zeros(len(one))
            for row, column in np.ndindex(*weight.shape):
                total += weight[row, column] * one[:, row, column]
            rows.append(total)
        pooled.append(torch.stack(rows))
    with torch.no_grad():
        torch.testing.assert_close(prefix, model.translate(pooled), rtol=1e-4, atol=1e-5)
    assert batch_regions(processor, [None, None]) is None


def test_cached_draws_stay_inside_of_the_region_in_every_view(model, processor, monkeypatch):
    """The image shows its own region in white; features are the whiteness of their place, and where it is."""
    places = torch.eye(64).view(64, 8, 8)

    def features_of(pixel_values):
        cells = torch.nn.functional.adaptive_avg_pool2d((pixel_values[:, :1] - black) / (white - black), 8)
        return [torch.cat([cells, places.expand(len(cells), -1, -1, -1)], dim=1) for _ in model.layer_names]

    def picture_of(mask):
        return Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))

    masks = [box_mask("dog"), box_mask("cat"), None]
    images = [picture_of(mask) for mask in masks[:2]] + [picture_of(np.zeros((HEIGHT, WIDTH), bool))]
    plain = processor(images=[images[2], Image.new("RGB", (WIDTH, HEIGHT), "white")], return_tensors="pt")["pixel_values"]
    black, white = plain[:, 0].amin(dim=(1, 2))
    monkeypatch.setattr(model, "extract_features", features_of)
    samples = [{"image": image, "region": mask} for image, mask in zip(images, masks, strict=True)]
    key = {"views": 6, "draws": 8, "smallest_crop": 0.4}
    for layer in _draw(model, processor, samples, key, seed=3).values():
        drawn = layer.float()
        assert drawn.shape == (3, 48, 65)
        assert (drawn[:2, :, 0] > 0.4).all()  # at places outside of the object it is black
        weights = drawn[:, :, 1:]
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 48), atol=2e-3, rtol=0)
        assert len({tuple(row.nonzero()[:, 0].tolist()) for row in weights[0]}) > 6
        assert (weights[2].amax(dim=0) > 0).all()  # the whole image, next to regions, is drawn from everywhere


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_learns_from_regions_with_and_without_a_cache(cached, labels, sources, tmp_path):
    recipe = Recipe(
        **sources,
        output_dir=str(tmp_path / "run"),
        train_data=[{"kind": "regions", "path": str(labels), "images": str(labels.parent)}],
        model={"translator_width": 32, "translator_depth": 1, "translator_heads": 2, "translator_feed_forward": 32},
        cache_features=str(tmp_path / "cache") if cached else "",
        views=2 if cached else 1,
        draws=2,
        smallest_crop=0.5,
        max_steps=20,
        batch_size=4,
        learning_rate=1e-2,
        warmup_steps=1,
        evaluation_steps=20,
        logging_steps=5,
        report_to="none",
    )
    train(recipe)
    (state,) = (tmp_path / "run").glob("checkpoint-*/trainer_state.json")
    losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    if cached:
        kept = [json.loads(file.read_text())["keys"] for file in (tmp_path / "cache").glob("features-*.json")]
        assert kept == [["0.png dog", "0.png cat", "1.png dog"]]  # what the crop cuts off is not there


def test_regions_are_refused_where_whole_images_are_read(labels, sources):
    region = {"kind": "regions", "path": str(labels), "images": str(labels.parent)}
    with pytest.raises(ValueError, match="validation_data names regions"):
        Recipe(**sources, train_data=[region], validation_data=[region]).validate()
    with pytest.raises(ValueError, match="names regions"):
        open_captioned(json.dumps(region))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    """A thousand images and ten thousand: what stays in a process, once the rows are written."""
    script = Path(__file__).parents[2] / "scripts/measure_regions.py"
    few, many = (
        json.loads(subprocess.run([sys.executable, script, "--images", n], check=True, capture_output=True).stdout)
        for n in ("1000", "10000")
    )
    assert many["again"]["rows"] > 9 * few["again"]["rows"] > 9000
    assert many["again"]["megabytes_that_stay"] < few["again"]["megabytes_that_stay"] + 20
    assert many["again"]["peak_megabytes"] < few["again"]["peak_megabytes"] + 60  # mapped pages of the rows among them
