"""What travels with a checkpoint is an auditor's page: few files, few lines, no import of the package, every access listed."""

from pathlib import Path

import pytest

from devil_hf.hub.travelling import ACCESSES, COMPANIONS, accesses, table, travelling_files, violations

FILES, LINES, LONGEST = 12, 2_800, 500
PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def test_the_files_that_travel_keep_to_their_budget():
    lines = {file.name: len(file.read_text().splitlines()) for file in travelling_files()}
    assert len(lines) <= FILES
    assert max(lines.values()) <= LONGEST
    assert sum(lines.values()) <= LINES, lines


@pytest.mark.parametrize("file", [*travelling_files(), *COMPANIONS], ids=lambda file: file.name)
def test_a_travelling_file_imports_and_touches_what_is_listed_alone(file):
    assert not list(violations(file))


def test_the_list_has_nothing_that_the_code_does_not_do():
    for file in (*travelling_files(), *COMPANIONS):
        assert {access.call for access in ACCESSES if access.file == file.name} == accesses(file)
    assert {access.file for access in ACCESSES} <= {file.name for file in (*travelling_files(), *COMPANIONS)}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("eval('1')", "uses eval"),
        ("import os\nos.remove('x')", "uses os.remove"),
        ("from os import remove", "imports of os remove"),
        ("from .other import x", "imports .other"),
        ("import pickle", "imports pickle"),
        ("from urllib.request import urlopen", "imports urllib"),
        ("import subprocess as s", "imports subprocess"),
        ("from devil_hf.data import worlds", "imports devil_hf.data"),
        ("import torch\ntorch.load('x')", "calls torch.load"),
        ("open('x')", "uses open"),
        ("import numpy as np\nnp.load('x')", "calls np.load"),
    ],
)
def test_what_is_forbidden_is_found(line, found, tmp_path):
    file = tmp_path / "bad_devil.py"
    file.write_text(line)
    assert any(found in violation for violation in violations(file))


def test_the_page_on_security_is_written_from_the_same_list():
    assert table() in PAGE.read_text(encoding="utf-8")
