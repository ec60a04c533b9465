"""Many visitors at once on this machine: errors, latencies, and what the demo holds on to.

Starts `devil demo` on loopback and lets clients ask without a pause: most ask places, descriptions and maps of photographs, which
they upload; the rest open the page and click, or send what is refused (layers and places that there are not, broken images,
handmade requests). Prints a table of the server's memory, open handles and threads and of the files in its folder over the
requests, and a line of JSON. Example: `python scripts/load_demo.py --clients 50 --requests 2000`.
"""

import argparse
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

EXAMPLES = Path(__file__).parents[1] / "src" / "devil_hf" / "demo" / "examples"
LAYERS = ("blocks.2", "blocks.4", "blocks.6", "bn2")  # of `photos`, which answers about photographs
ROWS = 20  # of the table
KINDS = {"place": 0.49, "describe": 0.15, "maps": 0.01, "page": 0.1, "upload": 0.05, "refused": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600, help="ends before all requests were made")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "devil_hf.cli.main", "demo", "--host", "127.0.0.1", "--port", str(port)]
        environment = os.environ | {"GRADIO_TEMP_DIR": f"{folder}/uploads"}
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, server)
            report = {"start_seconds": round(time.perf_counter() - began, 1)}
            report |= Load(address, psutil.Process(server.pid), Path(folder)).run(options)
        finally:
            server.terminate()
            server.wait()
    print(json.dumps(report))


def wait_for(address: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the demo ended with exit code {server.returncode} before it answered")


class Load:
    """The clients, and what they and the server come to."""

    def __init__(self, address: str, server: psutil.Process, folder: Path):
        self.address, self.server, self.folder = address, server, folder
        self.paths = [str(path) for path in sorted(EXAMPLES.glob("*.jpg"))]
        self.broken = str(folder / "broken.jpg")
        Path(self.broken).write_bytes(Path(self.paths[0]).read_bytes()[:200])
        self.events = json.loads(urlopen(f"{address}/config").read())["dependencies"]
        self.lock, self.said = threading.Lock(), dict[str, list[str]]()
        self.left, self.seconds, self.counts, self.errors = 0, [], Counter(), []

    def run(self, options: argparse.Namespace) -> dict:
        clients = [Client(self.address, verbose=False) for _ in range(options.clients)]
        began = time.perf_counter()
        self.place(clients[0], random.Random(0))
        report = {"first_answer_seconds": round(time.perf_counter() - began, 2), "clients": options.clients}
        for client in clients:  # warm: every kind of question once, so that the memory is what it stays at
            (self.maps if client is clients[0] else self.describe)(client, random.Random(0))
        print("requests  seconds  rss_mb  handles  threads  files  folder_mb", flush=True)
        self.left = options.requests
        began, rows = time.perf_counter(), []
        until = began + options.seconds
        threads = [threading.Thread(target=self.visit, args=(n, client, until)) for n, client in enumerate(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            done = len(self.seconds)
            if done >= len(rows) * options.requests / ROWS:
                rows.append(self.measure(done, time.perf_counter() - began))
            time.sleep(0.2)
        time.sleep(10)  # idle connections are closed by then
        rows.append(self.measure(len(self.seconds), time.perf_counter() - began))
        middle = rows[len(rows) // 2]
        grown = {name: rows[-1][name] - middle[name] for name in ("rss_mb", "handles", "threads")}
        report |= {"requests": len(self.seconds), "seconds": round(rows[-1]["seconds"]), **self.counts}
        report |= {"errors": len(self.errors), "first_error": self.errors[0] if self.errors else None}
        report |= {f"p{q}_seconds": round(float(np.percentile(self.seconds, q)), 2) for q in (50, 95)}
        return report | {"second_half": grown | {"requests": rows[-1]["requests"] - middle["requests"]}}

    def measure(self, done: int, seconds: float) -> dict:
        files = [path.stat().st_size for path in (self.folder / "uploads").rglob("*") if path.is_file()]
        row = {"requests": done, "seconds": seconds, "rss_mb": self.server.memory_info().rss >> 20}
        row |= {"handles": self.server.num_fds(), "threads": self.server.num_threads()}
        row |= {"files": len(files), "folder_mb": sum(files) >> 20}
        print(
            "{requests:8}  {seconds:7.0f}  {rss_mb:6}  {handles:7}  {threads:7}  {files:5}  {folder_mb:9}".format(**row),
            flush=True,
        )
        return row

    def visit(self, number: int, client: Client, until: float) -> None:
        rng = random.Random(number)
        while time.perf_counter() < until:
            with self.lock:
                if self.left <= 0:
                    return
                self.left -= 1
            kind = rng.choices(list(KINDS), KINDS.values())[0]
            began, problem = time.perf_counter(), None
            try:
                getattr(self, kind)(client, rng)
            except Exception as error:
                problem = f"{kind}: {type(error).__name__}: {error}"[:300]
            with self.lock:
                self.seconds.append(time.perf_counter() - began)
                self.counts[kind] += 1
                if problem:
                    self.errors.append(problem)

    def place(self, client: Client, rng: random.Random) -> None:
        given = rng.choice(LAYERS), rng.uniform(0, 255), rng.uniform(0, 255)
        client.predict(handle_file(rng.choice(self.paths)), *given, api_name="/describe_place")

    def describe(self, client: Client, rng: random.Random) -> None:
        """What is said of an image is what was said of it before, whoever asks beside."""
        path = rng.choice(self.paths)
        said = [row["description"] for row in client.predict(handle_file(path), api_name="/describe")]
        if self.said.setdefault(path, said) != said:
            raise RuntimeError(f"{Path(path).name} was described otherwise before: {said} after {self.said[path]}")

    def maps(self, client: Client, rng: random.Random) -> None:
        client.predict(handle_file(rng.choice(self.paths)), "red, a cat", "a", api_name="/map_phrases")

    def page(self, client: Client, rng: random.Random) -> None:
        """A visit: the page is opened, and its layer is changed."""
        session = secrets.token_hex(6)
        for name, data in (("start", []), ("choose_layer", [None, rng.choice(LAYERS)])):
            event = next(one for one in self.events if one["api_name"] == name)
            body = {"fn_index": event["id"], "data": data, "session_hash": session, "trigger_id": event["targets"][0][0]}
            self.post("queue/join", json.dumps(body).encode(), "application/json")
            with urlopen(f"{self.address}/gradio_api/queue/data?session_hash={session}", timeout=300) as lines:
                said = next(line for line in lines if b'"process_completed"' in line)
            if b'"success":true' not in said.replace(b" ", b""):
                raise RuntimeError(f"the page failed: {said[:200]!r}")

    def upload(self, client: Client, rng: random.Random) -> None:
        """A file of its own that nobody asks about."""
        body = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--B--\r\n'
        self.post("upload", body % rng.randbytes(200_000), "multipart/form-data; boundary=B")

    def refused(self, client: Client, rng: random.Random) -> None:
        """What is no question: it must be refused, and in words where it comes through the client."""
        image = handle_file(self.paths[0])
        wrong = rng.randrange(6)
        try:
            if wrong == 0:
                client.predict(image, "no_layer", 1, 1, api_name="/describe_place")
            elif wrong == 1:
                client.predict(image, LAYERS[0], 1e9, -1, api_name="/describe_place")
            elif wrong == 2:
                client.predict(handle_file(self.broken), api_name="/describe")
            elif wrong == 3:
                client.predict(image, ",".join("abcdefgh"), "the", api_name="/map_phrases")
            elif wrong == 4:
                self.post("queue/join", b"[" * 5000, "application/json")
            else:
                self.post("process_recording", b"", "multipart/form-data; boundary=B")
        except AppError as error:
            if wrong > 3 or "log says why" in str(error):
                raise
            return
        except HTTPError as error:
            if not (wrong > 3 and 400 <= error.code < 500):
                raise
            error.close()
            return
        raise RuntimeError(f"question {wrong}, which is none, was answered")

    def post(self, path: str, body: bytes, kind: str) -> None:
        with urlopen(Request(f"{self.address}/gradio_api/{path}", body, {"Content-Type": kind}), timeout=60) as answer:
            answer.read()


if __name__ == "__main__":
    main()
