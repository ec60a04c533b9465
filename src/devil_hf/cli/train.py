"""`devil train`: a translator between a backbone and a language model; its settings are a recipe."""

from devil_hf.cli.verb import VERBS, Verb


def settings() -> type:
    """The recipe, whose file reads half of the ecosystem."""
    from devil_hf.training.recipe import Recipe

    return Recipe


def train(recipe) -> None:
    """Train, and say where the checkpoint is."""
    from devil_hf.training.run import train as run

    print(f"checkpoint: {run(recipe)}")


VERBS.register(
    "train",
    Verb(
        "train",
        "train a translator between your backbone and language model",
        "devil train --config scripts/recipes/flickr8k_small.yaml --output-dir runs/flickr8k",
        settings,
        train,
        long=True,
    ),
)
