"""Publish a checkpoint on the Hub: `python scripts/push_to_hub.py CHECKPOINT USER/REPO`, the same as `devil push`."""

import sys

from devil_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
