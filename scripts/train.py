"""Train a translator, on one process or many.

    accelerate launch scripts/train.py --config scripts/recipes/flickr8k_small.yaml --output_dir runs/mine
    accelerate launch --multi_gpu --num_processes 8 scripts/train.py --config scripts/recipes/cc3m_resnet50_opt125m.yaml

Started again with --resume, a run that was stopped goes on as if it had not been.
"""

import argparse
import sys

from devil_hf.settings import parse
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train

if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    print(f"checkpoint: {train(parse(Recipe, sys.argv[1:], description=__doc__, formatter_class=raw))}")
