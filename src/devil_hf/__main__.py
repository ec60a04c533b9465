"""`python -m devil_hf` is `devil`."""

import sys

from devil_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
