"""Score what each layer says against people's captions, on one process or, under `accelerate launch`, on many.

    python scripts/evaluate.py CHECKPOINT FOLDER --split test --output-dir scores/flickr8k
    accelerate launch --num_processes 8 scripts/evaluate.py CHECKPOINT SOURCES.yaml --output-dir scores/cc3m

The same as `devil evaluate captions`.
"""

import argparse

from devil_hf.cli.evaluate import add_caption_options, run_evaluate_captions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_caption_options(parser)
    run_evaluate_captions(parser.parse_args())


if __name__ == "__main__":
    main()
