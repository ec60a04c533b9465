"""Fill the cards in hub_cards/: the paper's recipes, the embedded checkpoint and the shapes world.

    python scripts/build_cards.py

A card of a recipe (`scripts/recipes/cc3m_*.yaml`) says what is known without training, and that the rest is not measured;
nothing is downloaded. Scores of the embedded checkpoint are those in its scores.json, which `devil quickstart` wrote, and in its
evaluations/, where the result of `devil evaluate controls` lies.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import timm
import torch
import yaml
from huggingface_hub import DatasetCardData
from transformers import OPTConfig

from devil_hf.build import backbone_from_source
from devil_hf.checkpoints import locate
from devil_hf.cli.main import bounded
from devil_hf.data import rendering, shapes, world_dataset, worlds
from devil_hf.hub.cards import dataset_card, model_card
from devil_hf.hub.facts import Facts, Layer, readable_recipe
from devil_hf.hub.publish import prepare
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.model.translator_devil import Translator
from devil_hf.report.templates import card_folder

OWNER = "USER"
LANGUAGE_MODELS = {"facebook/opt-125m": OPTConfig()}  # the defaults of OPTConfig are this model's
COLUMNS = {
    "image": "the scene",
    "caption": "the first of the captions",
    "captions": "captions of the scene",
    "objects": "per object: colour, texture, shape, size, centre (x, y) and box (left, top, right, bottom) in pixels",
    "masks": "per object, its visible pixels",
    "relations": "subject and object by number, and the words between them",
    "background": "kind of background",
}


def recipe_card(path: Path) -> str:
    """The card of a recipe that nobody has trained yet."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = recipe["backbone"].removeprefix("timm/")
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=0)
    backbone = backbone_from_source(module, recipe["layers"], class_tokens=recipe.get("class_tokens", False))
    size = backbone.config["input_size"]
    maps = backbone(torch.empty(1, *size, device="meta"))
    text_config = LANGUAGE_MODELS[recipe["language_model"]]
    config = DevilConfig(
        backbone_config=backbone.config | {"source": name},
        text_config=text_config,
        language_model_source={"source": recipe["language_model"]},
        **recipe["model"],
    )
    with torch.device("meta"):
        translator = Translator(backbone.channels, text_config.hidden_size, config)
    facts = Facts(
        repo_id=f"{OWNER}/devil-{path.stem.replace('_', '-')}",
        config=config,
        layers=[Layer(n, *m.shape[1:], size) for n, m in zip(backbone.layers, maps, strict=True)],
        trained_parameters=sum(parameter.numel() for parameter in translator.parameters()),
        recipe=readable_recipe(path.read_text(encoding="utf-8")),
        data="Conceptual Captions 3M (CC3M)",
        published=False,
    )
    return str(model_card(facts))


def embedded_card() -> str:
    """The card of the checkpoint that ships with the package."""
    with tempfile.TemporaryDirectory() as folder:
        return str(prepare(locate("shapes"), f"{OWNER}/devil-shapes-world", folder).card)


def photos_card() -> str:
    """The card of the photographs' checkpoint."""
    data = "Flickr8k with phrases and boxes (Flickr30k Entities), 6,010 images; COCO, 617 images; 217,341 captions as text"
    with tempfile.TemporaryDirectory() as folder:
        return str(prepare(locate("photos"), f"{OWNER}/devil-photos", folder, data=data).card)


def shapes_card() -> str:
    """The card of the shapes world."""
    data = DatasetCardData(
        language="en", license="apache-2.0", task_categories=["image-to-text"], pretty_name="Shapes world", tags=["synthetic"]
    )
    card = dataset_card(
        data,
        title="Shapes world",
        training_seed=worlds.TRAINING_WORLD,
        held_out_seed=worlds.HELD_OUT_WORLD,
        columns={name: COLUMNS[name] for name in world_dataset.SCENE_FEATURES},
        size=rendering.SCENE_SIZE,
        count_shares=shapes.COUNT_SHARES,
        attributes=shapes.ATTRIBUTE_WORDS,
        sizes=list(shapes.SIZES),
        backgrounds=rendering.BACKGROUNDS,
        relations=shapes.RELATIONS,
        fragment_share=shapes.FRAGMENT_SHARE,
        vocabulary=len(shapes.VOCABULARY),
    )
    return str(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=card_folder(), help="default: hub_cards")
    parser.add_argument("--recipes", type=Path, default=Path(__file__).parent / "recipes", help="folder of the recipes")
    arguments = parser.parse_args()
    cards = {f"{path.stem}.md": recipe_card(path) for path in sorted(arguments.recipes.glob("cc3m_*.yaml"))}
    cards |= {"shapes_world.md": shapes_card(), "embedded.md": embedded_card(), "photos.md": photos_card()}
    for name, text in cards.items():
        (arguments.output_dir / name).write_text(text, encoding="utf-8")
        print(arguments.output_dir / name)


if __name__ == "__main__":
    sys.exit(bounded("build_cards.py", main))
