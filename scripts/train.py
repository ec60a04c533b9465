"""Train a translator, on one process or many.

    accelerate launch scripts/train.py --config scripts/recipes/flickr8k_small.yaml --output_dir runs/mine
    accelerate launch --multi_gpu --num_processes 8 scripts/train.py --config scripts/recipes/cc3m_resnet50_opt125m.yaml

Started again with --resume, a run that was stopped goes on as if it had not been.
"""

from devil_hf.training.recipe import parse_recipe
from devil_hf.training.run import train

if __name__ == "__main__":
    print(f"checkpoint: {train(parse_recipe(description=__doc__))}")
