"""The demo as a Space: it runs the package that it was published with, and what its extra brings."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard, constants

from devil_hf.cli.main import main
from devil_hf.demo.checkpoints import Checkpoints
from devil_hf.demo.explorer import Explorer
from devil_hf.hub import spaces

RUN_SPACE = """
import sys
from pathlib import Path
for extra in ("accelerate", "braceexpand", "datasets", "evaluate", "peft", "pycocotools", "scipy", "sklearn", "tabulate"):
    sys.modules[extra] = None  # a Space installs the core and gradio
import devil_hf.demo.app as app
assert Path(app.__file__).is_relative_to(Path.cwd()), app.__file__
from devil_hf.demo.checkpoints import Checkpoints
from devil_hf.demo.explorer import Explorer
checkpoints = Checkpoints()
demo = app.build_demo(checkpoints)
print(checkpoints.default)
print(checkpoints.get(checkpoints.default).model.layer_names)
"""


def test_a_space_runs_the_package_that_it_was_published_with(hub, tmp_path, capsys):
    assert main(["space", "tester/demo", "--private"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/spaces/tester/demo"
    space = hub.repositories["space", "tester/demo"]
    assert space.private and not space.variables
    for path, data in hub.files("tester/demo", kind="space").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    needed = (tmp_path / "requirements.txt").read_text().split()
    assert any(line.startswith("timm>=") for line in needed)
    assert not any(line.startswith(("devil-hf", "gradio")) for line in needed)
    assert not any(path.suffix == ".pyc" or path.name == ".git" for path in tmp_path.rglob("*"))
    environment = os.environ | {"SPACE_ID": "tester/demo", "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", RUN_SPACE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[0] == "photographs (built in)"
    assert "blocks.4" in run.stdout


def test_a_space_installs_the_core_and_what_the_demo_needs(monkeypatch):
    lines = ["torch>=2.11", "datasets>=4.0; extra == 'train'", "gradio>=6.31; extra == 'demo'"]
    lines += ["pandas[parquet]>=2; extra == 'demo'", "old; python_version < '3'"]
    monkeypatch.setattr(spaces, "requires", lambda name: lines)
    assert spaces._dependencies() == ["torch>=2.11", "pandas[parquet]>=2"]  # `sdk_version` brings gradio


def test_a_space_of_a_checkpoint_names_it(hub, published, capsys):
    arguments = ["space", "tester/other-demo", "--checkpoint", "tester/devil", "--json"]
    assert main(arguments) == 0
    space = hub.repositories["space", "tester/other-demo"]
    assert space.variables == {"DEVIL_CHECKPOINT": "tester/devil"}
    card = ModelCard(hub.files("tester/other-demo", kind="space")["README.md"].decode())
    assert card.data.to_dict()["models"] == ["tester/devil"] and card.data.to_dict()["sdk"] == "gradio"
    assert "Two models answer" not in card.text and 'Client("tester/other-demo")' in card.text
    # Files of an older package go; what the owner has added stays.
    HfApi().upload_file(path_or_fileobj=b"x = 1", path_in_repo="devil_hf/old.py", repo_id="tester/other-demo", repo_type="space")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="NOTES.md", repo_id="tester/other-demo", repo_type="space")
    assert main(arguments[:2]) == 0
    files = hub.files("tester/other-demo", kind="space")
    assert "devil_hf/old.py" not in files and "devil_hf/cli/main.py" in files and files["NOTES.md"] == b"mine"
    assert not space.variables  # back to those of the package


def test_checkpoint_and_space_are_published_together(hub, checkpoint, unchecked, capsys):
    assert main(["push", str(checkpoint), "tester/both", "--space", "tester/both-demo", "--license", "mit"]) == 0
    assert capsys.readouterr().out.split()[-1] == f"{hub.endpoint}/spaces/tester/both-demo"
    assert "model.safetensors" in hub.files("tester/both")
    assert hub.repositories["space", "tester/both-demo"].variables == {"DEVIL_CHECKPOINT": "tester/both"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["space", "demo"], "no USER/REPO"),
        (["space", "tester/x", "--checkpoint", "."], "Hub id"),
        (["push", "nowhere", "tester/x", "--space", "x"], "no USER/REPO"),
        (["space", "somebody/demo"], "not published completely"),
    ],
)
def test_a_space_that_cannot_be_published_is_refused(hub, arguments, message, capsys):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not any(name in ("tester/x", "somebody/demo") for _, name in hub.repositories)


def test_the_demo_loads_a_checkpoint_by_its_hub_id(hub, published, model, images, monkeypatch):
    checkpoints = Checkpoints()
    explorer = checkpoints.get("tester/devil")
    assert explorer.layers == model.layer_names
    texts = explorer.describe(explorer.look(images[0]))
    assert len(texts) == 1 + len(model.layer_names)
    # A visitor reads nothing that only the owner may read; the owner can name it.
    with pytest.raises(ValueError, match="tester/secret cannot be found"):
        checkpoints.get("tester/secret")
    assert Checkpoints(models="tester/secret").get("tester/secret").layers == model.layer_names
    with pytest.raises(ValueError, match="tester/nothing cannot be found"):
        checkpoints.get("tester/nothing")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        checkpoints.get("tester/unreachable")


def test_the_demo_loads_a_slim_checkpoint_from_local_files_and_without_a_token(hub, slim_model, processor, tmp_path, images):
    slim_model.save_pretrained(tmp_path, slim=True)
    processor.save_pretrained(tmp_path)
    hub.plant("tester/slim", {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()})
    before = len(hub.authorizations)
    explorer = Checkpoints().get("tester/slim")
    assert len(hub.authorizations) > before and not any(hub.authorizations[before:])
    expected = Explorer(slim_model.eval(), processor)
    found = [one.describe(one.look(images[0])) for one in (explorer, expected)]
    assert found[0] == found[1]
    # Sources that only the owner's account reads stay closed, even for a checkpoint that the owner has named.
    hub.repositories["model", "tester/lm"].private = True
    try:
        with pytest.raises(ValueError, match="tester/lm cannot be found"):
            Checkpoints(models="tester/slim").get("tester/slim")
    finally:
        hub.repositories["model", "tester/lm"].private = False
