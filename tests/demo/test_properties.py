"""Whatever a request brings, the demo gives the right answer or says in words why not."""

import io
import json
import re
from http.client import HTTPConnection
from types import SimpleNamespace
from urllib.parse import urlsplit

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from devil_hf.demo.checkpoints import PHOTOGRAPHS, Checkpoints
from devil_hf.demo.downloads import FETCHED
from devil_hf.demo.endpoints import Endpoints, shrunk_point
from devil_hf.demo.explorer import MAX_PHRASE_LENGTH, MAX_PHRASES, Explorer, read_phrases
from devil_hf.demo.messages import LONGEST, message, told
from devil_hf.demo.uploads import FORMATS, LONGEST_SIDE, read_upload
from devil_hf.demo.visits import Example, Visits

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PIECES = ("example", "word", "before", "layer", "at", "x", "y")  # what an event of the page may carry
numbers = st.floats() | st.integers() | st.floats(-20, 150) | json_values
sizes = st.tuples(st.integers(1, 60), st.integers(1, 60))


@pytest.fixture(scope="module")
def explorer(model, processor):
    return Explorer(model, processor)


@pytest.fixture(scope="module")
def visits(explorer, images):
    checkpoints = Checkpoints(models="none")
    checkpoints._loaded[PHOTOGRAPHS] = explorer
    return Visits(checkpoints, [Example(image, PHOTOGRAPHS) for image in images])


def asked(answer, *arguments):
    """What is answered; None for a refusal, which must be in words of ours."""
    try:
        return told(answer)(*arguments)
    except gr.Error as error:
        said = error.message
        assert len(said) > 10 and "log says why" not in said and "Traceback" not in said and "<" not in said
        return None


def png(size) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- answers


@given(size=sizes, layer=st.sampled_from(["layer", "all", ""]) | st.integers(0, 3) | json_values, x=numbers, y=numbers)
def test_a_place_is_answered_where_there_is_one(explorer, tmp_path_factory, size, layer, x, y):
    path = tmp_path_factory.getbasetemp() / "place.png"
    path.write_bytes(png(size))
    layer = explorer.layers[layer % len(explorer.layers)] if type(layer) is int else layer
    row = asked(Endpoints("it", explorer).describe_place, str(path), layer, x, y)
    inside = all(type(one) in (int, float) for one in (x, y)) and 0 <= x < size[0] and 0 <= y < size[1]
    if not inside or layer not in explorer.layers:
        assert row is None
    elif row is not None:  # the crop may end before
        rows, columns = explorer.grid(explorer.look(read_upload(path)), layer)
        assert row["layer"] == layer and 0 <= row["location"][0] < rows and 0 <= row["location"][1] < columns


@given(size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)), share=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_point_of_the_sent_image_lies_at_the_same_share_of_the_kept_one(size, share):
    picture = SimpleNamespace(info={"sent": size}, width=min(size[0], LONGEST_SIDE), height=min(size[1], LONGEST_SIDE))
    x, y = share[0] * size[0], share[1] * size[1]
    if x >= size[0] or y >= size[1]:
        with pytest.raises(ValueError, match=f"{size[0]} wide and {size[1]} high"):
            shrunk_point(picture, x, y)
        return
    left, top = shrunk_point(picture, x, y)
    assert 0 <= left < picture.width and 0 <= top < picture.height
    assert abs(left - share[0] * picture.width) <= 0.5 and abs(top - share[1] * picture.height) <= 0.5


@given(phrases=st.text(max_size=100) | st.lists(st.text(max_size=10)).map(",".join) | json_values, carrier=json_values)
def test_phrases_are_mapped_or_refused(explorer, tmp_path_factory, phrases, carrier):
    path = tmp_path_factory.getbasetemp() / "phrases.png"
    path.write_bytes(png((40, 30)))
    answer = asked(Endpoints("it", explorer).map_phrases, str(path), phrases, carrier)
    if answer is not None:
        names = read_phrases(phrases)
        assert len(names) <= MAX_PHRASES and all(len(name) <= MAX_PHRASE_LENGTH for name in names)
        assert [peak["phrase"] for peak in answer[1]] == names * len(explorer.layers)


@given(
    row=numbers,
    column=numbers,
    layer=json_values | st.none(),
    event=st.fixed_dictionaries({}, optional={name: numbers | st.lists(numbers) for name in PIECES}),
)
def test_clicks_of_any_kind_leave_the_visit_as_it_was_or_change_it(visits, explorer, row, column, layer, event):
    session = visits.start()["session"]
    place = session.place
    layer = explorer.layers[0] if layer is None else layer
    for answer in (
        asked(visits.read_numbers, session, layer, row, column),
        asked(visits.act, SimpleNamespace(**event), session, layer, "the"),
        asked(visits.choose_layer, session, layer),
    ):
        assert answer is not None or session.place is place or session.place


# ------------------------------------------------------------------------------------------------------------- uploads


@given(
    size=sizes,
    mode=st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]),
    kind=st.sampled_from([*FORMATS, "ICO", "PPM", "TGA", "PDF", "JPEG2000"]),
    damage=st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=4)), max_size=3),
    end=st.integers(0, 5000) | st.none(),
)
def test_a_file_is_an_upright_rgb_picture_or_refused(tmp_path_factory, size, mode, kind, damage, end):
    buffer = io.BytesIO()
    try:
        Image.new(mode, size).save(buffer, kind)
    except (OSError, ValueError, KeyError):  # this format has no such mode
        return
    data = bytearray(buffer.getvalue())
    for place, patch in damage:
        data[place % len(data) : place % len(data) + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "file.any"
    path.write_bytes(data[:end])
    picture = asked(read_upload, str(path))
    if picture is not None:
        assert picture.mode == "RGB" and max(picture.size) <= LONGEST_SIDE
        assert picture.info.keys() == {"sent"}
    if not damage and end is None and mode != "P":  # Pillow writes palettes without a colour that it does not read
        assert (picture is not None) == (kind in FORMATS)
        assert picture is None or picture.size == size


# ------------------------------------------------------------------------------------------------------------ messages


@given(
    text=st.text(),
    place=st.from_regex(r"(/[\w.-]+){2,5}", fullmatch=True),
    token=st.from_regex(r"hf_[A-Za-z0-9]{8,20}", fullmatch=True),
)
def test_messages_hold_no_paths_no_tokens_and_no_markup(text, place, token):
    said = message(f"{text} {place} '{place}' ({place}) {token} x={place}")
    assert place not in said and token not in said
    assert not re.search(r"[<>]|&(?!(amp|lt|gt);)", said) and "\n" not in said and len(said) <= 5 * LONGEST + 1


@given(name=st.text(max_size=30) | st.from_regex(r"[.\w/ -]{0,20}\.(json|safetensors|py)", fullmatch=True))
def test_no_file_that_is_fetched_leads_out_of_its_folder_or_is_code(name):
    if FETCHED.fullmatch(name):
        assert not set(name) & set("/\\*?[]\0 ") and not name.startswith((".", "-"))
        assert name.endswith((".json", ".safetensors", ".txt", ".model"))


@given(name=json_values | st.from_regex(r"[\w.-]{0,9}/[\w./-]{0,9}", fullmatch=True))
def test_only_hub_ids_reach_the_hub(name):
    checkpoints = Checkpoints(models="any")
    reached = []
    checkpoints.downloads.ask = lambda name, **_: reached.append(name)
    with pytest.raises(ValueError, match=r"is not a Hub id|cannot be loaded"):
        checkpoints.get(name)
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", one) and ".." not in one for one in reached)


# -------------------------------------------------------------------------------------------------------------- server


@given(
    path=st.sampled_from(["queue/join", "call/describe", "call/describe_place", "call/nothing", "cancel", "reset", "upload"]),
    body=st.binary(max_size=50)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {},
        optional={
            "data": json_values | st.lists(json_values, max_size=5),
            "fn_index": st.integers(-2, 30) | json_values,
            "session_hash": json_values | st.just("abc"),
            "event_data": json_values,
            "trigger_id": json_values,
            "event_id": json_values,
        },
    ).map(lambda value: json.dumps(value).encode()),
    kind=st.sampled_from(["application/json", "multipart/form-data; boundary=B", "multipart/form-data", "text/plain", ""]),
)
def test_handmade_requests_get_no_insides(served, path, body, kind):
    address = urlsplit(served)
    connection = HTTPConnection(address.hostname, address.port, timeout=30)
    connection.request("POST", f"/gradio_api/{path}", body, {"Content-Type": kind})
    answer = connection.getresponse()
    said = answer.read().decode(errors="replace")
    connection.close()
    assert "Traceback" not in said and "site-packages" not in said and "/src/devil_hf" not in said
    assert answer.status < 500 or said == "Internal Server Error"
