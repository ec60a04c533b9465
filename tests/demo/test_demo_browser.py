"""The demo as its visitors meet it, in a headless Chromium: `pytest -m browser`, with the extra `browser` installed."""

import json
import shutil
import zipfile

import pytest
from PIL import Image

from devil_hf.data.shapes import make_scene
from devil_hf.demo.page import PICKER
from tests.demo.conftest import GOOD

pytestmark = pytest.mark.browser

PATIENCE = 300_000  # milliseconds; machines are slow at times


@pytest.fixture(scope="module")
def address(app):
    return app.local_url


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.elsewhere = []
    page.failures = []
    own = (address.rstrip("/"), "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(own) or page.elsewhere.append(request.url))
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#dv-place .dv-said")
    yield page
    assert not page.elsewhere, "the page needs no other host"
    assert not page.failures
    page.close()


def said(page) -> str:
    return " ".join(page.locator("#dv-place .dv-said .dv-word").all_inner_texts())


def toast(page) -> str:
    """The message that stands there for some seconds, read at once."""
    return page.wait_for_function("() => document.querySelector('.toast-body')?.innerText").json_value()


def changed(page, action) -> str:
    """What the place card says after `action` has reached it."""
    before = page.locator("#dv-place .dv-where").inner_text()
    action()
    page.wait_for_function(
        "before => document.querySelector('#dv-place .dv-where').innerText !== before", arg=before, timeout=PATIENCE
    )
    return said(page)


def click_at(page, scene, item) -> str:
    box = page.locator(".dv-stage").bounding_box()
    x, y = (value / scene.image.shape[0] for value in item.centre)
    at = {"x": x * box["width"], "y": y * box["height"]}
    return changed(page, lambda: page.locator(".dv-stage").click(position=at))


def upload(page, path) -> None:
    page.locator("#dv-upload input[type=file]").set_input_files(str(path))


def two_objects():
    """A scene with two objects of different colours."""
    for index in range(100):
        scene = make_scene(31, index)
        if len(scene.objects) == 2 and len({item.colour for item in scene.objects}) == 2:
            return scene
    raise AssertionError


def test_two_places_at_two_layers_say_different_and_right_words(page, tmp_path):
    scene = two_objects()
    Image.fromarray(scene.image).save(tmp_path / "mine.png")
    before = page.locator(".dv-stage img").get_attribute("src")
    upload(page, tmp_path / "mine.png")
    page.wait_for_function("s => document.querySelector('.dv-stage img').src !== s", arg=before)
    first, second = scene.objects
    for layer in ("layer2", "layer3"):
        if page.locator("#dv-place .dv-where b").inner_text() != layer:
            page.locator("#dv-layer label", has_text=layer).click()
            page.wait_for_function("l => document.querySelector('#dv-place .dv-where b').innerText === l", arg=layer)
        here, there = click_at(page, scene, first), click_at(page, scene, second)
        assert here != there
        assert first.colour in here.split() and second.colour in there.split()
    # The same by keyboard alone: numbers, and arrow keys on the image.
    by_click = said(page)
    row, column = (page.locator(f"input[aria-label='{name}']").input_value() for name in ("Row", "Column"))
    page.locator("input[aria-label='Row']").fill("0")
    changed(page, lambda: page.locator("#dv-read").press("Enter"))
    page.locator("input[aria-label='Row']").fill(row)
    assert changed(page, lambda: page.locator("#dv-read").press("Enter")) == by_click
    page.locator(".dv-stage").focus()
    changed(page, lambda: page.keyboard.press("ArrowUp" if int(row) else "ArrowDown"))
    page.wait_for_function("() => document.activeElement.classList.contains('dv-stage')")
    assert page.locator("input[aria-label='Column']").input_value() == column


def test_phrases_and_words_give_maps(page):
    page.locator("#dv-phrases textarea, #dv-phrases input").first.fill("red, striped")
    page.locator("#dv-map").click()
    page.wait_for_selector("#dv-maps figure")
    assert page.locator("#dv-maps figure img").count() == 8 and page.locator("#dv-maps h4").count() == 2
    word = page.locator("#dv-sentence .dv-said .dv-word").nth(1)
    text = word.inner_text()
    word.focus()
    page.keyboard.press("Enter")
    heads = "[...document.querySelectorAll('#dv-maps h4')].map(head => head.innerText)"
    page.wait_for_function(f"text => JSON.stringify({heads}) === JSON.stringify([text])", arg=text)  # its map alone
    assert page.locator("#dv-maps figure img").count() == 4
    page.locator("#dv-phrases textarea, #dv-phrases input").first.fill("xylophone")
    page.locator("#dv-map").click()
    assert "no word that the language model knows" in toast(page)


def hostile(kind, folder):
    path = folder / {"large": "large.png", "zip": "a.png", "bomb": "b.png", "truncated": "c.jpg", "svg": "d.svg"}[kind]
    if kind == "large":
        with path.open("wb") as file:
            file.truncate(100 * 2**20)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)
    elif kind == "truncated":
        Image.effect_noise((300, 300), 90).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    else:
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>')
    return path


@pytest.mark.parametrize("kind", ["large", "zip", "bomb", "truncated", "svg"])
def test_hostile_uploads_get_a_message_and_the_app_lives_on(page, tmp_path, kind):
    upload(page, hostile(kind, tmp_path))
    message = toast(page)
    assert "Traceback" not in message and "/tmp" not in message and len(message) > 20
    Image.fromarray(two_objects().image).save(tmp_path / "good.png")
    before = page.locator(".dv-stage img").get_attribute("src")
    upload(page, tmp_path / "good.png")
    page.wait_for_function("s => document.querySelector('.dv-stage img').src !== s", arg=before)


MARKUP = "<img src=x onerror=window.hacked=1>"


def test_a_hostile_repository_shows_its_markup_as_text_and_a_broken_one_its_reason(page, owner):
    config, tokenizer = json.loads(GOOD["config.json"]), json.loads(GOOD["tokenizer.json"])
    config |= {"scope": f"It knows {MARKUP}"}
    vocabulary = tokenizer["model"]["vocab"]
    word = next(word for word in vocabulary if "red" in word)
    vocabulary[word.replace("red", MARKUP.replace(" ", ""))] = vocabulary.pop(word)
    files = {"config.json": json.dumps(config).encode(), "tokenizer.json": json.dumps(tokenizer).encode()}
    owner.plant("tester/markup", GOOD | files)
    owner.plant("tester/broken", GOOD | {"config.json": b'{"model_type": "' + MARKUP.encode() + b'"}'})

    def load(name):
        page.locator(f"input[aria-label^='{PICKER}']").fill(name)
        page.locator(f"input[aria-label^='{PICKER}']").press("Enter")
        page.get_by_role("button", name="Load this checkpoint").click()

    page.get_by_text("Another checkpoint").click()
    load("tester/broken")
    said = toast(page)
    assert "tester/broken cannot be loaded" in said and "<img src=x" in said and "Traceback" not in said
    load("tester/markup")
    page.wait_for_function("text => document.querySelector('.dv-scope').innerText.includes(text)", arg=MARKUP)
    load(f"x/{MARKUP}")
    page.wait_for_function("() => document.body.innerText.includes('is not a Hub id')")
    assert page.locator("img[src='x']").count() == 0
    assert page.evaluate("window.hacked") is None
    assert not any(owner.authorizations)
    load("shapes")
    page.wait_for_function("text => !document.querySelector('.dv-scope').innerText.includes(text)", arg=MARKUP)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(browser, address, theme):
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    page.set_default_timeout(PATIENCE)
    page.goto(f"{address}?__theme={theme}")
    page.wait_for_selector("#dv-place .dv-said")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    stage = page.locator(".dv-stage").bounding_box()
    assert stage["x"] >= 0 and stage["x"] + stage["width"] <= 390 and stage["width"] > 280
    page.locator(".dv-stage").tap(position={"x": 20, "y": 20})
    page.wait_for_selector("#dv-place .dv-where >> text=row 0, column 0")
    page.close()
