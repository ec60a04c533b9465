"""A missing extra is named, with the command that installs it; the names are those of pyproject.toml."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from devil_hf.extras import DISTRIBUTIONS, MissingExtraError, explain, is_installed, needs

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_missing_package_is_named_with_its_remedy():
    with pytest.raises(MissingExtraError, match=r"nowhere is not installed.*pip install 'devil-hf\[evaluate\]'"):
        needs("nowhere", "evaluate")
    needs("torch", "train")
    assert is_installed("torch.nn")
    assert not is_installed("nowhere.at.all")


def test_every_package_that_is_asked_for_is_in_the_extra_that_the_message_names():
    asked = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "needs":
                asked.append([ast.literal_eval(argument) for argument in node.args])
    for module, extra in asked:
        packages = [re.match(r"[\w-]+", line)[0] for line in PYPROJECT["optional-dependencies"][extra]]
        assert DISTRIBUTIONS.get(module, module) in packages, (module, extra)


def test_all_holds_every_extra_of_users():
    extras = PYPROJECT["optional-dependencies"]
    assert set(extras) == {"train", "evaluate", "demo", "all", "test", "docs"}
    assert extras["all"] == ["devil-hf[train,evaluate,demo]"]


@pytest.mark.parametrize("first", ["peft", "transformers.trainer"])
def test_other_packages_can_be_imported_after_this_one(first):
    """Registering waits until nothing that the model imports is half imported."""
    subprocess.run([sys.executable, "-c", f"import devil_hf, {first}; devil_hf.DevilModel"], check=True)


def test_a_failed_import_of_an_extras_package_says_how_to_install_it(monkeypatch):
    lines = [
        "torch>=2.11",
        "scikit-learn>=1.5; extra == 'all'",
        "scikit-learn>=1.5; extra == 'evaluate'",
        "scikit-learn-more; extra == 'x'",
    ]
    monkeypatch.setattr("devil_hf.extras.requires", lambda name: lines)
    missing = ModuleNotFoundError("No module named 'sklearn'", name="sklearn.metrics")
    assert explain(missing).endswith("pip install 'devil-hf[evaluate]'")
    assert explain(ModuleNotFoundError("No module named 'other'", name="other")) == "No module named 'other'"
