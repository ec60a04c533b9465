"""Publishing and loading through the genuine huggingface_hub client, over HTTP, against a Hub on this machine."""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, constants, file_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import devil_hf.hub.publish
from devil_hf import DevilModel
from devil_hf.cli.main import main
from devil_hf.demo.checkpoints import Checkpoints
from devil_hf.evaluation.results import fingerprint
from devil_hf.hub.checks import check_code, check_weights
from devil_hf.hub.publish import prepare, push, upload
from devil_hf.settings import make
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import build
from tests.conftest import SMALL_TRANSLATOR
from tests.loopback_hub import LoopbackHub

SCORES = {
    "title": "Captions of features",
    "dataset": {"name": "Flickr8k", "id": "jxie/flickr8k", "split": "test", "size": 132},
    "scores": {"all": {"bleu_4": 0.125, "cider": 0.273}, "conv1": {"bleu_4": 0.072, "cider": 0.12}},
    "controls": {"shuffled": {"bleu_4": 0.063, "cider": 0.094}},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The Hub, and this process turned towards it: huggingface_hub reads the environment only when it is imported."""
    home = tmp_path_factory.mktemp("home")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, hub.endpoint))
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home))
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setenv("HF_TOKEN", "hf_tester")
        hurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})  # between two tries
        patch.setattr(_http, "time", hurried)
        patch.setattr(file_download, "time", hurried)
        yield hub


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    """A checkpoint as training leaves it: with a recipe, and with files that are nobody else's business."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(f"backbone: {folder}/somewhere/backbone\nmax_steps: 7\n")
    torch.save({"secret": 1}, folder / "training_args.bin")
    (folder / "trainer_state.json").write_text("{}")
    (folder / ".notes.json").write_text("{}")
    scores = SCORES | {"title": "Captions in training", "settings": {"data": f"{folder}/somewhere/flickr8k"}}
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture(scope="module")
def draft(checkpoint, images, tmp_path_factory):
    root = tmp_path_factory.mktemp("draft")
    (root / "captions.json").write_text(json.dumps(SCORES))
    options = {"images": images[:1], "phrases": ["a dog", "red"], "scores": [root / "captions.json"]}
    return prepare(checkpoint, "tester/devil", root / "repository", license="apache-2.0", **options)


@pytest.fixture(scope="module")
def published(hub, draft):
    """The commit of a pushed checkpoint; on the branch `other` lie the same with other weights."""
    upload(draft, "tester/devil")
    first = hub.repositories["model", "tester/devil"].refs["main"]
    weights = load_file(draft.folder / "model.safetensors")
    changed = copy.copy(draft)
    changed.folder = draft.folder.parent / "changed"
    shutil.copytree(draft.folder, changed.folder)
    other = {name: -t if name == "translator.output.weight" else t for name, t in weights.items()}
    save_file(other, changed.folder / "model.safetensors", metadata={"format": "pt"})
    upload(changed, "tester/devil", commit_message="Other weights")
    upload(draft, "tester/devil", revision="experiment")
    upload(draft, "tester/secret", private=True)
    return first


@pytest.fixture(scope="module")
def slim_model(hub, sources, tokenizer):
    """A model whose frozen parts came from the Hub: the backbone by its timm name, the language model by its id."""
    for token, name, part in (("hf_timm", "timm/test_resnet.r160_in1k", "backbone"), ("hf_tester", "tester/lm", None)):
        api = HfApi(token=token)
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=sources[part or "language_model"])
    torch.manual_seed(4)
    return DevilModel.from_backbone_and_language_model(
        "test_resnet.r160_in1k", "tester/lm", tokenizer=tokenizer, **SMALL_TRANSLATOR
    )


@pytest.fixture
def unchecked(monkeypatch):
    """Without the fresh process that imports the code, which other tests wait for."""
    monkeypatch.setattr(devil_hf.hub.publish, "check_code", lambda folder: None)


def test_the_pushed_repository_is_what_was_prepared(hub, draft, published):
    files = hub.files("tester/devil", published)
    assert files.keys() - {".gitattributes"} == draft.tree().keys()
    assert all(files[path] == (draft.folder / path).read_bytes() for path in draft.tree())
    tree = hub.repositories["model", "tester/devil"].commits[published]
    assert tree["model.safetensors"].lfs and tree["model.safetensors"].sha256 in hub.uploaded
    assert not tree["modeling_devil.py"].lfs
    expected = {
        "README.md",
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "pipeline_devil.py",
        "recipe.yaml",
    }
    expected |= {"pictures/example_1.png", "pictures/layers.jpg", "pictures/maps_1.jpg", "evaluations/captions.json"}
    assert expected <= files.keys()
    assert "scores.json" in files
    assert not {path for path in files if "train" in path or path.startswith(".n")}


def test_nothing_of_this_machine_is_published(hub, draft, checkpoint, sources, published):
    for path, data in hub.files("tester/devil", published).items():
        if not path.endswith((".png", ".jpg", ".safetensors")):
            for place in (str(checkpoint.parent), os.path.dirname(sources["backbone"]), os.path.expanduser("~/")):
                assert place not in data.decode(), path
    config = json.loads((draft.folder / "config.json").read_text())
    assert config["backbone_config"]["source"] is None and config["backbone_config"]["sha256"]
    assert "max_steps: 7" in str(draft.card) and "backbone: backbone" in str(draft.card)


def test_the_weights_of_a_checkpoint_are_published_byte_for_byte(hub, checkpoint, published):
    files = hub.files("tester/devil", published)
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()


FRESH_PROCESS = """
    import io, json, re, sys
    from contextlib import redirect_stdout
    sys.modules["devil_hf"] = None  # importing it now fails
    import torch
    from huggingface_hub import hf_hub_download, snapshot_download
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
    commit, image = sys.argv[1], Image.open(sys.argv[2])
    torch.set_num_threads(1)
    trusted = {"trust_remote_code": True}
    found = {}

    def said(repo, **kwargs):
        model = AutoModel.from_pretrained(repo, **trusted, **kwargs)
        inputs = AutoProcessor.from_pretrained(repo, **trusted, **kwargs)(images=image, return_tensors="pt")
        return model.generate(**inputs, max_new_tokens=6).tolist()

    found["main"] = said("tester/devil")
    found["pinned"] = said("tester/devil", revision=commit)
    found["branch"] = said("tester/devil", revision="experiment")
    found["secret"] = said("tester/secret")
    found["slim"] = said("tester/slim")
    model = AutoModelForImageTextToText.from_pretrained("tester/devil", **trusted)
    config = AutoConfig.from_pretrained("tester/devil", **trusted)
    found["same_class"] = type(config).__name__ == type(model.config).__name__ == "DevilConfig"
    found["layers"] = config.layers
    describe = pipeline("vision-feature-description", model="tester/devil", **trusted)
    found["piped"] = [row["layer"] for row in describe(image)["descriptions"]]
    try:
        AutoModel.from_pretrained("tester/secret", token=False, cache_dir="empty", **trusted)
    except OSError as error:
        found["without_token"] = str(error)
    try:
        AutoModel.from_pretrained("tester/nothing", **trusted)
    except OSError as error:
        found["missing"] = str(error)
    folder = snapshot_download("tester/devil", revision=commit)
    snippet = re.search("```python\\n(.*?)```", open(folder + "/README.md").read(), re.DOTALL)[1]
    with redirect_stdout(io.StringIO()) as out:
        exec(snippet, {})
    found["snippet"] = out.getvalue()
    found["map"] = Image.open("map.png").size
    json.dump(found, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def slim_repository(hub, slim_model, processor):
    """The files of a slim checkpoint that was pushed from memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devil_hf.hub.publish, "check_code", lambda folder: None)
        push(slim_model, "tester/slim", processor=processor, slim=True)
    return hub.files("tester/slim")


@pytest.fixture(scope="module")
def elsewhere(hub, published, slim_repository, images, tmp_path_factory):
    """What a process without devil_hf found on the Hub."""
    place = tmp_path_factory.mktemp("elsewhere")
    images[0].save(place / "image.png")
    command = [sys.executable, "-c", textwrap.dedent(FRESH_PROCESS), published, "image.png", "found.json"]
    environment = os.environ | hub.environment(place / "home")
    run = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((place / "found.json").read_text())


def test_a_process_without_the_package_loads_it_from_the_hub(elsewhere, model, processor, images):
    inputs = processor(images=images[0], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6).tolist()
    assert elsewhere["pinned"] == elsewhere["branch"] == elsewhere["secret"] == expected
    assert elsewhere["main"] != expected  # the later commit has other weights
    assert elsewhere["layers"] == model.layer_names and elsewhere["same_class"]
    assert elsewhere["piped"] == ["all", *model.layer_names]


def test_a_slim_checkpoint_fetches_its_frozen_parts_from_the_hub(elsewhere, slim_model, processor, images):
    inputs = processor(images=images[0], return_tensors="pt")
    assert elsewhere["slim"] == slim_model.generate(**inputs, max_new_tokens=6).tolist()


def test_a_slim_checkpoint_names_the_commits_of_its_frozen_parts(hub, slim_repository, slim_model):
    config = json.loads(slim_repository["config.json"])
    assert config["backbone_config"]["revision"] == hub.repositories["model", "timm/test_resnet.r160_in1k"].refs["main"]
    assert config["language_model_source"]["revision"] == hub.repositories["model", "tester/lm"].refs["main"]
    assert len(slim_repository["model.safetensors"]) < 0.5 * sum(p.numel() * 4 for p in slim_model.parameters())
    card = ModelCard(slim_repository["README.md"].decode())
    assert card.data.base_model == ["timm/test_resnet.r160_in1k", "tester/lm"]
    assert card.data.base_model_relation == "adapter"


def test_a_private_repository_needs_a_token(elsewhere):
    assert "tester/secret" in elsewhere["without_token"]
    assert "tester/nothing" in elsewhere["missing"]


def test_the_snippet_of_the_card_works_when_pasted(elsewhere, model, images):
    lines = elsewhere["snippet"].strip().splitlines()
    assert sum("nats from the features" in line for line in lines) == 1 + len(model.layer_names)
    assert tuple(elsewhere["map"]) == images[0].size


def test_a_hub_without_lfs_takes_everything_as_ordinary_files(hub, draft, monkeypatch):
    monkeypatch.setattr(hub, "lfs", False)
    upload(draft, "tester/regular")
    tree = hub.repositories["model", "tester/regular"].commits[hub.repositories["model", "tester/regular"].refs["main"]]
    assert not any(entry.lfs for entry in tree.values())
    assert tree["model.safetensors"].data == (draft.folder / "model.safetensors").read_bytes()


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_interrupted_upload_goes_on_where_it_stopped(hub, draft, tmp_path):
    fresh = copy.copy(draft)
    fresh.folder = shutil.copytree(draft.folder, tmp_path / "fresh")
    weights = load_file(fresh.folder / "model.safetensors")
    save_file({name: t * 0.5 for name, t in weights.items()}, fresh.folder / "model.safetensors", {"format": "pt"})
    (fresh.folder / "pictures" / "example_1.png").write_bytes(b"another picture")
    sent = len(hub.uploaded)
    lost = sha256_of(fresh.folder / "model.safetensors")
    hub.cut_uploads.add(lost)
    with pytest.raises(OSError, match=r"tester/interrupted.*run the same command again"):
        upload(fresh, "tester/interrupted")
    assert hub.files("tester/interrupted").keys() == {".gitattributes"}  # no half of a checkpoint
    assert hub.uploaded[sent:] == [sha256_of(fresh.folder / "pictures" / "example_1.png")]
    hub.cut_uploads.clear()
    upload(fresh, "tester/interrupted")
    assert hub.uploaded[sent + 1 :] == [lost]  # the picture is not sent again
    assert hub.files("tester/interrupted").keys() - {".gitattributes"} == fresh.tree().keys()


def test_a_download_that_is_cut_leaves_no_broken_file(hub, published, model, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.cut_downloads, "model.safetensors", 1_000)
    with pytest.raises(OSError, match=r"tester/devil was cut off by the network .*load it again"):
        AutoModel.from_pretrained("tester/devil", revision=published, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))
    assert hub.cut_downloads["model.safetensors"] < 1_000
    hub.cut_downloads["model.safetensors"] = 0
    loaded = AutoModel.from_pretrained("tester/devil", revision=published, cache_dir=tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("part", ["backbone", "language_model"])
def test_a_source_that_is_cut_is_named(part, hub, slim_model, slim_repository, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(hub.cut_downloads, "model.safetensors", 1_000)
    if part == "language_model":
        module = timm.create_model("test_resnet.r160_in1k", num_classes=0)
        module.load_state_dict(slim_model.backbone.module.state_dict())
    else:
        module = None
    with pytest.raises(OSError, match="tester/slim was cut off by the network") as raised:
        DevilModel.from_pretrained("tester/slim", backbone=module)
    assert f"{part}=" in str(raised.value.__cause__)


def test_a_new_push_takes_what_is_outdated_away(hub, draft, tmp_path):
    api = HfApi()
    api.create_repo("tester/again")
    for path in ("model-00001-of-00002.safetensors", "old_devil.py", "pictures/maps_9.jpg", "recipe.yaml", "notes.md"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=path, repo_id="tester/again")
    fresh = copy.copy(draft)
    fresh.folder = shutil.copytree(draft.folder, tmp_path / "fresh")
    (fresh.folder / "recipe.yaml").unlink()
    upload(fresh, "tester/again")
    assert hub.files("tester/again").keys() - fresh.tree().keys() == {".gitattributes", "notes.md"}


def test_pushing_without_a_login_stops_before_any_work(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(devil_hf.hub.publish, "prepare", None)
    with pytest.raises(OSError, match="hf auth login"):
        push(checkpoint, "tester/nobody", token="hf_wrong")
    with pytest.raises(ValueError, match="USER/REPO"):
        push(checkpoint, "nobody")
    assert ("model", "tester/nobody") not in hub.repositories


def test_pushing_into_the_repository_of_others_is_refused(hub, draft):
    with pytest.raises(OSError, match="timm/devil") as raised:
        upload(draft, "timm/devil")
    assert isinstance(raised.value.__cause__, HfHubHTTPError)


# ------------------------------------------------------------------------------------------------------------- refusals


def broken_copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "broken")


def test_weights_must_be_there_complete_and_finite(checkpoint, tmp_path):
    folder = broken_copy(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["translator.queries"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"translator\.queries holds 1 NaN"):
        prepare(folder, "tester/broken", tmp_path / "out")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="incomplete"):
        check_weights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        prepare(folder, "tester/broken", tmp_path / "out")


def test_code_that_needs_the_package_is_refused(checkpoint, tmp_path):
    folder = broken_copy(checkpoint, tmp_path)
    file = folder / "outputs_devil.py"
    file.write_text("import devil_hf.checkpoints.loading\n" + file.read_text())
    with pytest.raises(ValueError, match=r"^outputs_devil\.py .* alone.*devil_hf"):
        check_code(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no code"):
        check_code(folder)


def test_a_slim_checkpoint_of_local_parts_is_refused(checkpoint, sources, tmp_path):
    with pytest.raises(ValueError, match=r"backbone comes from .*self-contained"):
        prepare(checkpoint, "tester/slim", tmp_path, slim=True)


def test_a_folder_with_other_files_is_refused(checkpoint, tmp_path):
    (tmp_path / "diary.txt").write_text("private")
    with pytest.raises(ValueError, match="not empty"):
        prepare(checkpoint, "tester/devil", tmp_path)


def test_a_model_without_a_processor_is_refused(model, tmp_path):
    nameless = copy.copy(model)
    nameless.name_or_path = ""
    with pytest.raises(ValueError, match="processor="):
        prepare(nameless, "tester/devil", tmp_path)


def test_scores_of_other_weights_are_not_published(model, processor, checkpoint, unchecked, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(SCORES | {"weights": fingerprint(model)}))
    (tmp_path / "other.json").write_text(json.dumps([SCORES, SCORES | {"weights": "0" * 64}]))
    half = copy.deepcopy(model).half()
    assert fingerprint(half.float()) != fingerprint(model)  # rounding is a change
    prepare(checkpoint, "tester/devil", tmp_path / "own", scores=[tmp_path / "own.json"])
    full = tmp_path / "half"
    half.half().save_pretrained(full)
    processor.save_pretrained(full)
    (tmp_path / "half.json").write_text(json.dumps(SCORES | {"weights": fingerprint(half)}))
    prepare(full, "tester/devil", tmp_path / "published", scores=[tmp_path / "half.json"])
    with pytest.raises(ValueError, match=f"other weights .00000000. than these .{fingerprint(model):.8}"):
        prepare(checkpoint, "tester/devil", tmp_path / "refused", scores=[tmp_path / "other.json"])
    # A verdict says nothing of the same translator before another language model.
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.language_model.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match="other weights"):
        prepare(other, "tester/devil", tmp_path / "tuned", processor=processor, scores=[tmp_path / "own.json"])


def test_scores_of_a_slim_checkpoint_in_half_precision_are_published(slim_model, processor, unchecked, tmp_path):
    folder = tmp_path / "slim"
    copy.deepcopy(slim_model).half().save_pretrained(folder, slim=True)
    processor.save_pretrained(folder)
    measured = DevilModel.from_pretrained(folder, dtype=torch.float32)  # as evaluations load it
    (tmp_path / "scores.json").write_text(json.dumps(SCORES | {"weights": fingerprint(measured)}))
    draft = prepare(folder, "tester/devil", tmp_path / "draft", scores=[tmp_path / "scores.json"])
    assert "Captions" in str(draft.card)


# --------------------------------------------------------------------------------------------------------- command line


def test_a_dry_run_shows_files_and_card_and_sends_nothing(hub, checkpoint, unchecked, capsys, tmp_path):
    asked = len(hub.requests)
    (tmp_path / "captions.json").write_text(json.dumps(SCORES))
    scores = ["--scores", str(tmp_path / "captions.json")]
    assert main(["push", str(checkpoint), "tester/dry", "--dry-run", *scores]) == 0
    output, notes = capsys.readouterr()
    assert re.search(r"^ +[\d,]+  model\.safetensors$", output, re.MULTILINE) and "# dry" in output
    assert "--license" in notes and "--scores" not in notes
    folder = tmp_path / "kept"
    assert main(["push", str(checkpoint), "tester/dry", "--dry-run", "--json", "--output-dir", str(folder)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["card"] == (folder / "README.md").read_text()
    assert answer["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert len(hub.requests) == asked


def test_the_command_publishes(hub, checkpoint, unchecked, capsys):
    arguments = ["--private", "--revision", "first", "--commit-message", "Hello", "--license", "mit", "--json"]
    assert main(["push", str(checkpoint), "tester/command", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    repository = hub.repositories["model", "tester/command"]
    commit = repository.refs["first"]
    assert answer["commit"].endswith(commit) and repository.messages[commit] == "Hello" and repository.private
    assert 'revision="first"' in hub.files("tester/command", "first")["README.md"].decode()
    assert hub.files("tester/command").keys() == {".gitattributes"}


RUN_SPACE = """
import sys
from pathlib import Path
import devil_hf.demo.app as app
assert Path(app.__file__).is_relative_to(Path.cwd()), app.__file__
from devil_hf.demo.checkpoints import Checkpoints
checkpoints = Checkpoints()
demo = app.build_demo(checkpoints)
print(checkpoints.default, checkpoints.public)
if sys.argv[1:] == ["answer"]:
    explorer = checkpoints.get(checkpoints.default)
    print(explorer.model.layer_names)
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
    assert "devil-hf" not in needed and any(line.startswith("timm>=") for line in needed)
    assert not any(path.suffix == ".pyc" or path.name == ".git" for path in tmp_path.rglob("*"))
    environment = os.environ | {"SPACE_ID": "tester/demo", "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", RUN_SPACE, "answer"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[0] == "shapes world (built in) True"
    assert "layer1" in run.stdout


def test_a_space_of_a_checkpoint_names_it(hub, published, capsys):
    arguments = ["space", "tester/other-demo", "--checkpoint", "tester/devil", "--json"]
    assert main(arguments) == 0
    space = hub.repositories["space", "tester/other-demo"]
    assert space.variables == {"DEVIL_CHECKPOINT": "tester/devil"}
    card = ModelCard(hub.files("tester/other-demo", kind="space")["README.md"].decode())
    assert card.data.to_dict()["models"] == ["tester/devil"] and card.data.to_dict()["sdk"] == "gradio"
    assert "shapes world only" not in card.text and 'Client("tester/other-demo")' in card.text
    # Files of an older package go; what the owner has added stays.
    HfApi().upload_file(
        path_or_fileobj=b"x = 1", path_in_repo="devil_hf/old.py", repo_id="tester/other-demo", repo_type="space"
    )
    HfApi().upload_file(
        path_or_fileobj=b"mine", path_in_repo="NOTES.md", repo_id="tester/other-demo", repo_type="space"
    )
    assert main(arguments[:2]) == 0
    files = hub.files("tester/other-demo", kind="space")
    assert "devil_hf/old.py" not in files and "devil_hf/cli/main.py" in files and files["NOTES.md"] == b"mine"
    assert not space.variables  # back to the embedded one


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
    checkpoints = Checkpoints(public=True)
    explorer = checkpoints.get("tester/devil")
    assert explorer.layers == model.layer_names
    texts = explorer.describe(explorer.look(images[0]))
    assert len(texts) == 1 + len(model.layer_names)
    with pytest.raises(ValueError, match="runs no code of repositories"):
        checkpoints.get("tester/devil", trust=True)
    # A visitor reads nothing that only the owner may read; the owner can name it.
    with pytest.raises(ValueError, match="tester/secret cannot be found"):
        checkpoints.get("tester/secret")
    assert Checkpoints(models="tester/secret", public=True).get("tester/secret").layers == model.layer_names
    with pytest.raises(ValueError, match="tester/nothing cannot be found"):
        checkpoints.get("tester/nothing")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        checkpoints.get("tester/unreachable")


def test_a_recipe_pins_the_revisions_of_its_parts(hub, sources, tmp_path):
    api, commits = HfApi(token="hf_tester"), {}
    for part in ("backbone", "language_model"):
        name, changed = f"tester/pinned-{part}", tmp_path / part
        api.create_repo(name)
        commits[part] = api.upload_folder(repo_id=name, folder_path=sources[part]).oid
        shutil.copytree(sources[part], changed)
        weights = load_file(changed / "model.safetensors")
        save_file({k: v + 1 for k, v in weights.items()}, changed / "model.safetensors", metadata={"format": "pt"})
        if part == "language_model":
            (changed / "tokenizer_config.json").write_text(
                (changed / "tokenizer_config.json").read_text().replace("<eos>", "<pad>")
            )
        api.upload_folder(repo_id=name, folder_path=changed)
    fields = {"backbone": "tester/pinned-backbone", "language_model": "tester/pinned-language_model"}
    fields |= {"train_data": [{"kind": "shapes", "size": 1}], "model": SMALL_TRANSLATOR}
    here, _ = build(make(Recipe, fields | sources))
    pins = {f"{part}_revision": commit for part, commit in commits.items()}
    pinned, processor = build(make(Recipe, fields | pins))
    newest, newer = build(make(Recipe, fields))
    sources_of = [model.config.language_model_source for model in (here, pinned, newest)]
    assert sources_of[0]["sha256"] == sources_of[1]["sha256"] != sources_of[2]["sha256"]
    assert sources_of[1]["revision"] == commits["language_model"]
    hashes = [model.config.backbone_config["sha256"] for model in (here, pinned, newest)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert pinned.config.backbone_config["revision"] == commits["backbone"]
    eos = {"language_model_revision": "main", "tokenizer_revision": commits["language_model"]}
    assert (processor.tokenizer.eos_token, newer.tokenizer.eos_token) == ("<eos>", "<pad>")
    assert build(make(Recipe, fields | eos))[1].tokenizer.eos_token == "<eos>"
