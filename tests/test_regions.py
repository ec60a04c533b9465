"""Captioned regions: the translator sees an object's places, and nothing else, from the file of labels to the cached feature."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from devil_hf.data.decoding import BadSamples
from devil_hf.data.decoding import PairDecoder
from devil_hf.data.decoding import PairTable
from devil_hf.data.pairs import open_pairs
from devil_hf.evaluation.captioned import open_captioned
from devil_hf.pooling_devil import location_dropout
from devil_hf.pooling_devil import region_weights
from devil_hf.training.features import pool_draws
from devil_hf.training.feed import CaptionCollator
from devil_hf.training.feed import ImageTable
from devil_hf.training.feed import batch_regions
from devil_hf.training.feed import sees_with
from devil_hf.training.feed import view_of
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
            {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT}
            for number in range(len(images))
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


def test_regions_join_captioned_images_and_scenes_have_them_too(labels):
    scenes = {"kind": "shapes", "size": 2, "streaming": False}
    rows = open_pairs([scenes, {"kind": "regions", "path": "shapes:3:7"}], 0, False)
    assert rows[0]["region"] is None and rows[1]["region"] is None and len(rows) > 2
    for row in rows.select(range(2, len(rows))):
        with Image.open(io.BytesIO(row["region"])) as mask:
            assert mask.size == (128, 128) and 0 < np.asarray(mask).mean() < 0.5


def test_what_the_crop_cuts_off_is_left_out_and_is_not_bad(labels, processor):
    bad_samples = BadSamples()
    decoder = PairDecoder(bad_samples, sees=sees_with(processor))
    table = PairTable(rows_of(labels), decoder)
    keys = [table.sample(index, 0)["key"] for index in range(4)]
    assert keys[:3] == ["0.png dog", "0.png cat", "1.png dog"] and keys[3] in keys[:3]
    assert bad_samples.bad == 0


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
    torch.manual_seed(1)
    drawn = pool_draws(model, batch["pixel_values"], 4, batch["regions"])
    torch.manual_seed(1)
    again = pool_draws(model, batch["pixel_values"], 4, batch_regions(processor, [item["region"] for item in items]))
    for one, other, maps in zip(drawn, again, features, strict=True):
        torch.testing.assert_close(one, other)
        low, high = maps.amin(dim=(2, 3)), maps.amax(dim=(2, 3))
        assert (one.float() >= low[:, None] - 1e-2).all() and (one.float() <= high[:, None] + 1e-2).all()
    assert batch_regions(processor, [None, None]) is None


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
        max_steps=30,
        batch_size=8,
        learning_rate=1e-2,
        warmup_steps=1,
        evaluation_steps=30,
        logging_steps=10,
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
