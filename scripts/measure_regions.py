"""Memory and time of opening captioned regions: `python scripts/measure_regions.py --images 10000`.

Makes COCO labels of as many images (one small picture under many names, seven polygons each), opens them twice in fresh processes
(the first time rows are written to a cache, the second time they are found there), and reads some rows. Prints one JSON object:
megabytes above what the imports need, as the peak and as what stays, and seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, CLASSES, OBJECTS, READ = 160, 120, 80, 7, 200


def make_labels(folder: Path, images: int) -> Path:
    """COCO instances of `images` images in `folder`."""
    rng = np.random.default_rng(0)
    picture = folder / "0.jpg"
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(picture)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    content: dict[str, list] = {"images": [], "annotations": []}
    for number in range(images):
        if number:
            os.link(picture, folder / f"{number}.jpg")
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT})
        for _ in range(OBJECTS):
            outline = rng.uniform((30, 30), (WIDTH - 30, HEIGHT - 30)) + rng.uniform(5, 25) * circle
            shape = {"image_id": number, "category_id": int(rng.integers(CLASSES)), "iscrowd": 0, "bbox": [0, 0, 1, 1]}
            content["annotations"].append(shape | {"segmentation": [outline.round(2).ravel().tolist()]})
    content["categories"] = [{"id": number, "name": f"class {number}"} for number in range(CLASSES)]
    file = folder / "instances.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def memory() -> tuple[float, float]:
    """Megabytes of this process: its own now, and the peak of all."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    own, peak = (int(status.split(f"{name}:")[1].split()[0]) / 1024 for name in ("RssAnon", "VmHWM"))
    return own, peak


def open_and_read(labels: Path) -> dict[str, float]:
    """Open the regions of a file of labels in this process, and read a few."""
    import devil_hf.data.pairs.regions  # noqa: F401 - its imports are not what is measured
    from devil_hf.data.decoding import BadSamples, PairDecoder
    from devil_hf.data.pairs import open_pairs

    (own, peak), began = memory(), time.perf_counter()
    rows = open_pairs([{"kind": "regions", "path": str(labels), "images": str(labels.parent)}], 0, True)
    opened, decode = time.perf_counter(), PairDecoder(BadSamples())
    for index in range(READ):
        decode(rows[index])
    ended, (own_after, peak_after) = time.perf_counter(), memory()
    return {
        "rows": len(rows),
        "seconds_to_open": round(opened - began, 2),
        "milliseconds_a_row": round(1000 * (ended - opened) / READ, 2),
        "peak_megabytes": round(peak_after - peak, 1),
        "megabytes_that_stay": round(own_after - own, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--labels", type=Path, help="open this file of labels in this process, and nothing else")
    arguments = parser.parse_args()
    if arguments.labels:
        print(json.dumps(open_and_read(arguments.labels)))
        return
    with tempfile.TemporaryDirectory() as folder:
        labels = make_labels(Path(folder), arguments.images)
        environment = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache"}
        found: dict[str, object] = {"images": arguments.images}
        for name in ("first", "again"):
            command = [sys.executable, __file__, "--labels", str(labels)]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, encoding="utf-8")
            found[name] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
