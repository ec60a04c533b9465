"""Score descriptions on captions, on one process or, under `accelerate launch`, on many.

    python scripts/evaluate.py CHECKPOINT FOLDER --split test --output-dir scores/flickr8k
    accelerate launch --num_processes 8 scripts/evaluate.py CHECKPOINT SOURCES.yaml --output-dir scores/cc3m

The same as `devil evaluate captions`.
"""

import sys

from devil_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", "captions", *sys.argv[1:]]))
