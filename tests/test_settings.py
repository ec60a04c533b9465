"""Settings: one dataclass, read from the command line, YAML and Python alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from devil_hf.registry import Registry
from devil_hf.settings import LayerSettings, as_record, checked, hyphenated, make, markdown_table, option, parse

COLOURS: Registry[str] = Registry("colour")
COLOURS.register("red", "#f00")
COLOURS.register("blue", "#00f")


@dataclass(kw_only=True)
class PaintSettings(LayerSettings):
    """What is painted."""

    images: list[str] = option("files", positional=True)
    ground: str = option("what is painted on", "paper", positional=True)
    colours: list[str] = option("in this order", ["red"], choices=lambda: COLOURS)
    side: Literal["front", "back"] = option("where", "front")
    max_strokes: int = option("at most", 10)
    width: float | None = option("of a stroke, 100% by default", None)
    dry: bool = option("wait for it", True)
    frame: bool = option("put it into a frame", False)
    mixture: dict = option("shares of pigments", {})
    output: Path = option("written", Path("out.png"))

    def validate(self) -> None:
        if self.max_strokes < 1:
            raise ValueError(f"max_strokes={self.max_strokes} must be at least 1")


def test_every_kind_of_field_is_read():
    words = "a.png --ground wood --colours blue red --side back --max_strokes=3 --width 1e-3 --no-dry --frame --output x/y.png"
    settings = parse(PaintSettings, [*words.split(), "--mixture", '{"ochre": 0.5}', "--layers", "-1", "layer3"])
    assert settings == PaintSettings(
        images=["a.png"], ground="wood", colours=["blue", "red"], side="back", max_strokes=3, width=1e-3, dry=False,
        frame=True, mixture={"ochre": 0.5}, output=Path("x/y.png"), layers=["-1", "layer3"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "dry", "frame"),
    [
        ("", True, False),
        ("--dry false --frame true", False, True),
        ("--no-dry --no-frame", False, False),
        ("--frame=true --dry=false", False, True),
    ],
)
def test_flags_may_say_what_they_are(words, dry, frame):
    settings = parse(PaintSettings, ["--max-strokes", "2", *words.split(), "--", "a.png"])
    assert (settings.dry, settings.frame, settings.images) == (dry, frame, ["a.png"])


def test_a_file_gives_what_the_command_line_does_not(tmp_path):
    file = tmp_path / "paint.yaml"
    file.write_text("images: [a.png]\nwidth: 1e-3\ncolours: [blue]\nmax_strokes: 4\n")
    settings = parse(PaintSettings, [f"--config={file}", "--max-strokes", "5"])
    assert (settings.images, settings.width, settings.colours, settings.max_strokes) == (["a.png"], 1e-3, ["blue"], 5)
    again = make(PaintSettings, yaml.safe_load(yaml.safe_dump(as_record(settings))))
    assert again == settings


@pytest.mark.parametrize("words", ["", "a.png --side top", "a.png --max-strokes many", "a.png --mixture {", "a.png --x"])
def test_a_wrong_command_line_ends_with_2(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(PaintSettings, words.split())
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "images is missing: files"),
        ({"images": "a.png"}, "must be a list"),
        ({"images": ["a"], "side": "top"}, "side='top' is none of front, back"),
        ({"images": ["a"], "colours": ["green"]}, "is none of red, blue"),
        ({"images": ["a"], "max_strokes": 1.5}, "whole number"),
        ({"images": ["a"], "max_strokes": 0}, "at least 1"),
        ({"images": ["a"], "max_stroke": 1}, "did you mean 'max_strokes'"),
        ({"images": ["a"], "width": "wide"}, "not a number"),
        ({"images": ["a"], "mixture": [1]}, "must be of type dict"),
        ({"images": ["a"], "max_strokes": None}, "max_strokes is empty"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        make(PaintSettings, values)
    if "images" in values and "max_stroke" not in values:
        with pytest.raises(ValueError, match=message):
            checked(PaintSettings(**values))


def test_help_and_documentation_tell_the_same(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(PaintSettings, ["--help"])
    shown = capsys.readouterr().out
    table = markdown_table(PaintSettings)
    for name in ("--max-strokes", "--colours", "--layers", "--output"):
        assert name in shown and f"`{name}`" in table
    assert "(default: 10)" in shown and "| `--max-strokes` | whole number | `10` | at most |" in table
    assert "| `IMAGE` | several: text | **required** | files |" in table and "several: `red` or `blue`" in table
    assert shown.index("--max-strokes N") < shown.index("--layers LAYER"), "inherited options come last"


def test_underscores_are_understood_before_the_dashes_only():
    assert hyphenated(["--a_b=c_d", "e_f", "--", "--g_h"]) == ["--a-b=c_d", "e_f", "--", "--g_h"]
