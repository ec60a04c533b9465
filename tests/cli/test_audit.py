"""`devil audit` judges a file of claims: exit code, JUnit XML and page; what is wrong in the file is named with its line."""

import json
import os
import shutil
from dataclasses import fields
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from devil_hf.cli.main import main
from devil_hf.cli.verb import show
from devil_hf.data.shapes import make_scene
from devil_hf.questions.audit_file import AuditFile, Check, Control, read_audits
from devil_hf.settings import JsonSettings

FILE = """\
checkpoint: shapes
bound: 0.8
checks:
  - phrase: red
    claim: encoded
    present: {0}/red
    absent: {0}/blue
    layers: [layer3, -1]
  - phrase: red
    claim: not encoded
    present: {0}/red
    absent: {0}/blue
    masks: {0}/masks
  - phrase: red
    claim: not encoded
    present: {0}/blue
    absent: {0}/blue_too
    paired: true
    control: {{present: {0}/red, absent: {0}/blue}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Squares on noisy grounds: red ones, blue ones, blue ones again, and masks of the squares."""
    root = tmp_path_factory.mktemp("audit")
    generator = np.random.default_rng(0)
    for at in range(24):
        left, top, side = generator.integers(20, 60, 3)
        for name, colour in (("red", (208, 32, 36)), ("blue", (40, 66, 208)), ("blue_too", (40, 66, 208)), ("masks", (255,) * 3)):
            picture = np.full((128, 128, 3), 0 if name == "masks" else 200, np.uint8)
            if name != "masks":
                picture += generator.integers(0, 20, picture.shape, dtype=np.uint8)
            picture[top : top + side, left : left + side] = colour
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(picture).save(root / name / f"{at:02}.{'png' if name == 'masks' else 'webp'}", lossless=True)
    return root


@pytest.fixture
def file(folder, tmp_path):
    path = tmp_path / "audit.yaml"
    path.write_text(FILE.format(folder))
    return path


def test_claims_are_judged_and_written(file, tmp_path, capsys):
    junit, html = tmp_path / "audit.xml", tmp_path / "audit.html"
    assert main(["audit", str(file), "--junit", str(junit), "--html", str(html), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in rows] == ["encoded", "encoded", "not encoded"]
    assert [row["passed"] for row in rows] == [True, False, True]
    assert rows[0]["layers"] == ["layer3", "layer4"] and rows[2]["control"]["passed"]
    assert all("(shapes: layer" in row["message"] for row in rows), "which network it was"
    suite = ElementTree.parse(junit).getroot()
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "3", "1")
    cases = suite.findall("testcase")
    (failure,) = [failure for case in cases for failure in case.findall("failure")]
    assert failure.get("type") == "encoded" and failure.text == rows[1]["message"] and "Worst images:" in failure.text
    assert len({case.get("name") for case in cases}) == 3, "checks that ask the same have names of their own"
    page = html.read_text()
    assert page.count("<article>") == 3 and page.count("data:image/webp") == 15 and "1 failed" in page
    assert "http" not in page, "the page needs nothing else"


def test_claims_that_hold_end_well(file, capsys):
    text = file.read_text()
    file.write_text(text[: text.index("  - phrase: red\n    claim: not encoded\n    present")])
    assert main(["audit", str(file)]) == 0
    assert "1 checks, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        (
            "    layers: [layer3, -1]",
            "    layres: [layer3]",
            8,
            "fields ['layres'] that Check does not have (did you mean 'layers'?)",
        ),
        ("bound: 0.8", "bounds: 0.8", 2, "fields ['bounds'] that AuditFile does not have (did you mean 'bound'?)"),
        ("control: {{present", "control: {{preset: 1, present", 19, "fields ['preset'] that Control does not have"),
        ("claim: encoded", "claim: there", 5, "claim='there' is none of encoded, not encoded"),
        ("    layers: [layer3, -1]", "    level: much", 8, "level='much': 'much' is not a number"),
        ("    layers: [layer3, -1]", "    level: 2", 4, "level=2.0 must be an error rate"),
        ("    layers: [layer3, -1]", "    layers: [layer9]", 4, "unknown layer 'layer9'"),
        ("phrase: red", "phrase: a hospital tag", 4, "phrases ['a hospital tag'] hold words that"),
        ("bound: 0.8", "bound: 0.6", 9, "'red': 24 and 24 images cannot show that it is not encoded at an error rate of 0.05"),
        ("    masks: {0}/masks", "    masks: {0}/none", 9, "/none: folders are relative to the file"),
        ("    layers: [layer3, -1]", "    probe: true", 4, "probe=True is for what is claimed to be not encoded"),
        ("    absent: {0}/blue\n", "    absent: {0}/red\n", 4, "present and absent are both"),
        (
            "    absent: {0}/blue_too",
            "    absent: {0}/masks",
            14,
            "/masks has nothing of the name of 00.webp (24 of 24 are missing)",
        ),
        ("checks:", "checks: []\nothers:", 4, "fields ['others']"),
        ("  - phrase: red\n    claim: encoded", "  - red\n  - phrase: red\n    claim: encoded", 4, "a check is a mapping"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_line(folder, tmp_path, capsys, old, new, line, message):
    path = tmp_path / "audit.yaml"
    assert old in FILE
    path.write_text(FILE.replace(old, new, 1).format(folder))
    assert main(["audit", str(path)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}:{line}: " in told and message in told, told


def test_files_are_looked_for_before_the_work(file, tmp_path, capsys):
    assert main(["audit", str(tmp_path / "none.yaml")]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert main(["audit", str(file), "--html", str(tmp_path)]) == 1
    assert "is a folder: name a file in it" in capsys.readouterr().err
    assert main(["audit", str(file), "--html", str(tmp_path / "a"), "--junit", str(tmp_path / "a")]) == 1
    assert "name two files" in capsys.readouterr().err
    file.write_text(file.read_text().replace("checkpoint: shapes\n", ""))
    assert main(["audit", str(file)]) == 1
    assert "names no network" in capsys.readouterr().err
    file.write_text("checks: &a [*a]\n")
    assert main(["audit", str(file)]) == 1
    assert "a check is a mapping" in capsys.readouterr().err
    file.write_text("- red\n")
    assert main(["audit", str(file)]) == 1
    assert "holds no mapping" in capsys.readouterr().err


def test_scenes_can_be_audited_without_a_folder(tmp_path, capsys):
    """Worlds of two seeds differ in nothing, so that no word can tell them."""
    assert make_scene(1, 0) != make_scene(2, 0)
    (tmp_path / "a.yaml").write_text(
        "checkpoint: shapes\nchecks: [{phrase: red, claim: encoded, present: 'shapes:20:1', absent: 'shapes:20:2', level: 0.001}]"
    )
    assert main(["audit", str(tmp_path / "a.yaml")]) == 1
    assert "was claimed to be encoded" in capsys.readouterr().out


def test_a_name_that_is_no_text_loses_no_verdict(folder, tmp_path, capsys):
    """On Linux a file may have any bytes for its name."""
    for group in ("red", "blue"):
        (tmp_path / group).mkdir()
        for at in range(5):
            name = os.fsdecode(b"\xff%d.webp" % at)
            shutil.copy(folder / group / f"{at:02}.webp", tmp_path / group / name)
    claim = f"{{phrase: red, claim: encoded, present: {tmp_path}/blue, absent: {tmp_path}/red}}"
    (tmp_path / "a.yaml").write_text(f"checkpoint: shapes\nchecks: [{claim}]")
    pages = [tmp_path / "a.html", tmp_path / "a.xml"]
    assert main(["audit", str(tmp_path / "a.yaml"), "--html", str(pages[0]), "--junit", str(pages[1])]) == 1
    assert "Worst images:" in capsys.readouterr().out and all("Worst images:" in page.read_text() for page in pages)


def test_what_is_not_finite_is_null_in_json(capsys):
    show(JsonSettings(json=True), {"detectable": float("nan")}, "")
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"detectable": None}


def test_folders_are_relative_to_the_file(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "shapes").mkdir(exist_ok=True)
    (tmp_path / "red").mkdir()
    file = folder / "relative.yaml"
    for named, found in (("blue", str(folder / "blue")), ("shapes", "shapes"), ("user/blue", "user/blue")):
        file.write_text(FILE.format(".").replace("checkpoint: shapes", f"checkpoint: {named}"))
        checkpoint, planned = read_audits(file)
        assert checkpoint == found and [len(one.asked.present) for one in planned] == [24, 24, 24]


@pytest.mark.parametrize("named", ["./devl", "../devl", "runs/devl", "a/b/c", "elsewhere", "user/elsewhere", "/none", "devl/"])
def test_a_checkpoint_that_is_not_beside_the_file_is_not_looked_for_elsewhere(folder, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    for place in ("elsewhere", "user/elsewhere"):
        (tmp_path / place).mkdir(parents=True)
    (folder / "runs").mkdir(exist_ok=True)
    file = folder / "checkpoint.yaml"
    file.write_text(FILE.format(".").replace("checkpoint: shapes", f"checkpoint: {named}"))
    with pytest.raises(FileNotFoundError, match=r"checkpoint.yaml:1: there is no checkpoint .*: a folder is relative"):
        read_audits(file)


@pytest.mark.parametrize("named", ["rde", "user/rde", "here"])
def test_images_that_are_not_beside_the_file_are_not_looked_for_elsewhere(folder, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    file = folder / "images.yaml"
    file.write_text(f"checks: [{{phrase: red, claim: encoded, present: {named}, absent: blue}}]")
    with pytest.raises(FileNotFoundError, match=rf"images.yaml:1: .*there is no folder .*/{named}: folders are relative"):
        read_audits(file)


def test_help_names_keys_and_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    told = capsys.readouterr().out
    keys = {field.name for kind in (AuditFile, Check, Control) for field in fields(kind)}
    assert all(f"\n  {key} " in told for key in keys), "the keys of the file"
    assert "exit codes: 0 where every claim holds, 1 where one does not" in told and "relative to FILE" in told
