"""Connections of strangers: slow ones end, large ones and those for other things are refused, uploads are bounded together."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from devil_hf.demo import connections, uploads
from devil_hf.demo.connections import Bounds
from devil_hf.demo.uploads import UploadFolder


def connect(served, visitor="127.0.0.1") -> socket.socket:
    address = urlsplit(served)
    return socket.create_connection((address.hostname, address.port), timeout=20, source_address=(visitor, 0))


def trickle(connection: socket.socket, piece: bytes, seconds: float) -> float:
    """Send a piece every tenth of a second until the server hangs up; the seconds until then."""
    began = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - began < seconds:
        try:
            connection.sendall(piece)
            if connection.recv(1000) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


def status(request) -> int:
    try:
        return urlopen(request, timeout=30).status
    except HTTPError as error:
        return error.code


def multipart(*files: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    parts = [
        b'--B\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), data)
        for name, data in files
    ]
    return b"".join(parts) + b"--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"}


def test_a_head_that_never_ends_is_hung_up_on(served, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1)
    for start in (b"", b"GET / HTTP/1.1\r\nX: "):
        with connect(served) as connection:
            connection.sendall(start)
            assert trickle(connection, b"x" if start else b"", 10) < 4
    with connect(served) as connection:  # one whole request does not make up for the next
        connection.sendall(b"GET /robots.txt HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        assert trickle(connection, b"G", 10) < 8


def test_a_body_that_trickles_is_hung_up_on(served, monkeypatch):
    monkeypatch.setattr(connections, "BODY_SECONDS", 1)
    for path in ("upload", "queue/join"):
        kind = "multipart/form-data; boundary=B" if path == "upload" else "application/json"
        head = f"POST /gradio_api/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 9000\r\n\r\n"
        with connect(served) as connection:
            connection.sendall(head.encode())
            assert trickle(connection, b" ", 10) < 4
    assert status(served) == 200


@pytest.mark.parametrize(
    ("path", "method", "code"),
    [
        ("gradio_api/process_recording", "POST", 404),
        ("gradio_api/run/describe", "POST", 404),
        ("gradio_api/api/describe", "POST", 404),
        ("gradio_api/vibe-edit", "POST", 404),
        ("gradio_api/component_server", "POST", 404),
        ("login", "POST", 404),
        ("", "PUT", 404),
        ("gradio_api/queue/join", "DELETE", 404),
        ("monitoring", "GET", 403),
    ],
)
def test_what_the_page_does_not_use_is_closed(served, path, method, code):
    assert status(Request(f"{served}/{path}", b"{}" if method != "GET" else None, method=method)) == code


def test_bodies_are_bounded(served):
    for path, size in (("upload", 22 * 2**20), ("queue/join", 2 * 2**20), ("call/describe", 2 * 2**20)):
        with connect(served) as connection:  # by what is announced, before it is sent
            connection.sendall(f"POST /gradio_api/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        with connect(served) as connection:  # by what is sent, where nothing is announced
            connection.sendall(f"POST /gradio_api/{path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n".encode())
            connection.sendall(b"Content-Type: multipart/form-data; boundary=B\r\n\r\n")
            sent = 0
            try:
                while sent < 60 * 2**20:
                    connection.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
                    sent += 2**16
            except OSError:
                pass
            assert sent < size + 8 * 2**20  # what lies in the buffers between
    many = multipart(*[(f"{number}.png", b"0" * 2**20) for number in range(25)])  # each small, together too much
    with pytest.raises((HTTPError, OSError)):
        urlopen(Request(f"{served}/gradio_api/upload", *many), timeout=30)


def begin_upload(served, visitor="127.0.0.1", size=900) -> socket.socket:
    """An upload whose head is sent, and nothing of its body."""
    connection = connect(served, visitor)
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    connection.sendall(head + b"Content-Length: %d\r\n\r\n" % size)
    return connection


@pytest.mark.parametrize("many", [False, True])
def test_uploads_at_once_are_counted_of_each_visitor_and_of_all(served, monkeypatch, many):
    monkeypatch.setattr(connections, "UPLOAD_WAIT", 1)
    count = connections.UPLOADS_AT_ONCE
    slow = [begin_upload(served, f"127.0.0.{2 + number % (count if many else 1)}") for number in range(count)]
    time.sleep(0.3)
    request = Request(f"{served}/gradio_api/upload", *multipart(("a.png", b"x")))
    assert status(request) == (503 if many else 200)  # many visitors keep another out, one does not
    for connection in slow:
        connection.close()
    assert status(request) == 200


def test_what_one_visitor_holds_open_is_counted(served, monkeypatch):
    monkeypatch.setattr(connections, "VISITOR_REQUESTS", 3)

    def listen(visitor):
        connection = connect(served, visitor)
        connection.sendall(b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: x\r\n\r\n")
        return connection, connection.recv(1000).split(b"\r\n")[0]

    listening = [listen("127.0.0.2") for _ in range(4)]
    assert [line for _, line in listening] == [b"HTTP/1.1 200 OK"] * 3 + [b"HTTP/1.1 429 Too Many Requests"]
    assert status(f"{served}/robots.txt") == 200  # another visitor
    for connection, _ in listening:
        connection.close()
    time.sleep(0.5)
    connection, line = listen("127.0.0.2")
    connection.close()
    assert line.endswith(b"200 OK")


@pytest.mark.parametrize("end", ["breaks off", "never ends", "names it otherwise", "has no end", "is none"])
def test_what_an_upload_leaves_is_deleted(served, app, monkeypatch, end):
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    before = set(folder.rglob("*"))
    if end == "never ends":
        monkeypatch.setattr(connections, "BODY_SECONDS", 1)
        monkeypatch.setattr(connections, "BODY_PACE", 2**30)
    body, _ = multipart(("a.png", os.urandom(300_000)))
    whole = len(body)
    if end == "names it otherwise":
        body = body.replace(b'"files"', b'"other"')
    if end == "has no end":
        body, whole = body[:-20], len(body) - 20
    if end == "is none":
        body = body.replace(b"\r\n--B--", b"\r\n--BAD-")
    if end in ("breaks off", "never ends"):
        whole *= 20
    for _ in range(3):
        connection = begin_upload(served, size=whole)
        with suppress(OSError):
            connection.sendall(body)
        time.sleep(0.2)
        if end == "breaks off":
            assert set(folder.rglob("*")) - before, "gradio begins a file"
        else:
            connection.settimeout(10)
            with suppress(OSError):
                assert connection.recv(1000)
        connection.close()
    until = time.monotonic() + 10
    while set(folder.rglob("*")) - before and time.monotonic() < until:
        time.sleep(0.1)
    assert set(folder.rglob("*")) <= before


def test_the_oldest_uploads_of_who_brings_too_much_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "VISITOR_BYTES", 1000)
    folder = UploadFolder(tmp_path)

    def bring(visitor, name, size=400):
        path = tmp_path / f"hash_{name}" / "image.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0" * size)
        folder.keep(visitor, [str(path)])
        return path.parent

    mine, other = [bring("me", number) for number in range(2)], bring("you", "other")
    assert all(one.exists() for one in (*mine, other))
    mine.append(bring("me", 2))
    assert [one.exists() for one in (*mine, other)] == [False, True, True, True]
    bring("me", 1)  # again: the newest now
    bring("me", 3)
    assert [one.exists() for one in (*mine, other)] == [False, True, False, True]


def test_many_small_files_are_looked_at_and_bounded_as_large_ones_are(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "VISITOR_FILES", 5)
    monkeypatch.setattr(uploads, "FOLDER_FILES", 30)
    folder = UploadFolder(tmp_path)
    folder.make_room()
    paths = [tmp_path / f"{number}" / "empty.png" for number in range(8)]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    folder.keep("me", [str(path) for path in paths])
    assert [path.exists() for path in paths] == [False] * 3 + [True] * 5
    assert folder.due
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    os.utime(tmp_path / "old", (0, 0))
    folder.make_room()
    assert not folder.due and (tmp_path / "new").exists() and not (tmp_path / "old").exists()


@pytest.mark.parametrize("limit", ["FOLDER_BYTES", "FOLDER_FILES"])
def test_a_full_folder_loses_its_oldest_files(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(uploads, limit, {"FOLDER_BYTES": 10_000, "FOLDER_FILES": 10}[limit])
    monkeypatch.setattr(uploads, "LOOK_SECONDS", -1)
    folder = UploadFolder(tmp_path)
    for number in range(20):
        path = tmp_path / f"{number:02}"
        path.write_bytes(b"0" * 1000)
        os.utime(path, (number, number))
    folder.make_room()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:02}" for number in range(12, 20)]


def test_on_a_space_the_proxy_names_the_visitor_and_nobody_else():
    scope = {"client": ("10.0.0.1", 5), "headers": [(b"x-forwarded-for", b"1.1.1.1, 2.2.2.2")]}
    assert Bounds(None, None)._visitor(scope) == "10.0.0.1"
    assert Bounds(None, None, behind_proxy=True)._visitor(scope) == "2.2.2.2"
    assert Bounds(None, None, behind_proxy=True)._visitor({"client": None, "headers": []}) == "nobody"


def test_uploads_over_http_are_counted_and_deleted(served, app, monkeypatch):
    monkeypatch.setattr(uploads, "VISITOR_BYTES", 3000)
    kept = []
    for number in range(4):
        body, headers = multipart((f"{number}.png", bytes([number]) * 1000))
        kept += urlopen(Request(f"{served}/gradio_api/upload", body, headers)).read().decode().strip('[]"').split('","')
    time.sleep(0.3)
    assert [os.path.exists(path) for path in kept] == [False, True, True, True]


def test_a_full_disk_keeps_no_opened_file(tmp_path):
    class Full:
        def __init__(self, path):
            path.touch()
            self.name = str(path)

        def close(self):
            raise OSError(28, "No space left on device")

    UploadFolder(tmp_path).keep("me", [], [Full(tmp_path / "one"), Full(tmp_path / "two")])
    assert not list(tmp_path.iterdir())
