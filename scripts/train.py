"""Train a translator, on one process or many, the same as `devil train`.

    accelerate launch scripts/train.py --config scripts/recipes/flickr8k_small.yaml --output_dir runs/mine
    accelerate launch --multi_gpu --num_processes 8 scripts/train.py --config scripts/recipes/cc3m_resnet50_opt125m.yaml

Started again with --resume, a run that was stopped goes on as if it had not been.
"""

import sys

from devil_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
