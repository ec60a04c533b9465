"""Text files of every editor are read alike, and what cannot be read is named in a line."""

import gzip
import json
import os
import subprocess
import sys
import unicodedata

import pytest

from devil_hf.text_files import existing_file, read_csv, read_json, read_json_lines, read_list, read_results, read_text, read_yaml

READERS = [read_text, read_list, read_json, read_results, read_yaml, lambda path: list(read_csv(path))]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("zipped", [False, True])
def test_byte_order_mark_line_ends_and_gzip_change_nothing(tmp_path, ends, encoding, zipped):
    file = tmp_path / "text"
    content = ends.join(["réseau à gauche", "", "b c \t", ""]).encode(encoding)
    file.write_bytes(gzip.compress(content) if zipped else content)
    assert read_text(file) == "réseau à gauche\n\nb c \t"
    assert read_list(file) == ["réseau à gauche", "b c"]


@pytest.mark.parametrize("reader", READERS)
def test_other_encodings_and_damaged_archives_are_refused_without_their_bytes(tmp_path, reader):
    zipped = gzip.compress(b"secret\n" * 1000)
    for content in (
        "secret\nsecr\u00e9t".encode("latin-1"),
        "secret".encode("utf-16"),
        zipped[:-9],
        zipped[:20] + b"\0\1" + zipped[22:],
    ):
        (tmp_path / "file.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.txt.*(save the file as UTF-8|fetch it anew)") as error:
            reader(tmp_path / "file.txt")
        assert "secr" not in str(error.value) and len(str(error.value)) < 300


def test_a_table_is_read_whole_or_its_row_is_named(tmp_path):
    file = tmp_path / "table.csv"
    text = "x" * 200_000
    file.write_text(
        f'\ufefffile_name , text\r\n"a b.png","a dog, a ""cat""\nand"\r\n\r\n , \r\nb.png,{text}\r\n', encoding="utf-8"
    )
    rows = dict(read_csv(file))
    assert list(rows.values()) == [{"file_name": "a b.png", "text": 'a dog, a "cat"\nand'}, {"file_name": "b.png", "text": text}]
    for wrong, message in {
        "a,b\n1,2\n1,2,3\n": r"table\.csv:3 has 3 fields, but there are 2 columns \(a, b\)",
        "a,b\n1\n": r"table\.csv:2 has 1 fields",
        "a,b,a\n1,2,3\n": r"names the columns \['a'\] twice",
        'a,b\n"1,2\n3,4\n': r"double quote that is not closed",
    }.items():
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            list(read_csv(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"file\.json(:1)? is not JSON: .* line \d, column \d"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5_000, "too long"),
        ("", "is not JSON"),
    ],
)
def test_json_that_cannot_be_read_is_a_line(tmp_path, content, message):
    (tmp_path / "file.json").write_text(content, encoding="utf-8")
    for reader in (read_json, lambda path: list(read_json_lines(path))):
        if not content and reader is not read_json:
            continue
        with pytest.raises(ValueError, match=message) as error:
            reader(tmp_path / "file.json")
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1,\n b: {", r"file\.yaml:2 is no YAML"),
        ("a: 1\nb: 2\na: 3\n", r"file\.yaml:3 is no YAML: the key 'a' is there twice"),
        ("a: 1\n\tb: 2\n", r"file\.yaml:2 is no YAML"),
        ("when: 2020-99-99", "is no YAML: month must be"),
        ("[" * 5_000, "nested too deeply"),
        ("a: \x00", "is no YAML"),
        ("a: !!python/object:os.system 1", r"file\.yaml:1 is no YAML: could not determine a constructor"),
    ],
)
def test_yaml_slips_are_named_with_their_line(tmp_path, content, message):
    (tmp_path / "file.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(tmp_path / "file.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_names_are_found_however_their_accents_are_composed(tmp_path):
    composed, taken_apart = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    for on_disk, asked in ((composed, taken_apart), (taken_apart, composed)):
        (tmp_path / on_disk).write_bytes(b"")
        assert existing_file(tmp_path, asked) == tmp_path / on_disk and existing_file(tmp_path, on_disk) == tmp_path / on_disk
        (tmp_path / on_disk).unlink()
    (tmp_path / composed).mkdir()
    assert existing_file(tmp_path, composed) is None and existing_file(tmp_path, "\0") is None


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "ä" * 200])
def test_a_name_that_no_file_can_have_is_absent(tmp_path, name):
    assert existing_file(tmp_path, name) is None


def test_recipes_are_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "recipe.yaml").write_text("backbone: réseau\n", encoding="utf-8")
    (tmp_path / "words.json").write_text(json.dumps(["é"], ensure_ascii=False), encoding="utf-8")
    ask = (
        "import sys; from pathlib import Path; from devil_hf.text_files import read_json, read_yaml\n"
        "assert read_yaml(Path(sys.argv[1]) / 'recipe.yaml')['backbone'] == 'r\\u00e9seau'\n"
        "assert read_json(Path(sys.argv[1]) / 'words.json') == ['\\u00e9']"
    )
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", ask, tmp_path], env=plain, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr


def test_results_that_name_a_key_twice_or_are_too_large_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "scores.json"
    file.write_text('{"scores": {"all": {"cider": 1.0}, "all": {"cider": 9.0}}}')
    with pytest.raises(ValueError, match=r"scores\.json cannot be read: the key 'all' is there twice; remove or rename"):
        read_results(file)
    monkeypatch.setattr("devil_hf.text_files.LARGEST_RESULTS", 2**20)
    file.write_bytes(gzip.compress(b"[" + b" " * 2**20 + b"]"))  # unpacked, it is larger
    with pytest.raises(ValueError, match=r"scores\.json has more than 1 MB"):
        read_results(file)
    file.write_text('{"scores": {"all": {"cider": 1.0}}}')
    assert read_results(file) == {"scores": {"all": {"cider": 1.0}}}
