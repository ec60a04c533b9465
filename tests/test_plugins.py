"""To add is one place: the examples of docs/extend.md, installed as another package would be, are there by themselves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCE = "{kind: tsv, path: pairs.tsv}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A package whose one module holds every Python example of the page, and what a process needs to find it."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "my_plugin.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)))
    about = folder / "my_plugin-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[devil_hf.plugins]\nmine = my_plugin\n")
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 48), colour).save(folder / f"{number}.png")
    (folder / "pairs.tsv").write_text("0.png\ta red picture\n1.png\ta blue picture\n")
    (folder / "objects.boxes").write_text("0.png red 4 4 30 30\n1.png blue 8 8 40 40\n")
    return folder


def devil(folder: Path, *lines: list[str]) -> list[str]:
    """What each command line prints, all in one fresh process that starts in the plugin's folder."""
    program = (
        "import contextlib, io, json, sys\n"
        "from devil_hf.cli.main import main\n"
        "outputs = []\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):\n"
        "        assert main(line) == 0, line\n"
        "    outputs.append(output.getvalue())\n"
        "print(json.dumps(outputs))"
    )
    path = os.pathsep.join([str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(lines)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_added_is_in_the_help_and_in_the_results(installed):
    top, verb, group, evaluator, attribute, greeting, *_ = devil(
        installed,
        ["--help"],
        ["greet", "--help"],
        ["evaluate", "--help"],
        ["evaluate", "length", "--help"],
        ["attribute", "--help"],
        ["greet", "you"],
        [
            "evaluate",
            "maps",
            "shapes",
            "objects.boxes",
            "--layers",
            "layer3",
            "layer4",
            "--boards",
            "0",
            "--output-dir",
            "maps",
        ],
        ["evaluate", "length", "shapes", "0.png", "--output-dir", "length"],
        ["evaluate", "captions", "shapes", SOURCE, "--metrics", "words", "--output-dir", "captions"],
    )
    assert "say hello" in top
    assert "devil greet you" in verb
    assert "count the words that the model says" in group
    assert "--limit" in evaluator
    assert "highest" in attribute
    assert greeting == "hello you\n"
    maps, length, captions = (
        json.loads((installed / name / "scores.json").read_text())["scores"] for name in ("maps", "length", "captions")
    )
    assert "peak" in maps["highest"]
    assert length["all"]["words"] > 0
    assert captions["all"]["words"] > 0


def test_a_layout_is_read_and_a_question_asked(installed):
    program = (
        "import torch, my_plugin\n"
        "from devil_hf.build.layouts import infer_layout\n"
        "from devil_hf.checkpoints.loading import load\n"
        "from devil_hf.data.shapes import make_scene\n"
        "from devil_hf.build.hooks_devil import to_map\n"
        "found = infer_layout(torch.Size([16, 2, 6, 8]), 2, 96, 128)\n"
        "assert found == {'layout': 'CNHW', 'prefix': 0}, found\n"
        "assert to_map(torch.zeros(16, 2, 6, 8), 'CNHW', 0, 96, 128).shape == (2, 16, 6, 8)\n"
        "model, processor = load('shapes', 'cpu')\n"
        "scene = make_scene(1, 0)\n"
        "thing = scene.objects[0]\n"
        "others = [one for one in ('red', 'blue', 'green') if one not in {o.colour for o in scene.objects}]\n"
        "print(thing.colour == my_plugin.which(model, processor, scene.image, [*others, thing.colour]))\n"
    )
    path = os.pathsep.join([str(installed), str(ROOT / "src")])
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
