"""Records of an evaluation survive a kill and never mix two evaluations."""

import json
import resource

import pytest

from devil_hf.evaluation.records import Records
from devil_hf.folders import DiskFull


def test_a_stopped_evaluation_goes_on(tmp_path):
    records = Records(tmp_path / "new" / "rows.jsonl", {"seed": 0, "layers": ("a", "b")})
    records.add("one", {"text": "a dog"})
    again = Records(records.path, {"seed": 0, "layers": ["a", "b"]})
    assert "one" in again and "two" not in again
    again.add("two", [1.5])
    assert Records(records.path, {"seed": 0, "layers": ["a", "b"]}).rows == {"one": {"text": "a dog"}, "two": [1.5]}


@pytest.mark.parametrize("kept", range(0, 90, 7))
def test_a_line_that_was_cut_off_is_made_anew(tmp_path, kept):
    path = tmp_path / "rows.jsonl"
    records = Records(path, {"seed": 0})
    records.add("one", "a")
    records.add("two", "b")
    path.write_bytes(path.read_bytes()[:kept])
    again = Records(path, {"seed": 0})
    for key, row in (("one", "a"), ("two", "b")):
        if key not in again:
            again.add(key, row)
    assert Records(path, {"seed": 0}).rows == {"one": "a", "two": "b"}


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    Records(path, {"seed": 0, "limit": 3})
    with pytest.raises(ValueError, match=r"\{'seed': 0\}, not \{'seed': 1\}"):
        Records(path, {"seed": 1, "limit": 3})
    path.write_text(json.dumps([1, 2]) + "\n")
    with pytest.raises(ValueError, match="no record of an evaluation"):
        Records(path, {"seed": 0, "limit": 3})


def test_a_row_of_another_image_is_not_known_any_more(tmp_path, monkeypatch):
    records = Records(tmp_path / "rows.jsonl", {"seed": 0})
    records.add("one", "a", "first picture")
    again = Records(records.path, {"seed": 0})
    assert again.identities == {"one": "first picture"}
    again.add("one", "b", "second picture")
    assert Records(records.path, {"seed": 0}).rows == {"one": "b"}


def test_a_full_disk_leaves_whole_rows_and_says_so(tmp_path):
    records = Records(tmp_path / "rows.jsonl", {"seed": 0})
    records.add("one", "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (records.path.stat().st_size + 20, hard))
    try:
        with pytest.raises(DiskFull, match="The 1 rows before are kept"):
            records.add("two", "b" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    records.add("three", "c")
    assert Records(records.path, {"seed": 0}).rows == {"one": "a", "three": "c"}
