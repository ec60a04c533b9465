"""What the core can do without the extras: it loads and asks the embedded checkpoint, and names what is missing.

python .ci/core.py        in an environment that holds `pip install .`
"""

import re
import statistics
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("train", "evaluate", "demo")
MODULES = {"scikit-learn": "sklearn", "bert-score": "bert_score", "grad-cam": "pytorch_grad_cam"}
BIN = Path(sys.executable).parent


def is_installed(package: str) -> bool:
    """Whether a distribution is there, by the name that pip knows."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def seconds(*command: str) -> str:
    """The median of three runs after a first one, which fills the caches of the disk."""
    times = []
    for _ in range(4):
        began = perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(perf_counter() - began)
    return f"{statistics.median(times[1:]):.2f} s"


def ask() -> None:
    """Load the embedded checkpoint, and ask it for words and a map; the same on the command line."""
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    import devil_hf
    from devil_hf.checkpoints import locate
    from devil_hf.data.shapes import make_scene

    shapes = locate("shapes")
    model, processor = AutoModel.from_pretrained(shapes), AutoProcessor.from_pretrained(shapes)
    assert isinstance(model, devil_hf.DevilModel)
    scene = make_scene(1, 0)
    inputs = processor(images=scene.image, return_tensors="pt")
    words = processor.batch_decode(model.generate(**inputs, max_new_tokens=30), skip_special_tokens=True)[0]
    maps = model.attribute(**inputs, phrases=processor(text=[scene.objects[0].colour], return_tensors="pt"))
    processor.overlay(maps, images=scene.image)
    print(f"describes scene 0 of the held-out world: {words}")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "scene.png"
        Image.fromarray(scene.image).save(picture)
        print(run("describe", str(picture)).stdout)


def run(*words: str) -> subprocess.CompletedProcess:
    """A command line of `devil`."""
    return subprocess.run([str(BIN / "devil"), *words], capture_output=True, text=True)


def refuse(*verb: str) -> None:
    """A verb of an extra ends with the command that installs it."""
    done = run(*verb)
    assert done.returncode == 1 and "pip install 'devil-hf[" in done.stderr, (verb, done.returncode, done.stderr)
    print(f"devil {' '.join(verb)}: {done.stderr.strip().splitlines()[-1]}")


def main() -> None:
    packages = [re.match(r"[\w-]+", line)[0] for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]]
    present = [package for package in packages if is_installed(package) or find_spec(MODULES.get(package, package))]
    assert not present, f"the core brings {present}"
    ask()
    for verb in (["evaluate", "shapes", "--limit", "1"], ["demo"], ["quickstart"]):
        refuse(*verb)
    size = sum(file.stat().st_size for file in Path(sys.prefix).rglob("*") if file.is_file() and not file.is_symlink())
    print(f"size: {size / 1e9:.2f} GB")
    print(f"import devil_hf: {seconds(sys.executable, '-c', 'import devil_hf')}")
    print(f"devil --help: {seconds(str(BIN / 'devil'), '--help')}")


if __name__ == "__main__":
    main()
