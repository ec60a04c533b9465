"""Many visitors at once on this machine: errors, latencies and the memory of the demo.

Starts `devil demo` on loopback, lets clients upload scenes and ask places, descriptions and maps without a pause, and prints one
line of JSON. Example: `python scripts/load_demo.py --clients 20 --seconds 60`.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
from gradio_client import Client, handle_file
from PIL import Image

from devil_hf.data.shapes import make_scene

LAYERS = ("layer1", "layer2", "layer3", "layer4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--map-share", type=float, default=0.05, help="share of requests that ask for maps")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, "-m", "devil_hf.cli.main", "demo", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, server)
        report = {"start_seconds": round(time.perf_counter() - began, 1)}
        report["start_cpu_seconds"] = round(sum(psutil.Process(server.pid).cpu_times()[:2]), 1)
        report |= load(address, psutil.Process(server.pid), options)
    finally:
        server.terminate()
    print(json.dumps(report))


def wait_for(address: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the demo ended with exit code {server.returncode} before it answered")


def load(address: str, server: psutil.Process, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for index in range(8):
            path = Path(folder) / f"{index}.png"
            Image.fromarray(make_scene(77, index).image).save(path)
            paths.append(str(path))
        clients = [Client(address, verbose=False) for _ in range(options.clients)]
        began = time.perf_counter()
        ask(clients[0], paths[0], "/describe_place")
        first = time.perf_counter() - began
        for client in clients:  # warm: every kind of question once, so that the memory is what it stays at
            ask(client, paths[0], "/map_phrases" if client is clients[0] else "/describe")
        before, seconds, errors = server.memory_info().rss, [], []
        until = time.perf_counter() + options.seconds
        threads = [
            threading.Thread(target=visit, args=(number, client, paths, until, options.map_share, seconds, errors))
            for number, client in enumerate(clients)
        ]
        memory = []
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(server.memory_info().rss)
            time.sleep(1)
    half = memory[len(memory) // 2 :]
    return {
        "first_answer_seconds": round(first, 2),
        "clients": options.clients,
        "seconds": options.seconds,
        "answers": len(seconds),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "p50_seconds": round(float(np.percentile(seconds, 50)), 2),
        "p95_seconds": round(float(np.percentile(seconds, 95)), 2),
        "rss_mb_before": before >> 20,
        "rss_mb_after": server.memory_info().rss >> 20,
        "rss_mb_highest": max(memory) >> 20,
        "rss_mb_growth_in_second_half": (half[-1] - half[0]) >> 20,
        "rss_mb_every_30_seconds": [one >> 20 for one in memory[::30]],
    }


def visit(number: int, client: Client, paths: list[str], until: float, map_share: float, seconds: list, errors: list):
    rng = random.Random(number)
    while time.perf_counter() < until:
        draw = rng.random()
        endpoint = "/map_phrases" if draw < map_share else "/describe" if draw < 0.3 else "/describe_place"
        began = time.perf_counter()
        try:
            ask(client, rng.choice(paths), endpoint, rng)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:300])
        seconds.append(time.perf_counter() - began)


def ask(client: Client, path: str, endpoint: str, rng: random.Random = random.Random(0)) -> None:  # noqa: B008
    given = {
        "/describe": [],
        "/describe_place": [rng.choice(LAYERS), rng.uniform(0, 127), rng.uniform(0, 127)],
        "/map_phrases": ["red, star", "the"],
    }[endpoint]
    client.predict(handle_file(path), *given, api_name=endpoint)


if __name__ == "__main__":
    main()
