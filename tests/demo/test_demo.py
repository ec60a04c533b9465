"""The demo without a browser: right answers by name, uploads bounded, no file and no address read that it should not."""

import copy
import gc
import json
import threading
import weakref
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image

gr = pytest.importorskip("gradio")

from gradio_client import Client, handle_file

from devil_hf.checkpoints import locate
from devil_hf.checkpoints.scope import measure_scope
from devil_hf.data.shapes import make_scene
from devil_hf.demo import visits as visits_module
from devil_hf.demo.app import example_images
from devil_hf.demo.checkpoints import PHOTOGRAPHS, SCENES, Checkpoints
from devil_hf.demo.explorer import Explorer, read_phrases
from devil_hf.demo.messages import told
from devil_hf.demo.uploads import read_upload
from devil_hf.demo.visits import Example, Visits
from devil_hf.questions.word_evidence import explain_words
from devil_hf.report import html
from devil_hf.report.features import feature_picture


@pytest.fixture(scope="module")
def client(served):
    return Client(served, verbose=False)


@pytest.fixture(scope="module")
def explorer(model, processor):
    return Explorer(model, processor)


def scene_file(folder, index=0):
    scene = make_scene(9, index)
    path = folder / f"scene_{index}.png"
    Image.fromarray(scene.image).save(path)
    return scene, str(path)


# ------------------------------------------------------------------------------------------------------------- answers


def test_programs_ask_a_place_by_pixel_and_it_names_what_is_there(client, tmp_path):
    right = asked = 0
    for index in range(5):
        scene, path = scene_file(tmp_path, index)
        answers = set()
        for item in scene.objects:
            row = client.predict(handle_file(path), "layer3", *item.centre, api_name="/describe_place")
            assert row["layer"] == "layer3" and " ".join(word for word, _ in row["words"]) == row["description"]
            right += item.colour in row["description"].split()
            asked += 1
            answers.add(row["description"])
        assert len(answers) > 1 or len(scene.objects) == 1
    assert right / asked > 0.6  # by chance one in eight
    large = str(tmp_path / "large.png")  # larger than what is kept; its pixels count as they were sent
    Image.fromarray(scene.image).resize((16 * 128, 16 * 128), Image.Resampling.NEAREST).save(large)
    places = [
        client.predict(handle_file(file), "layer3", 100 * scale, 30 * scale, api_name="/describe_place")["location"]
        for file, scale in ((path, 1), (large, 16))
    ]
    assert places[0] == places[1]
    rows = client.predict(handle_file(path), api_name="/describe")
    assert [row["layer"] for row in rows] == ["all", "layer1", "layer2", "layer3", "layer4"]


def test_programs_map_phrases_and_learn_the_scope(client, tmp_path):
    _, path = scene_file(tmp_path)
    picture, peaks = client.predict(handle_file(path), "red, star", "the", api_name="/map_phrases")
    with Image.open(picture) as figure:
        assert figure.width > 800
    assert len(peaks) == 8 and {peak["phrase"] for peak in peaks} == {"red", "star"}
    about = client.predict(api_name="/model")
    assert about["layers"] == ["layer1", "layer2", "layer3", "layer4"] and "photographs" in about["scope"]


def test_clicks_and_numbers_reach_the_same_place(explorer, images):
    look = explorer.look(images[0])
    for layer in explorer.layers:
        rows, columns = explorer.grid(look, layer)
        place = (rows - 1, columns // 2)
        x, y = explorer.pixel_of(look, layer, *place)
        (row,) = explorer.describe_pixel(look, x, y, [layer])
        assert row["location"] == place
        expected = explorer.model.describe(feature_maps=look.feature_maps, layers=layer, locations=[place], max_new_tokens=30)
        assert explorer.processor.post_process_descriptions(expected)[0]["description"] == row["description"]
    with pytest.raises(ValueError, match="is outside"):
        explorer.pixel_of(look, explorer.layers[-1], 99, 0)
    with pytest.raises(ValueError, match="no layer 'layer9'"):
        explorer.grid(look, "layer9")


def test_phrases_are_split_counted_and_bounded():
    assert read_phrases(" a dog,grass\n grass , the  sky ") == ["a dog", "grass", "the sky"]
    for text, message in ((" , ", "at least one"), (",".join("abcdefgh"), "8 phrases"), ("x" * 61, "too long")):
        with pytest.raises(ValueError, match=message):
            read_phrases(text)


# ------------------------------------------------------------------------------------------------------------- uploads


def test_hostile_files_get_a_reason(tmp_path, monkeypatch):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(100 * 2**20)
    archive = tmp_path / "archive.png"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    truncated = tmp_path / "truncated.jpg"
    Image.effect_noise((300, 300), 90).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:4000])
    vector = tmp_path / "vector.svg"
    vector.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    program = tmp_path / "program.eps"
    Image.new("RGB", (9, 9)).save(program)
    empty = tmp_path / "empty.png"
    empty.touch()
    for path, message in (
        (large, "100 MB"),
        (archive, "cannot be read"),
        (truncated, "cannot be read"),
        (vector, "cannot be read"),
        (program, "cannot be read"),
        (empty, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_upload(path)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    with pytest.raises(ValueError, match="million"):
        read_upload(bomb)
    wide = tmp_path / "wide.png"
    Image.new("L", (9_000, 5_000)).save(wide)
    with pytest.raises(ValueError, match="9000 × 5000"):
        read_upload(wide)


def test_good_files_become_upright_small_pictures(tmp_path):
    photo = Image.new("RGB", (3000, 1500), "red")
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by a quarter
    photo.save(tmp_path / "photo.jpg", exif=exif)
    picture = read_upload(tmp_path / "photo.jpg")
    assert picture.size == (512, 1024) and picture.mode == "RGB"
    Image.new("RGBA", (30, 20)).save(tmp_path / "clear.webp")
    assert read_upload(tmp_path / "clear.webp").size == (30, 20)


# -------------------------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", str(locate("shapes"))])
def test_no_file_outside_the_uploads_is_served(served, path):
    path = f"{path}/config.json" if path == str(locate("shapes")) else path
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{served}/{route}{path}")
        assert refused.value.code in (403, 404, 405) and b"root:" not in refused.value.read()


def call(served, endpoint, data):
    """What the server sends to a handmade request."""
    request = Request(
        f"{served}/gradio_api/call/{endpoint}",
        json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.loads(urlopen(request).read())["event_id"]
    return urlopen(f"{served}/gradio_api/call/{endpoint}/{event}", timeout=60).read().decode()


@pytest.mark.parametrize("path", ["/etc/passwd", str(locate("shapes") / "config.json")])
def test_a_request_cannot_name_a_file_of_the_server(served, path):
    answer = call(served, "describe", [{"path": path, "meta": {"_type": "gradio.FileData"}}])
    assert "event: error" in answer and "Traceback" not in answer and "root:" not in answer


def test_a_request_cannot_make_the_server_fetch_an_address(served):
    asked = []

    class Inside(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Inside)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/secret.png"
    file, nothing = {"path": address, "meta": {"_type": "gradio.FileData"}}, "not fetched"
    answer = call(served, "describe", [file | {"path": "x.png", "url": address}])
    assert "event: error" in answer
    assert nothing in call(served, "describe", [file])
    # Fields of text would fetch an address just the same.
    for data in ([None, file, 1, 1], [None, [{"inside": file}], 1, 1]):
        answer = call(served, "describe_place", data)
        assert "event: error" in answer and nothing in answer
    server.shutdown()
    assert not asked


def test_errors_are_messages_and_inner_ones_say_nothing_of_the_inside():
    def ours():
        raise ValueError("the layer is called otherwise")

    def inner():
        raise RuntimeError("/home/somebody/secret.py broke")

    def both():
        raise ValueError(
            "<img src=x> of /home/somebody/x y, or C:\\Users\\me, read by hf_abcdefgh; see https://hub/a/b and and/or\nmore"
        )

    with pytest.raises(gr.Error, match="called otherwise"):
        told(ours)()
    with pytest.raises(gr.Error) as error:
        told(inner)()
    assert "secret" not in str(error.value)
    with pytest.raises(gr.Error) as error:
        told(both)()
    assert error.value.message == "&lt;img src=x&gt; of … y, or …, read by …; see https://hub/a/b and and/or more"


def test_the_picker_follows_its_owner(monkeypatch):
    assert not Checkpoints("shapes", models="none").picker
    assert Checkpoints(models="none").picker, "between the built-in ones"
    assert Checkpoints(models="any").picker
    some = Checkpoints(models="user/one, user/two")
    assert some.picker
    with pytest.raises(ValueError, match="not among the checkpoints"):
        some.get("user/three")
    paths = ("../etc", "/etc/passwd", "src/devil_hf", "user/../x", "https://hub/user/x")
    for name in (*paths, "user", "user/\u212a", None, 7, ["user/x"]):
        with pytest.raises(ValueError, match=r"is not a Hub id|not among"):
            Checkpoints(models="any").get(name)
    monkeypatch.setenv("DEVIL_MODELS", "user/four")
    monkeypatch.setenv("DEVIL_CHECKPOINT", "user/five")
    from_environment = Checkpoints()
    assert from_environment.default == "user/five"
    assert from_environment.listed == ["user/four"]


def test_few_models_stay_in_memory(model, processor, monkeypatch):
    checkpoints = Checkpoints(models="any")
    monkeypatch.setattr(Checkpoints, "_load", lambda self, name: Explorer(model, processor))
    for name in (PHOTOGRAPHS, SCENES, "a/b", "c/d", "e/f"):
        checkpoints.get(name)
    assert sorted(checkpoints._loaded) == ["c/d", "e/f", PHOTOGRAPHS, SCENES]
    checkpoints.held("c/d")  # asked again, it stays
    checkpoints.get("g/h")
    assert sorted(checkpoints._loaded) == ["c/d", "g/h", PHOTOGRAPHS, SCENES]
    with pytest.raises(ValueError, match="e/f has made room"):
        checkpoints.held("e/f")


def test_an_example_is_looked_at_by_the_model_of_its_world(model, processor, images, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_load", lambda self, name: Explorer(model, processor))
    checkpoints = Checkpoints(models="any")
    for name in (*checkpoints.own, "user/own"):
        checkpoints.get(name)
    examples = example_images()
    assert {example.checkpoint for example in examples} == {PHOTOGRAPHS, SCENES}
    visits = Visits(checkpoints, examples)
    session = visits.start()["session"]
    assert session.checkpoint == PHOTOGRAPHS
    scene = visits.open_example(len(examples) - 1, session.checkpoint, None)["session"]
    assert scene.checkpoint == SCENES
    assert visits.open_example(0, "user/own", None)["session"].checkpoint == "user/own", "whoever brought one stays with it"


def test_an_image_unlike_the_training_is_said_to_be_so(model, processor, images):
    asked = copy.deepcopy(model)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    asked.config.scope_statistics = measure_scope(asked, [pixels, pixels + 0.01])
    asked.config.scope = "<b>Only noise.</b>"
    checkpoints = Checkpoints(models="none")
    checkpoints._loaded[PHOTOGRAPHS] = explorer = Explorer(asked, processor)
    visits = Visits(checkpoints, [Example(image, PHOTOGRAPHS) for image in images])
    assert "What this model knows" in visits.head(PHOTOGRAPHS, explorer.look(images[0]))
    told = visits.head(PHOTOGRAPHS, explorer.look(Image.new("RGB", (50, 50), "red")))
    assert "this image is unlike" in told and "&lt;b&gt;" in told and "<b>Only" not in told


def test_features_of_old_visits_make_room_and_are_made_again(model, processor, images, monkeypatch):
    checkpoints = Checkpoints(models="none")
    checkpoints._loaded[PHOTOGRAPHS] = Explorer(model, processor)
    visits = Visits(checkpoints, [Example(image, PHOTOGRAPHS) for image in images])
    first = visits.start()["session"]
    said = visits.choose_layer(first, model.layer_names[0])["place"]
    monkeypatch.setattr(visits_module, "FEATURE_BYTES", first.look.size + 1)
    second = visits.start()["session"]
    assert first.look is None and second.look is not None
    assert visits.choose_layer(first, model.layer_names[0])["place"] == said
    assert first.look is not None and second.look is None


def test_a_visit_that_nobody_holds_leaves_memory(model, processor, images):
    checkpoints = Checkpoints(models="none")
    checkpoints._loaded[PHOTOGRAPHS] = Explorer(model, processor)
    visits = Visits(checkpoints, [Example(image, PHOTOGRAPHS) for image in images])
    session = visits.start()["session"]
    left = [weakref.ref(visits.start()["session"]), weakref.ref(session.look)]
    session = visits.choose_layer(visits.start()["session"], model.layer_names[0])["session"]  # another image, the same visitor
    gc.collect()
    assert session.look is not None and [one() for one in left] == [None, None]


# ------------------------------------------------------------------------------------------------------ pieces of html


def test_words_are_buttons_that_say_their_evidence_and_cannot_break_out():
    words = [("red", 1.5), ('"><script>', -0.5)]
    text = html.image_html([{"layer": "all", "location": None, "description": "", "evidence": 0.5, "words": words}])
    assert text.count("<button") == 2 and 'data-word="red" data-before=""' in text and "+1.50 nats" in text
    assert 'data-before="red"' in text
    assert "<script" not in text
    assert "240, 130, 40" in text and "63, 142, 206" in text


def test_the_stage_marks_the_place(images):
    stage = html.stage_html(images[0], (0.125, 0.0, 0.875, 1.0), (4, 3), (1, 2), "<layer>")
    assert 'data-rows="4"' in stage and 'data-row="1"' in stage and "<layer>" not in stage
    assert "left:62.500%;top:25.000%;width:25.000%;height:25.000%" in stage


def test_a_clicked_word_is_mapped_after_the_words_before_it(explorer, images):
    checkpoints = Checkpoints(models="none")
    checkpoints._loaded[PHOTOGRAPHS] = explorer
    visits = Visits(checkpoints, [Example(image, PHOTOGRAPHS) for image in images])
    session = visits.start()["session"]
    said, features = ["a red dog on the grass"], session.look.feature_maps
    (found,) = explain_words(explorer.model, explorer.processor, sentences=said, feature_maps=features)
    at = len(found.words) - 1
    before = " ".join(word.text for word in found.words[:at])
    outputs = explorer.map_phrases(session.look, [found.words[at].text], before)
    tokens = len(explorer.processor(text=[" " + found.words[at].text])["input_ids"][0])
    for layer, maps in outputs.maps.items():
        torch.testing.assert_close(tokens * maps[0, 0], found.by_layer[layer][at], atol=1e-4, rtol=0)
    clicked = visits.act(SimpleNamespace(word=found.words[at].text, before=before), session, explorer.layers[0], "the")
    assert (clicked["phrases"], clicked["carrier"]) == (found.words[at].text, before)
    assert clicked["maps"] == html.maps_html(explorer.processor, session.image, outputs, [found.words[at].text])


def test_every_phrase_has_a_map_at_every_layer_on_one_scale(explorer, images):
    look = explorer.look(images[0])
    outputs = explorer.map_phrases(look, ["a dog", "red"], "the")
    page = html.maps_html(explorer.processor, look.image, outputs, ["a dog", "red"])
    assert page.count("<img") == 2 * len(explorer.layers) and page.count("dv-scale") == 1
    assert page.count('alt="map of red at') == len(explorer.layers)
    long = explorer.map_phrases(look, ["red"], "the " * 10_000)  # of a carrier only the beginning is read
    assert long.maps.keys() == outputs.maps.keys()
    assert explorer.map_phrases(look, ["red"], None).maps.keys() == outputs.maps.keys()


def test_like_features_get_like_colours():
    torch.manual_seed(0)
    here, there = torch.randn(2, 16)
    features = torch.where(torch.arange(6)[None, None, :] < 3, here[:, None, None], there[:, None, None])
    features = features.expand(16, 4, 6) + 0.001 * torch.randn(16, 4, 6)
    pixels = np.asarray(feature_picture(features), dtype=int)
    assert pixels.shape == (4, 6, 3)
    assert np.abs(pixels[:, :3, 0] - pixels[0, 0, 0]).max() < 5 and abs(pixels[0, 0, 0] - pixels[0, 5, 0]) > 200
    assert np.array_equal(pixels, np.asarray(feature_picture(features), dtype=int))
    assert feature_picture(torch.ones(2, 1, 1)).size == (1, 1)  # nothing to tell apart
