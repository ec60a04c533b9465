"""Every download option of `from_pretrained` reaches the frozen parts of a slim checkpoint, which names repositories only."""

import json

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModel

from devil_hf.checkpoints.loading import load

REPOSITORIES = ("tester/options", "timm/test_resnet.r160_in1k", "tester/lm")


@pytest.fixture(scope="module")
def options(hub, slim_model, processor, tmp_path_factory):
    """The id of a slim checkpoint whose backbone is named by a name of timm's, and its language model by its id."""
    folder = tmp_path_factory.mktemp("options")
    slim_model.save_pretrained(folder, slim=True)
    processor.save_pretrained(folder)
    hub.plant("tester/options", {file.name: file.read_bytes() for file in folder.iterdir()})
    return "tester/options"


def fetched(hub, since):
    """How many files of weights were fetched since then, from the store behind the repositories."""
    return sum(path.startswith("/store/") for done, path in hub.requests[since:] if done == "GET")


def test_a_public_load_sends_no_token_to_anyone(hub, options, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    since = len(hub.requests)
    load(options, token=False)
    assert fetched(hub, since) == len(REPOSITORIES)
    sent = zip(hub.requests[since:], hub.authorizations[since:], strict=True)
    assert not [request for request, header in sent if header is not None]


def test_a_public_load_cannot_reach_what_the_owner_may_read(hub, options, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    files = hub.files(options)
    config = json.loads(files["config.json"])
    config["language_model_source"] |= {"source": "tester/of-the-owner", "revision": "main"}
    hub.plant("tester/of-the-owner", hub.files("tester/lm"), private=True)
    hub.plant("tester/hostile", files | {"config.json": json.dumps(config).encode()})
    load("tester/hostile")  # with the owner's token
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "public"))
    with pytest.raises(OSError, match="tester/of-the-owner"):
        load("tester/hostile", token=False)


def test_cache_dir_takes_everything(hub, options, slim_model, pixel_values, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default"))
    chosen = tmp_path / "chosen"
    model = AutoModel.from_pretrained(options, cache_dir=chosen)
    assert torch.equal(model.ask(pixel_values), slim_model.ask(pixel_values))
    assert not list((tmp_path / "default").rglob("*.safetensors"))
    for name in REPOSITORIES:
        assert list((chosen / f"models--{name.replace('/', '--')}").rglob("model.safetensors"))
    since = len(hub.requests)
    again = AutoModel.from_pretrained(options, cache_dir=chosen, local_files_only=True)
    assert len(hub.requests) == since
    assert torch.equal(again.ask(pixel_values), slim_model.ask(pixel_values))
    AutoModel.from_pretrained(options, cache_dir=chosen)
    assert not fetched(hub, since)
    AutoModel.from_pretrained(options, cache_dir=chosen, force_download=True)
    assert fetched(hub, since) == len(REPOSITORIES)
    with pytest.raises(OSError, match="backbone="):
        AutoModel.from_pretrained(options, cache_dir=only(chosen, options, tmp_path), local_files_only=True)


def only(cache, name, root):
    """A cache that holds one repository of another."""
    folder = f"models--{name.replace('/', '--')}"
    (root / "part").mkdir()
    (root / "part" / folder).symlink_to(cache / folder)
    return root / "part"


@pytest.mark.parametrize("part", ["backbone_config", "language_model_source"])
def test_a_checkpoint_of_the_hub_names_no_folder_of_this_machine(part, hub, options, sources):
    files = hub.files(options)
    config = json.loads(files["config.json"])
    config[part]["source"] = sources["backbone" if part == "backbone_config" else "language_model"]
    hub.plant("tester/nosy", files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match=r"tester/nosy names .* of this machine"):
        AutoModel.from_pretrained("tester/nosy")
