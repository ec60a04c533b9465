"""The Hub of these tests, on this machine, and what is published on it once."""

import copy
import json
import shutil
import time
from contextlib import contextmanager
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file

import devil_hf.hub.publish
from devil_hf import DevilModel
from devil_hf.hub.publish import prepare, upload
from devil_hf.model.checkpoint_devil import weights_hash
from tests.conftest import SMALL_TRANSLATOR
from tests.loopback_hub import LoopbackHub

SCORES = {
    "title": "Captions of features",
    "dataset": {"name": "Flickr8k", "id": "jxie/flickr8k", "split": "test", "size": 132},
    "scores": {"all": {"bleu_4": 0.125, "cider": 0.273}, "conv1": {"bleu_4": 0.072, "cider": 0.12}},
    "controls": {"shuffled": {"bleu_4": 0.063, "cider": 0.094}},
}


@pytest.fixture(scope="package")
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
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setenv("HF_TOKEN", "hf_tester")
        hurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})  # between two tries
        patch.setattr(_http, "time", hurried)
        patch.setattr(file_download, "time", hurried)
        yield hub


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def draft(checkpoint, images, tmp_path_factory):
    root = tmp_path_factory.mktemp("draft")
    (root / "captions.json").write_text(json.dumps(SCORES))
    options = {"images": images[:1], "phrases": ["a dog", "red"], "scores": [root / "captions.json"]}
    with without_check_of_code():
        return prepare(checkpoint, "tester/devil", root / "repository", license="apache-2.0", **options)


@pytest.fixture(scope="package")
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
    config = json.loads((changed.folder / "config.json").read_text()) | {"weights_sha256": {"": weights_hash(other)}}
    (changed.folder / "config.json").write_text(json.dumps(config))
    upload(changed, "tester/devil", commit_message="Other weights")
    upload(draft, "tester/devil", revision="experiment")
    upload(draft, "tester/secret", private=True)
    return first


@pytest.fixture(scope="package")
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


@contextmanager
def without_check_of_code():
    """Without the fresh process that imports the code: another test waits for it, and another process loads what is published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devil_hf.hub.publish, "check_code", lambda folder: None)
        yield


@pytest.fixture
def unchecked():
    with without_check_of_code():
        yield
