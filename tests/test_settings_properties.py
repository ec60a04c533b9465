"""Whatever stands in a field of settings, in a file, a call or on the command line, is of its type or named in an error."""

import contextlib
import dataclasses
import io
import math
import typing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devil_hf.cli.attribute import AttributeSettings
from devil_hf.cli.describe import DescribeSettings
from devil_hf.settings import LayerSettings, make, option, parse, read_number, read_windows
from devil_hf.training.recipe import Recipe

NUMBERS = st.one_of(st.floats(), st.integers(), st.integers(-3, 40), st.floats(0, 2))
ODD = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=12), NUMBERS.map(str),
    st.lists(st.text(max_size=4) | NUMBERS, max_size=3),
    st.dictionaries(st.text(max_size=4), NUMBERS, max_size=2), st.binary(max_size=4), st.integers(-9, 9).map(np.int64),
    st.floats().map(np.float64), st.integers(-9, 9).map(torch.tensor), st.just(b"x"), st.just(Path("x")), st.just("1e6"),
)  # fmt: skip
CLASSES = (AttributeSettings, DescribeSettings, Recipe)
NEEDED = {
    AttributeSettings: {"image": "a.png", "phrases": ["dog"]},
    DescribeSettings: {"images": ["a.png"]},
    Recipe: {"checkpoint": "shapes"},
}


def fits(hint, value):
    """Whether a value is of a field's type, strictly: no bool for a number, and nothing that is not finite."""
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | None)) else (hint,)
    for one in allowed:
        kind = typing.get_origin(one) or one
        if kind is typing.Literal:
            if str(value) in typing.get_args(one):
                return True
        elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return not isinstance(value, float) or math.isfinite(value)
    return False


@given(st.sampled_from(CLASSES), st.data())
def test_fields_are_of_their_types_or_named(cls, data):
    field = data.draw(st.sampled_from(dataclasses.fields(cls)))
    value = data.draw(ODD)
    hints = typing.get_type_hints(cls)
    try:
        settings = make(cls, NEEDED[cls] | {field.name: value})
    except ValueError as error:
        told = str(error)
    else:
        assert fits(hints[field.name], getattr(settings, field.name)), (field.name, value)
        return
    assert field.name.partition("_")[0].rstrip("s") in told.replace("-", "_") or "train_data" in told
    assert "\n" not in told and len(told) < 1000


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["--window", "--num-beams", "--guidance", "--layers", "--json", "--", "a.png"]), st.text(max_size=6)
        )
    )
)
def test_command_lines_are_read_refused_or_end_with_2(words):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            settings = parse(DescribeSettings, words)
        except SystemExit as end:
            code = end.code
            settings = None
        except (ValueError, OSError) as error:
            code, settings = 1 if len(str(error)) < 1000 else None, None
    if settings is None:
        assert code in (0, 1, 2)
        return
    assert settings.num_beams >= 1 and settings.window % 2 == 1 and math.isfinite(settings.guidance)


@given(st.one_of(ODD, st.integers(-(10**30), 10**30), st.integers(0, 2**64).map(str)))
def test_numbers_are_read_exactly_or_refused(value):
    for kind in (int, float):
        try:
            number = read_number(kind, value)
        except ValueError:
            continue
        assert type(number) is kind and not isinstance(value, bool)
        as_float = kind is float or (isinstance(value, str) and not value.strip().lstrip("+-").isdigit())  # 1e6
        assert number == (float(value) if as_float else Fraction(value.item() if hasattr(value, "item") else value))


@given(st.lists(st.text("layer01=-3 5", max_size=9), max_size=3))
def test_windows_are_odd_sides_of_layers_that_are_asked_or_refused(typed):
    known = ["layer0", "layer1", "3"]
    try:
        found = read_windows(typed, known[1:], known)
    except ValueError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert "--windows" in told
        return
    assert set(found) <= set(known[1:]) and all(side % 2 == 1 and side > 0 for side in found.values())


@dataclasses.dataclass(kw_only=True)
class Wide(LayerSettings):
    steps: int = option("of the work", 3, least=1)
    rate: float = option("of the work", 0.5)
    names: list[str] = option("which", positional=True)
    place: Path = option("where", Path("x"))
    dry: bool = option("wait", False)
    split: str | None = option("part", None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": True}, "steps=True: a bool is not a number"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": np.int64(-4)}, "steps=-4 must be at least 1"),
        ({"steps": 10**19}, "too large"),
        ({"steps": [3]}, "a list is not a number"),
        ({"rate": float("nan")}, "rate=nan: nan is not a finite number"),
        ({"rate": "inf"}, "not a finite number"),
        ({"names": []}, "names is empty: which"),
        ({"names": b"ab"}, "names=b'ab' must be a list"),
        ({"names": [1]}, "quotes"),
        ({"split": False}, "split=False must be of type str, which YAML reads as text in quotes only"),
        ({"dry": "yes"}, "dry='yes' must be of type bool: true or false"),
        ({"place": ""}, "place='' must be of type Path"),
    ],
)
def test_wrong_types_name_field_value_and_remedy(values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make(Wide, {"names": ["a"]} | values)


def test_numbers_of_other_libraries_and_of_yaml_are_numbers():
    found = make(Wide, {"names": ["a"], "steps": np.int64(4), "rate": torch.tensor(0.25), "dry": np.bool_(True)})
    assert (found.steps, found.rate, found.dry) == (4, 0.25, True) and type(found.steps) is int
    assert make(Wide, {"names": ["a"], "steps": "1e6", "rate": "1e-3"}).steps == 1_000_000
    assert parse(Wide, ["a", "--steps", "2e3"]).steps == 2000
