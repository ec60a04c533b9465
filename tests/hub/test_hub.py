"""Publishing and loading through the genuine huggingface_hub client, over HTTP, against a Hub on this machine."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from devil_hf import DevilModel
from devil_hf.hub.publish import push, upload
from devil_hf.settings import make
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import build
from tests.conftest import SMALL_TRANSLATOR
from tests.hub.conftest import without_check_of_code


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
    with without_check_of_code():
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


def test_what_transformers_itself_pushes_is_complete(hub, slim_model, tmp_path):
    slim_model.save_pretrained(tmp_path / "slim", slim=True, push_to_hub=True, repo_id="tester/saved")
    files = hub.files("tester/saved")
    assert {"modeling_devil.py", "slim_devil.py", "companions_devil.py", "model.safetensors"} <= files.keys()
    config = json.loads(files["config.json"])
    assert config["frozen_weights"] == "reference" and config["auto_map"]["AutoModel"] == "companions_devil.DevilModel"


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
    hf_hub_download("tester/slim", "model.safetensors")
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


def test_pushing_into_the_repository_of_others_is_refused(hub, draft):
    with pytest.raises(OSError, match="timm/devil") as raised:
        upload(draft, "timm/devil")
    assert isinstance(raised.value.__cause__, HfHubHTTPError)


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
