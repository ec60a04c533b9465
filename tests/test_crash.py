"""A short campaign of kills (`scripts/crash.py` runs the long one): what was killed goes on to the same result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_killed_work_goes_on_to_the_same_result(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "crash.py"), "--kills", "2", "--subjects", "exemplars", "captions"]
    command += ["--scenarios", "kill", "two", "--output-dir", str(tmp_path / "crash")]
    variables = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cases = json.loads((tmp_path / "crash" / "crash.json").read_text(encoding="utf-8"))
    assert len(cases) == 6 and not [key for key, case in cases.items() if case["fault"]]
