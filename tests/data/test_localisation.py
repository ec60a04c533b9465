"""Masks of every format lie where the objects are, and go through the crop as the image does."""

import json

import numpy as np
import pytest
from PIL import Image

from devil_hf import DevilImageProcessor, DevilProcessor
from devil_hf.data.objects import OBJECT_SOURCES, ObjectSource, of_file, open_localised
from devil_hf.data.objects.masks import box_mask, draw_region, polygon_mask, runs_of
from devil_hf.data.shapes import make_scene

HEIGHT, WIDTH = 40, 60
BOX = (10.0, 8.0, 30.0, 20.0)  # left, top, right, bottom
OUTLINE = [10.0, 8.0, 30.0, 8.0, 30.0, 20.0, 10.0, 20.0]


def truth():
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[8:20, 10:30] = True
    return mask


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    for place in ("images/one.jpg", "JPEGImages/one.jpg"):
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(tmp_path / place)
    return tmp_path


def coco(folder, *annotations, **image):
    content = {
        "images": [{"id": 7, "file_name": "one.jpg", "width": WIDTH, "height": HEIGHT} | image],
        "categories": [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}],
        "annotations": [{"id": n, "image_id": 7, "iscrowd": 0} | one for n, one in enumerate(annotations)],
    }
    file = folder / "instances_val.json"
    file.write_text(json.dumps(content))
    return file


def drawn(source, **options):
    (example,) = open_localised(source, **options)
    return example.draw((HEIGHT, WIDTH))


def test_coco_polygons_boxes_and_both_run_length_codes_give_the_same_mask(folder):
    coco_mask = pytest.importorskip("pycocotools.mask")
    packed = coco_mask.encode(np.asfortranarray(truth().astype(np.uint8)))
    flat = truth().T.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False, append=False))
    loose = {"size": [HEIGHT, WIDTH], "counts": np.diff(changes, prepend=0, append=flat.size).tolist()}
    bbox = [10, 8, 20, 12]
    for segmentation in ([OUTLINE], {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}, loose, []):
        masks = drawn(coco(folder, {"category_id": 3, "bbox": bbox, "segmentation": segmentation}))
        assert list(masks) == ["dog"] and (masks["dog"] == truth()).all()


def inside(outline, size):
    """Which pixels' centres an outline goes around, by counting the edges to their right."""
    y, x = (np.arange(edge) + 0.5 for edge in size)
    crossed = np.zeros(size, dtype=int)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        spans = (y0 <= y) != (y1 <= y)
        at = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
        crossed += spans[:, None] & (x[None] < at[:, None])
    return crossed % 2 == 1


def test_polygons_hold_the_pixels_whose_centres_lie_in_them():
    """But for those within a tenth of a pixel of the outline: pycocotools rounds corners to fifths of a pixel."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        angles = np.sort(rng.random(9)) * 2 * np.pi
        radius = rng.uniform(20, 45, 9)
        outline = np.stack([50 + radius * np.cos(angles), 48 + radius * np.sin(angles)], axis=1)
        length = np.hypot(*(outline - np.roll(outline, 1, axis=0)).T).sum()
        differ = polygon_mask([outline], (100, 100)) ^ inside(outline, (100, 100))
        assert differ.sum() <= 0.1 * length
    assert not polygon_mask([outline[:2]], (100, 100)).any()  # a line, and no box


def test_masks_as_run_lengths_draw_themselves_again():
    rng = np.random.default_rng(0)
    for mask in (rng.random((5, 7)) > 0.5, np.ones((3, 2), bool), np.zeros((2, 3), bool)):
        np.testing.assert_array_equal(draw_region({"parts": [runs_of(mask)]}, mask.shape), mask)
    with pytest.raises(ValueError, match="box, polygons, runs"):
        draw_region({"parts": [{"circle": 3}]}, (4, 4))


def test_polygons_without_pycocotools_name_the_remedy(monkeypatch):
    monkeypatch.setattr("devil_hf.extras.is_installed", lambda module: False)
    with pytest.raises(ImportError, match=r"pycocotools is not installed.*devil-hf\[evaluate\]"):
        polygon_mask([np.reshape(OUTLINE, (-1, 2))], (HEIGHT, WIDTH))


def test_a_source_of_objects_is_added_from_outside(folder):
    def read(source, images, names):
        return [of_file(folder / "images/one.jpg", {"dog": [{"box": list(BOX)}]})]

    OBJECT_SOURCES.register("dogs", ObjectSource("dogs", lambda text: text == "dogs!", read))
    try:
        assert (drawn("dogs!")["dog"] == truth()).all()
    finally:
        OBJECT_SOURCES._entries.pop("dogs")


def test_all_objects_of_a_class_are_one_mask_and_crowds_without_a_mask_leave_the_class_out(folder):
    two = [{"category_id": 3, "bbox": [0, 0, 5, 5]}, {"category_id": 3, "bbox": [20, 20, 5, 5]}]
    crowd = {"category_id": 5, "bbox": [1, 1, 9, 9], "iscrowd": 1, "segmentation": []}
    (example,) = open_localised(coco(folder, *two, crowd))
    masks = example.draw((HEIGHT, WIDTH))
    assert list(masks) == ["dog"] and masks["dog"].sum() == 50
    assert example.present == {"dog", "cat"}  # a board must not ask for the cat elsewhere


@pytest.mark.parametrize("segmented", [False, True])
def test_voc_counts_pixels_from_one(folder, segmented):
    (folder / "Annotations").mkdir()
    edges = "<xmin>11</xmin><ymin>9</ymin><xmax>30</xmax><ymax>20</ymax>"
    xml = f"<annotation><filename>one.jpg</filename><object><name>dog</name><bndbox>{edges}</bndbox></object></annotation>"
    (folder / "Annotations" / "one.xml").write_text(xml)
    if segmented:
        (folder / "SegmentationClass").mkdir()
        classes = np.where(truth(), 12, 0).astype(np.uint8)  # the dog is VOC's twelfth class
        classes[0, 0] = 255
        Image.fromarray(classes).save(folder / "SegmentationClass" / "one.png")
    assert (drawn(folder)["dog"] == truth()).all()


def test_classes_that_voc_masks_do_not_tell_are_left_out(folder):
    (folder / "Annotations").mkdir()
    (folder / "SegmentationClass").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT), "grey").save(folder / "JPEGImages" / "two.jpg")
    box = "<bndbox><xmin>11</xmin><ymin>9</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    for stem, names in (("one", ("dog", "head")), ("two", ("head",))):
        objects = "".join(f"<object><name>{name}</name>{box}</object>" for name in names)
        xml = f"<annotation><filename>{stem}.jpg</filename>{objects}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_text(xml)
        Image.fromarray(np.where(truth(), 12, 0).astype(np.uint8)).save(folder / "SegmentationClass" / f"{stem}.png")
    (example,) = open_localised(folder)
    assert set(example.groups) == set(example.draw((HEIGHT, WIDTH))) == {"dog"}
    assert example.present == {"dog", "head"}  # a board must not ask for the head elsewhere
    (folder / "SegmentationClass" / "two.png").unlink()
    assert [set(one.groups) for one in open_localised(folder)] == [{"dog"}, {"head"}]  # boxes tell any class


@pytest.mark.parametrize(
    "label", ["1 0.333333 0.35 0.333333 0.3", "1 0.166667 0.2 0.5 0.2 0.5 0.5 0.166667 0.5"], ids=["box", "polygon"]
)
@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("data.yaml", "names: [cat, dog]", ""),
        ("n.json", '{"boxes": {"1": "dog"}}', "#boxes"),
        ("n.txt", "cat\ndog\n", ""),
    ],
)
def test_yolo_labels_are_shares_of_the_image(folder, label, name, content, key):
    (folder / "labels").mkdir()
    (folder / "labels" / "one.txt").write_text(label + "\n")
    (folder / name).write_text(content)
    masks = drawn(folder / "labels", names=None if name == "data.yaml" else f"{folder / name}{key}")
    assert list(masks) == ["dog"] and (masks["dog"] == truth()).all()


def test_the_shapes_world_asks_for_words_that_one_object_of_several_has():
    examples = open_localised("shapes:6:1")
    for example in examples:
        scene = make_scene(1, int(example.key.split("-")[1]))
        masks = example.draw(scene.image.shape[:2])
        assert (np.asarray(example.read()) == scene.image).all()
        for phrase in scene.unique_phrases():
            assert example.groups[phrase.text] == phrase.attribute
            assert (masks[phrase.text] == scene.masks[phrase.object_index]).all()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda f: f / "absent", {}, "does not exist"),
        (lambda f: "shapes:many", {}, "shapes:COUNT"),
        (lambda f: f / "images", {}, "is no COCO instances JSON or Flickr30k Entities folder or VOC folder"),
        (lambda f: coco(f, {"category_id": 9, "bbox": [0, 0, 1, 1]}), {}, "category 9, unnamed"),
        (
            lambda f: coco(f, {"category_id": 3, "bbox": [0, 0, 1, 1]}, file_name="two.jpg"),
            {},
            r"two.jpg .*\(--images\)",
        ),
        (lambda f: coco(f), {}, "names no object"),
    ],
)
def test_bad_sources_are_errors_that_name_them(folder, make, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_localised(make(folder), **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [("0 1 2", "2 numbers"), ("5 .5 .5 1 1", "class 5, which has no name"), ("dog .5 .5 1 1", "no YOLO label")],
)
def test_bad_yolo_labels_name_file_and_line(folder, line, message):
    (folder / "labels").mkdir()
    (folder / "labels" / "one.txt").write_text(f"0 .5 .5 1 1\n{line}\n")
    (folder / "data.yaml").write_text("names: {0: cat}")
    with pytest.raises(ValueError, match=rf"one.txt:2 .*{message}"):
        open_localised(folder / "labels")


def test_a_blank_line_of_class_names_keeps_the_places_of_the_others_and_its_class_is_refused(folder):
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("cat\n\n dog \n")
    (folder / "labels" / "one.txt").write_text("2 .5 .5 1 1\n")
    assert list(drawn(folder / "labels")) == ["dog"]
    (folder / "labels" / "one.txt").write_text("1 .5 .5 1 1\n")
    with pytest.raises(ValueError, match=r"one.txt:1 is of class 1, which has no name"):
        open_localised(folder / "labels")


@pytest.mark.parametrize("place", [{"bbox": [10**400, 8, 20, 12]}, {"segmentation": [[10**400, *OUTLINE[1:]]]}])
def test_numbers_that_no_float_holds_are_no_place(folder, place, caplog):
    with pytest.raises(ValueError, match="names no object"):
        open_localised(coco(folder, {"category_id": 3} | place))
    assert "1 objects of" in caplog.text


def test_an_image_of_another_size_than_its_masks_is_an_error(folder):
    (example,) = open_localised(coco(folder, {"category_id": 3, "bbox": [0, 0, 5, 5]}))
    with pytest.raises(ValueError, match="drawn on"):
        example.draw((HEIGHT + 1, WIDTH))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_masks_go_through_resize_and_crop_as_images_do(tokenizer, mode):
    """An object that is white on black is found, in the crop, where its mask is."""
    processor = DevilProcessor(
        DevilImageProcessor(crop_size={"height": 64, "width": 64}, crop_pct=0.8, crop_mode=mode), tokenizer
    )
    for size, box in (((90, 140), (60, 20, 110, 70)), ((150, 80), (10, 60, 50, 120))):
        mask = box_mask(box, size)
        image = Image.fromarray(np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2))
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0, 0]
        seen = pixels * processor.image_processor.image_std[0] + processor.image_processor.image_mean[0] > 0.5
        cropped = processor.masks_to_regions([mask])[0, 0].numpy() >= 0.5
        if mode == "border":  # what is padded shows the mean colour, and no object
            cropped, seen = cropped[12:52, 12:52], seen[12:52, 12:52]
        assert seen.any() and (seen & cropped).sum() / (seen | cropped).sum() > 0.9


def test_scores_in_the_crop_agree_with_scores_in_the_image(tokenizer):
    """The other way round, maps undone to image coordinates, gives the same share of energy and the same precision."""
    import torch

    from devil_hf.evaluation.maps.measures import energy_pointing, enlarge, pixel_precision

    processor = DevilProcessor(DevilImageProcessor(crop_size={"height": 96, "width": 96}, crop_pct=0.9), tokenizer)
    mask = box_mask((150, 60, 260, 190), (240, 400))
    values = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    placed = processor.post_process_attribution({"a": values}, target_sizes=[mask.shape])["a"][0][0].numpy()
    there = ~np.isnan(placed)
    rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    inside = np.ix_(rows, columns)
    cropped = processor.masks_to_regions([mask])[0, 0].numpy() >= 0.5
    large = enlarge(values[0, 0].numpy(), cropped.shape)
    for metric in (energy_pointing, pixel_precision):
        assert metric(large, cropped) == pytest.approx(metric(placed[inside], mask[inside]), abs=0.01)
