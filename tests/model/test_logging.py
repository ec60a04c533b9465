"""The loggers of the package, and of the code that travels, answer to the verbosity of transformers."""

import os
import subprocess
import sys

SCRIPT = """
import sys
travelling = sys.argv[2] == "travelling"
if travelling:
    sys.modules["devil_hf"] = None  # importing it now fails
from transformers import AutoProcessor
from transformers.utils import logging
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=travelling)
name = type(processor).__module__
assert name.startswith("transformers_modules." if travelling else "devil_hf."), name
logger = sys.modules[name].logger
for set_verbosity in (logging.set_verbosity_error, logging.set_verbosity_warning, logging.set_verbosity_info):
    set_verbosity()
    level = set_verbosity.__name__.rpartition("_")[2]
    logger.warning(f"a warning at {level}")
    logger.info(f"news at {level}")
"""


def test_verbosity_reaches_the_package_and_the_code_that_travels(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    for kind in ("package", "travelling"):
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        preamble = "" if kind == "travelling" else "import devil_hf\n"
        command = [sys.executable, "-c", preamble + SCRIPT, str(tmp_path / "checkpoint"), kind]
        run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        said = [line.rpartition("] ")[2] for line in run.stderr.splitlines() if " at " in line]
        assert said == ["a warning at warning", "a warning at info", "news at info"], run.stderr[-3000:]
