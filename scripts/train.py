"""Train a translator: `accelerate launch scripts/train.py --config scripts/recipes/flickr8k_small.yaml --backbone DIR ...`."""

from devil_hf.training.recipe import parse_recipe
from devil_hf.training.recipe import train

if __name__ == "__main__":
    print(f"checkpoint: {train(parse_recipe(description=__doc__))}")
