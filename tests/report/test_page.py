"""The page of `devil report`: its figures are those of the questions, it goes on where it stopped, and it needs nothing else."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from devil_hf.cli.main import build_parser, main
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.questions.word_evidence import explain_words
from devil_hf.report import page as page_module
from devil_hf.report.page import PAGE, Page, PageSettings, packed
from devil_hf.report.page_figures import _emerging, both_ends, ranked, word_table
from devil_hf.statistics import bootstrap_draws

ENOUGH = {"max_new_tokens": 6, "others": 2, "batch_size": 2}


@pytest.fixture
def folder(tmp_path, images):
    """Three pictures, one of them with a name that is markup, and a file that is none."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number, name in enumerate(("one.png", "</script><b>two.png".replace("/", "_"), "three.png")):
        images[number].save(place / name)
    (place / "broken.png").write_bytes(b"no picture")
    return place


@pytest.fixture
def written(model, processor, folder, tmp_path):
    settings = PageSettings(images=str(folder), output_dir=tmp_path / "out", **ENOUGH)
    return evaluate(Page, settings, model, processor), tmp_path / "out"


def shown(file):
    """What the page carries for its script."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)
    return json.loads(block[1])


def test_rows_are_what_the_questions_say(model, processor, folder, written):
    rows = {row["key"]: row for row in shown(written[1] / PAGE)["rows"]}
    assert set(rows) == {"one.png", "three.png", "<_script><b>two.png"}
    pixels = processor(images=[Image.open(folder / "one.png")], return_tensors="pt")["pixel_values"]
    row = rows["one.png"]
    sequences = model.generate(pixels, max_new_tokens=6)
    assert row["text"] == processor.batch_decode(sequences, skip_special_tokens=True)[0].strip()
    (found,) = explain_words(model, processor, pixels, [row["text"]])
    assert [word["text"] for word in row["words"]] == [word.text for word in found.words]
    for mine, wanted in zip(row["words"], found.words, strict=True):
        assert mine["evidence"] == pytest.approx(wanted.evidence, abs=1e-3)
        assert mine["alone"] == pytest.approx([wanted.alone[name] for name in model.layer_names], abs=1e-3)
        assert mine["lost"] == pytest.approx([wanted.lost[name] for name in model.layer_names], abs=1e-3)
    kept = row["maps"]["hidden"]
    values = np.frombuffer(base64.b64decode(kept["bytes"]), np.int8).reshape(-1, kept["rows"], kept["columns"])
    wanted = found.maps.maps["hidden"][0]
    assert np.abs(values / 127 * kept["peak"] - wanted.numpy()).max() <= 0.01 * float(wanted.abs().max())
    said = processor.post_process_descriptions(model.describe(pixels, layers=model.layer_names, max_new_tokens=6))
    assert [" ".join(word for word, _ in one["words"]) for one in row["layers"]] == [
        " ".join(one["description"].split()) for one in said
    ]


def test_the_page_is_whole_by_itself_and_shows_names_as_text(written):
    text = (written[1] / PAGE).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text.partition('<script type="application/json"')[0])
    assert "https://" not in text and "http://" not in text
    assert "<b>two" not in text
    assert "pictures" in text and str(written[1].parent) not in text


def test_broken_images_are_left_out_and_counted(written):
    evaluation = written[0]
    assert evaluation.dataset["size"] == 3
    assert evaluation.details["left_out"] == 1
    assert "1 that could not be read" in (written[1] / PAGE).read_text()


def test_a_page_goes_on_where_it_stopped_and_refuses_other_questions(model, processor, folder, written, monkeypatch):
    settings = PageSettings(images=str(folder), output_dir=written[1], **ENOUGH)
    monkeypatch.setattr(page_module, "explain_words", lambda *_, **__: pytest.fail("asked again"))
    again = evaluate(Page, settings, model, processor)
    assert again.scores == written[0].scores
    with pytest.raises(ValueError, match="map_places"):
        evaluate(Page, PageSettings(images=str(folder), output_dir=written[1], map_places=1, **ENOUGH), model, processor)
    monkeypatch.setattr(page_module, "INFORMED", (1, 1 / 32))
    with pytest.raises(ValueError, match=r"was made with \{'informed': \[2, 0.03125\]\}, not"):
        evaluate(Page, settings, model, processor)


def test_another_picture_under_the_same_name_is_asked_anew(model, processor, folder, images, written, monkeypatch):
    asked = []
    monkeypatch.setattr(page_module, "explain_words", lambda *given, **named: asked.append(1) or explain_words(*given, **named))
    before = {row["key"]: row["picture"] for row in shown(written[1] / PAGE)["rows"]}
    images[0].rotate(90).save(folder / "one.png")  # no control of the others
    evaluate(Page, PageSettings(images=str(folder), output_dir=written[1], **ENOUGH), model, processor)
    after = {row["key"]: row["picture"] for row in shown(written[1] / PAGE)["rows"]}
    assert [key for key in before if before[key] != after[key]] == ["one.png"]
    assert len(asked) == 1


def test_an_image_is_no_control_of_itself(written):
    rows = shown(written[1] / PAGE)["rows"]
    assert sorted(row["permutations"] for row in rows if row["words"]) in ([1, 1, 2], [1, 2, 2])


def test_maps_are_kept_to_a_hundredth_and_made_coarser():
    maps = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    kept = packed(maps)
    values = np.frombuffer(base64.b64decode(kept["bytes"]), np.int8).reshape(3, 5, 7) / 127 * kept["peak"]
    assert np.abs(values - maps.numpy()).max() < 0.01 * float(maps.abs().max())
    large = packed(torch.ones(2, 32, 20))
    assert (large["rows"], large["columns"]) == (16, 10)
    assert set(base64.b64decode(large["bytes"])) == {127}


def test_a_page_of_long_sentences_about_a_thousand_images_is_below_30_mb():
    generator = torch.Generator().manual_seed(0)
    layers = [f"layer{at}" for at in range(12)]
    figures = [-round(float(value), 3) for value in torch.randn(12, generator=generator)]
    words = [{"text": "something", "evidence": -10.123, "alone": figures, "lost": figures} for _ in range(25)]
    maps = {kind: packed(torch.randn(25, 14, 14, generator=generator)) for kind in ("shown", "hidden")}
    said = [{"layer": layer, "words": [["thing", -1.25] for _ in range(25)]} for layer in layers]
    row = {"picture": "x" * 8_000, "text": "something " * 25, "layers": said, "words": words, "maps": maps}
    assert maps["shown"]["rows"] == 11 and len(json.dumps(row)) < 30_000


def test_the_control_is_spread_over_the_whole_source(folder):
    found = page_module._other_images(page_module.open_images(str(folder)), 2)
    assert [number for number, _ in found] == [0, 3], "first and last"


@pytest.mark.browser
def test_a_word_shows_its_map_and_few_others_are_no_verdict(written):
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 390, "height": 800}).new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((written[1] / PAGE).as_uri())
        assert page.inner_text("#count") == "3 of 3 images"
        page.locator("#sheets").scroll_into_view_if_needed()  # sheets are made when they come near
        assert "too few to judge" in page.locator(".sheet .key").first.inner_text()
        page.locator(".sentence button").first.click()
        assert page.locator(".sheet .scale").first.inner_text().startswith("highest")
        page.fill("#query", "three.png")
        assert page.locator(".sheet").count() == 1 and not errors
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()


def test_what_the_page_says_of_words_and_controls(written):
    text = (written[1] / PAGE).read_text()
    assert (
        "chance gives about" not in text
        and "evenly spread" not in text
        and "would have said anyway"
        not in text.split('id="how"')[0].replace("does not tell a word from what the language model would have said anyway", "")
    )
    assert "of them stand beside a sentence" in text
    unsure = {"word": "a", "evidence": 1.0, "said": 2, "alone": [1.0], "interval": (-0.5, 2.0)}
    assert _emerging([unsure, {**unsure, "word": "b", "interval": (0.5, 2.0)}, {**unsure, "interval": None}])[0]["word"] == "b"
    assert len(_emerging([unsure])) == 0


def test_words_are_means_over_what_is_said_and_ranked_from_two_images_on():
    def word(text, evidence):
        return {"text": text, "evidence": evidence, "alone": [evidence / 2], "lost": [0.0]}

    rows = [
        {"words": [word("A", 0.0), word("dog.", 3.0), word("a", 1.0)]},
        {"words": [word("dog", 1.0)]},
        {"words": [word("cat", 9.0)]},
    ]
    words = word_table(rows, bootstrap_draws(3))
    assert [(one["word"], one["images"], one["said"], one["evidence"]) for one in words] == [
        ("cat", 1, 1, 9.0),
        ("dog", 2, 2, 2.0),
        ("a", 1, 2, 0.5),
    ]
    assert words[1]["alone"] == [1.0]
    assert words[1]["interval"] == (1.0, 3.0)
    assert words[0]["interval"] is None
    assert [one["word"] for one in ranked(words)] == ["dog"]
    assert both_ends(list("abcde"), 2) == (["a", "b"], ["e", "d"])


def test_a_report_without_a_name_is_the_page(tmp_path, capsys):
    for words in (
        ["report", "shapes", "photos"],
        ["report", "page", "shapes", "photos"],
        ["report", "--json", "shapes", "photos"],
    ):
        verb, settings, _ = build_parser().parse_args(words).chosen
        assert (verb.name, settings) == ("page", PageSettings)
    with pytest.raises(SystemExit, match="0"):
        main(["report", "--help"])
    assert "page" in capsys.readouterr().out
    assert main(["report", "shapes", str(tmp_path / "nothing"), "--output-dir", str(tmp_path / "out")]) == 1
    assert "neither a folder of images" in capsys.readouterr().err


def test_the_command_writes_the_page_of_scenes(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", "shapes", "shapes:2:1", "--output-dir", str(out), "--map-places", "16", "--others", "1"]) == 0
    told = capsys.readouterr().out
    assert "most evidence" in told and str(out / PAGE) in told
    assert len(shown(out / PAGE)["rows"]) == 2
