"""Records of an evaluation survive a kill and never mix two evaluations."""

import json

import pytest

from devil_hf.evaluation.records import Records


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
