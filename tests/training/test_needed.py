"""What a recipe needs of the Hub is named before anything is loaded."""

import time

import pytest
from huggingface_hub import constants

from devil_hf.cli.main import main
from devil_hf.settings import make, read_yaml
from devil_hf.training.needed import check_sources, repositories
from devil_hf.training.recipe import Recipe
from tests.training.runs import ROOT

RECIPES = ROOT / "scripts/recipes"
COMMIT = "46f3d69f840e59d77d52e8decfe5baec97e94c7f"


def test_a_recipe_without_network_ends_at_once_and_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    began = time.process_time()
    assert main(["train", "--config", str(RECIPES / "cc3m_resnet50_opt125m.yaml"), "--report-to", "none"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    for part in (
        "timm/resnet50.a1_in1k (backbone)",
        "facebook/opt-125m (language_model)",
        f"pixparse/cc3m-wds at {COMMIT} (train_data, validation_data)",
        "HF_HUB_OFFLINE forbids",
        "hf download --repo-type dataset pixparse/cc3m-wds",
    ):
        assert part in told
    assert not list(tmp_path.iterdir()) and time.process_time() - began < 20


def test_an_unreachable_hub_is_asked_once(tmp_path, monkeypatch):
    asked = []

    def refusal(*repository):
        asked.append(repository)
        return "the Hub cannot be reached: no route"

    monkeypatch.setattr("devil_hf.training.needed.refusal", refusal)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match=r"opt-125m \(language_model\); pixparse/cc3m-wds .* the Hub cannot be reached: no route"):
        check_sources(make(Recipe, read_yaml(Recipe, RECIPES / "cc3m_clip_rn50_opt125m.yaml")))
    assert asked == [("timm/resnet50_clip.openai", "model", None)]


@pytest.mark.parametrize("name", ["flickr8k_small", "flickr8k_regions", "photos", "lora_finetune"])
def test_recipes_of_local_parts_name_what_they_would_fetch(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = make(Recipe, read_yaml(Recipe, RECIPES / f"{name}.yaml"))
    for part in (recipe.backbone, recipe.language_model, recipe.checkpoint):
        if part:
            (tmp_path / part).mkdir(parents=True)
    assert repositories(recipe) == []
