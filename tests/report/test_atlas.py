"""The atlas: files that agree with each other, and a page that works in a browser, from disk."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from devil_hf.data.exemplar_set import IMAGES, SUMMARY, ExemplarSet, layer_file
from devil_hf.report.atlas import mask_colours, write_atlas

WORDS = ("striped fur", "red circles", "water & sky <b>", "a dog's head", "grass")


def exemplar_set(folder: Path, units: int, k: int = 15, images: int = 40) -> ExemplarSet:
    """Exemplars written by hand: coloured noise, with activations on a 4 x 4 grid."""
    generator = torch.Generator().manual_seed(0)
    (folder / IMAGES).mkdir(parents=True)
    lines = []
    for number in range(images):
        pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((64, 64)).save(folder / IMAGES / f"{number:09d}.jpg")
        lines.append(json.dumps({"file_name": f"{number:09d}.jpg", "number": number, "key": f"photo {number}"}))
    (folder / IMAGES / "metadata.jsonl").write_text("\n".join(lines))
    activations = torch.rand(units, k, 4, 4, generator=generator)
    tensors = {
        "peaks": activations.amax(dim=(2, 3)).sort(dim=1, descending=True).values,
        "images": torch.randint(0, images, (units, k), generator=generator),
        "activations": activations,
        "threshold": torch.full((units,), 0.7),
        "features": torch.zeros(units, 8),
        "counted": torch.full((units,), k),
    }
    save_file(tensors, folder / layer_file("blocks.6"))
    summary = {
        "network": "a/network",
        "layers": ["blocks.6"],
        "images": 1000,
        "crop": [64, 64],
        "shapes": {"blocks.6": {"units": units, "channels": units, "grid": [4, 4]}},
    }
    (folder / SUMMARY).write_text(json.dumps(summary))
    return ExemplarSet(folder)


def rows(units: int) -> tuple[list[dict], list[dict]]:
    labels, checks = [], []
    for unit in range(units):
        label = "" if unit == 2 else f"{WORDS[unit % 5]} {unit // 5}"
        evidence = None if unit == 2 else 3 * ((unit * 37) % units) / units
        labels.append(
            {"layer": "blocks.6", "unit": unit, "label": label, "evidence": evidence}
            | {"runner_up": "a house", "runner_up_evidence": 0.1, "words": [[" red", 1.5], [" circles", -0.25]]}
        )
        passed = unit % 3 == 0
        checks.append(
            {"pearson": None if unit == 2 else 0.01 * unit, "pearson_p": 0.01, "q": 0.02, "auprc": 0.3, "auprc_p": 0.2}
            | {"passed": passed}
        )
    return labels, checks


def test_parquet_json_and_pictures_agree(tmp_path):
    exemplars = exemplar_set(tmp_path / "exemplars", 12)
    labels, checks = rows(12)
    page = write_atlas(exemplars, labels, tmp_path / "atlas", checks, {"title": "blocks.6 of <a> network"})
    folder = page.parent
    head = page.read_text(encoding="utf-8")
    assert "<title>blocks.6 of &lt;a&gt; network</title>" in head and "12 units, exemplars from 1,000 images" in head
    table = datasets.load_dataset("parquet", data_files=str(folder / "atlas.parquet"), split="train")
    plain = json.loads((folder / "atlas.json").read_text())["units"]
    assert len(table) == len(plain) == 12
    for row, other, label, check in zip(table, plain, labels, checks, strict=True):
        assert row["label"] == other["label"] == label["label"] and row["passed"] == other["passed"] == check["passed"]
        assert other["words"] == label["words"] and other["pearson"] == check["pearson"]
        assert list(zip(row["words"], row["word_evidence"], strict=True)) == [tuple(one) for one in label["words"]]
        assert len(row["images"]) == len(row["keys"]) == 15 and (folder / row["images"][0]).is_file()
        assert row["peaks"] == sorted(row["peaks"], reverse=True)
    strip = Image.open(folder / "masks" / "blocks.6" / "3.png").convert("RGBA")
    assert strip.size == (15 * 64, 64)
    own = exemplars.masks("blocks.6", torch.tensor([3]), (64, 64))[0]
    clear = np.asarray(strip)[:, 64:128, 3] == 0
    np.testing.assert_array_equal(clear, own[1].numpy())


def test_labels_of_other_units_are_refused(tmp_path):
    exemplars = exemplar_set(tmp_path / "exemplars", 3)
    labels, _ = rows(3)
    with pytest.raises(ValueError, match="expected unit 0"):
        write_atlas(exemplars, labels[::-1], tmp_path / "atlas")
    with pytest.raises(ValueError, match="2 labels"):
        write_atlas(exemplars, labels[:2], tmp_path / "atlas")


def test_an_outline_lies_around_the_mask_alone():
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[0, 3, 3] = True
    colours = mask_colours(mask)[0]
    assert colours[3, 3] == 0 and (colours[2:5, 2:5] == 2).sum() == 8 and (colours == 1).sum() == 40


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """An atlas of 4,000 units in a browser, opened from disk, without a network."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    playwright = pytest.importorskip("playwright.sync_api")
    if executable is None:
        pytest.skip("no Chromium on this machine")
    root = tmp_path_factory.mktemp("page")
    labels, checks = rows(4000)
    index = write_atlas(exemplar_set(root / "exemplars", 4000), labels, root / "atlas", checks, {"title": "Four thousand"})
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800})
        page = context.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(request.url))
        page.goto(index.as_uri())
        yield page, errors
        browser.close()


@pytest.mark.browser
def test_the_page_searches_sorts_and_shows_a_few_cards_of_thousands(page):
    page, errors = page
    assert page.inner_text("#count") == "4,000 of 4,000 units"
    assert 0 < page.locator(".card").count() < 120
    first = page.locator(".card .label").first.inner_text()
    best = max((row for row in rows(4000)[0] if row["label"]), key=lambda row: (row["evidence"], -row["unit"]))
    assert first == best["label"]
    page.fill("#query", "circles 17")
    texts = page.locator(".card .label").all_inner_texts()
    assert texts and all("circles" in text and "17" in text for text in texts)
    page.fill("#query", "")
    page.select_option("#sort", "pearson")
    assert "unit 3999" in page.locator(".card .top").first.inner_text()
    page.select_option("#status", "passed")
    assert page.inner_text("#count").startswith("1,334 of")
    page.select_option("#status", "silent")
    assert page.locator(".card").count() == 1
    page.select_option("#status", "")
    page.select_option("#sort", "unit")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function("[...document.querySelectorAll('.card .top')].some(e => e.innerText.includes('unit 3999'))")
    assert page.locator(".card").count() < 120 and not errors


@pytest.mark.browser
def test_a_unit_opens_with_all_exemplars_and_its_text_is_no_markup(page):
    page, errors = page
    page.evaluate("window.scrollTo(0, 0)")
    page.fill("#query", "water 0")
    page.locator(".card").first.click()
    assert page.locator("dialog .shot").count() == 15 and page.locator("dialog .label b").count() == 0
    assert "<b>" in page.inner_text("dialog .label")
    page.wait_for_function("[...document.querySelectorAll('dialog img')].every(i => i.complete && i.naturalWidth > 0)")
    mask = page.locator("dialog .shot i").first
    assert mask.is_visible()
    page.keyboard.press("Escape")
    page.click("#masks")
    assert not page.locator(".card .shot i").first.is_visible()
    page.click("#masks")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") in ("light", "dark") and not errors
