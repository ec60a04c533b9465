"""Registries: one place to add something, from inside and outside of the package."""

import sys
import textwrap

import pytest

from devil_hf import registry
from devil_hf.registry import Registry


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package whose files register entries, one of which is there by an entry point as well."""
    folder = tmp_path / "some_room"
    folder.mkdir()
    (folder / "__init__.py").write_text("from devil_hf.registry import Registry\nTHINGS = Registry('thing', 'some_room')\n")
    for name in ("chair", "table"):
        (folder / f"{name}.py").write_text(
            textwrap.dedent(f"""
            from some_room import THINGS

            @THINGS.register("{name}")
            def {name}():
                return "{name}"
            """)
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "load_plugins", lambda: None)
    yield "some_room"
    for name in [name for name in sys.modules if name.partition(".")[0] == "some_room"]:
        del sys.modules[name]


def test_files_of_the_room_are_found_when_somebody_asks(room):
    from some_room import THINGS

    assert "some_room.chair" not in sys.modules
    assert THINGS["table"]() == "table" and list(THINGS) == ["chair", "table"] and len(THINGS) == 2


def test_an_unknown_name_is_answered_with_those_that_there_are(room):
    from some_room import THINGS

    with pytest.raises(ValueError, match=r"there is no thing 'chairs' \(did you mean 'chair'\?\); there are chair, table"):
        THINGS["chairs"]
    assert "chairs" not in THINGS


def test_two_entries_of_one_name_are_refused():
    things: Registry = Registry("thing")

    @things.register("lamp")
    def lamp():
        return 1

    things.register("lamp", lamp)  # the same again
    with pytest.raises(ValueError, match="two entries 'lamp'"):
        things.register("lamp", print)


def test_installed_packages_add_entries_by_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "their_package.py").write_text("import devil_hf.registry\ndevil_hf.registry.SEEN = True\n")
    about = tmp_path / "their_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{registry.PLUGINS}]\nthings = their_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.load_plugins.cache_clear()
    list(Registry("thing"))
    assert registry.__dict__.pop("SEEN")
    registry.load_plugins.cache_clear()


def test_a_file_that_fails_is_not_forgotten(room, tmp_path):
    (tmp_path / "some_room" / "stove.py").write_text("raise OSError('cold')\n")
    from some_room import THINGS

    for _ in range(2):
        with pytest.raises(OSError, match="cold"):
            list(THINGS)
