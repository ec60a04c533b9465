"""`devil diff` in the process: its mistakes, its record and its page."""

import json

import pytest

from devil_hf.cli.main import main


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("diff shapes --images shapes:20", "a difference has two sides: name B, or --backbone WEIGHTS"),
        ("diff shapes shapes --backbone a.safetensors --images shapes:20", "a difference has two sides"),
        ("diff shapes shapes --images shapes:20 --level 1.5", "--level 1.5 must lie between 0 and 1"),
        ("diff shapes shapes --images shapes:20 --least 2", "--least 2.0 is a share"),
        ("diff shapes shapes --images shapes:5", "5 images are too few"),
        ("diff shapes shapes --images none", "none"),
        ("diff shapes shapes --images shapes:20 --output no/such.html", "there is no folder no"),
        ("diff shapes shapes --images shapes:20 --output .", "--output . is a folder; name a file in it"),
        ("diff none none --images shapes:20 --level 1e-6", "level=1e-06 needs 400,000,000 exchanges"),
        ("diff none none --images shapes:20 --level 1e-6", "ask for a level of 4e-05 or more, or for fewer layers or words"),
        ("diff shapes shapes --images shapes:20 --words none.txt", "none.txt"),
        ("diff shapes shapes --images shapes:20 --words dog.txt", "cannot represent the word 'dog'"),
        ("diff shapes --backbone none.safetensors --images shapes:20", "there is no file none.safetensors"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog.txt").write_text("red\ndog\n", encoding="utf-8")
    assert main(words.split()) == 1
    told = capsys.readouterr().err
    assert named in told and "Traceback" not in told


def test_a_checkpoint_does_not_differ_from_itself(tmp_path, capsys):
    page = tmp_path / "difference.html"
    assert main(["diff", "shapes", "shapes", "--images", "shapes:20", "--json", "--output", str(page)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["images"] == 20 and not any([*record["lost"].values(), *record["gained"].values()])
    assert {one["word"] for one in record["words"]} >= {"red", "striped", "circle"}
    assert "No word changed" in page.read_text(encoding="utf-8")
