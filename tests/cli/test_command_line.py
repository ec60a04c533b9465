"""The command line as such: verbs, their settings, exit codes, and what is imported when."""

import logging
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from devil_hf.cli.main import build_parser, main
from devil_hf.cli.verb import VERBS, Verb, show
from devil_hf.settings import JsonSettings, from_namespace, option, read_layers

LIGHT = """
import sys
import devil_hf
from devil_hf.cli.main import build_parser
assert "describe" in build_parser().format_help() and "DevilModel" in dir(devil_hf)
heavy = {"torch", "transformers", "timm", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
FIRST = "import devil_hf\nfrom transformers import AutoModel, AutoProcessor"
SECOND = "from transformers import AutoModel, AutoProcessor\nimport devil_hf"
LOADED = """
import sys
from devil_hf.checkpoints import locate
processor, model = AutoProcessor.from_pretrained(locate('shapes')), AutoModel.from_pretrained(locate('shapes'))
assert type(model) is devil_hf.DevilModel and type(processor) is devil_hf.DevilProcessor
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "devil_hf.registration"]
"""


def python(code: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_and_asking_for_help_imports_nothing_heavy():
    python(LIGHT)


def test_describing_imports_nothing_that_only_trains_or_evaluates():
    """accelerate and scipy are imported by transformers where they are there."""
    python(
        "import atexit, gc, sys\nfrom devil_hf.cli.main import main\n"
        "gc.set_threshold(700)  # as Python has it, and not the tests\n"
        "atexit.unregister(gc.freeze)\n"
        "sys.argv = ['devil', 'describe', '--layers', 'all', '--max-new-tokens', '1']\n"
        "searches = []\n"
        "gc.callbacks.append(lambda phase, _: searches.append(phase))\n"
        "assert main() == 0 and not searches, 'for dead objects'\n"
        "gc.collect()\n"
        "assert 10_000 < gc.get_threshold()[0] < 100_000  # of longer work\n"
        "heavy = {'peft', 'datasets', 'sklearn', 'gradio', 'pandas', 'matplotlib', 'evaluate', 'tabulate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "atexit._run_exitfuncs()\n"
        "assert gc.get_freeze_count() > 100_000  # nothing of it is searched at the end\n"
    )


@pytest.mark.parametrize("long", [True, False])
def test_dead_objects_of_long_work_are_looked_for_from_its_beginning_on(long):
    python(
        "import gc, sys\nfrom dataclasses import dataclass\nfrom devil_hf.cli.main import main\n"
        "from devil_hf.cli.verb import VERBS, Verb\n"
        "@dataclass(kw_only=True)\nclass Settings:\n    pass\n"
        "seen = []\n"
        "run = lambda settings: seen.append(gc.get_threshold()[0])\n"
        f"VERBS.register('work', Verb('work', 'work', 'devil work', lambda: Settings, run, long={long}))\n"
        "sys.argv = ['devil', 'work']\n"
        f"assert main() == 0 and (seen[0] < 100_000) == {long}, seen\n"
        "gc.set_threshold(700)\n"
        "gc.collect()\n"
        "assert gc.get_threshold()[0] == 700  # what others have chosen stays\n"
    )


@pytest.mark.parametrize("order", [FIRST, SECOND], ids=["devil_hf first", "transformers first"])
def test_with_the_package_imported_checkpoints_load_without_trust(order):
    python(order + LOADED)


@dataclass(kw_only=True)
class GreetSettings(JsonSettings):
    name: str = option("whom", positional=True)
    often: int = option("how often", 1)
    loud: bool = option("in capitals", False)

    def validate(self) -> None:
        if self.often < 1:
            raise ValueError("nobody is greeted less than once")


def greet(settings: GreetSettings) -> int:
    text = " ".join([f"hello {settings.name}"] * settings.often)
    show(settings, {"text": text}, text.upper() if settings.loud else text)
    return 3 if settings.loud else 0


@pytest.fixture
def greeting(monkeypatch):
    """A verb that another package registers."""
    list(VERBS)
    monkeypatch.setattr(VERBS, "_entries", dict(VERBS._entries))
    VERBS.register("greet", Verb("greet", "say hello", "devil greet you", lambda: GreetSettings, greet))


def test_a_verb_from_outside_is_one_registration(greeting, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "say hello" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["greet", "--help"])
    assert "how often (default: 1)" in (told := capsys.readouterr().out) and "example:\n  devil greet you" in told


def test_exit_codes_and_where_is_printed_what(greeting, capsys, tmp_path):
    assert main(["greet", "you", "--often", "2", "--json"]) == 0
    assert capsys.readouterr().out == '{"text": "hello you hello you"}\n'
    assert main(["greet", "you", "--loud"]) == 3, "a verb may have an exit code of its own"
    capsys.readouterr()
    assert main(["greet", "you", "--often", "0"]) == 1
    assert capsys.readouterr() == ("", "devil greet: nobody is greeted less than once\n")
    with pytest.raises(ValueError, match="nobody"):
        main(["--debug", "greet", "you", "--often", "0"])
    with pytest.raises(ValueError, match="nobody"):
        main(["greet", "you", "--often", "0", "--debug"])
    for wrong in ([], ["great", "you"], ["greet"], ["greet", "you", "--often", "many"], ["greet", "you", "--quietly"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
    (tmp_path / "greeting.yaml").write_text("name: all\noften: 2\n")
    capsys.readouterr()
    assert main(["greet", "--config", str(tmp_path / "greeting.yaml"), "--often", "1"]) == 0
    assert capsys.readouterr().out == "hello all\n"


@pytest.mark.parametrize(
    "verb", ["ask", "attribute", "audit", "demo", "describe", "knock-out", "neurons", "push", "quickstart", "space", "train"]
)
def test_every_verb_helps_with_an_example(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert f"example:\n  devil {verb}" in capsys.readouterr().out


def test_the_evaluations_are_listed_and_each_helps_with_an_example(capsys):
    subjects = VERBS["evaluate"].subjects()
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    told = capsys.readouterr().out
    assert subjects and all(re.search(rf"^    {name}\s", told, re.M) for name in subjects)
    for name in subjects:
        with pytest.raises(SystemExit, match="0"):
            main(["evaluate", name, "--help"])
        assert f"example:\n  devil evaluate {name}" in capsys.readouterr().out


def documented() -> list[str]:
    """Every command line in the code blocks of README and documentation."""
    root = Path(__file__).parents[2]
    texts = [file.read_text() for file in (root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md"))]
    blocks = [block for text in texts for block in re.findall(r"^ *```(?:bash|sh|console)?\n(.*?)^ *```", text, re.M | re.S)]
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line.partition("devil ")[2] for line in lines if re.match(r"(.* && )?devil [a-z]", line)]
    return sorted({command.partition(" # ")[0].partition(" |")[0].strip() for command in commands})


def test_every_documented_command_line_is_understood():
    commands = documented()
    assert len(commands) > 10
    for command in commands:
        namespace = build_parser().parse_args(shlex.split(command))
        from_namespace(namespace.chosen[1], namespace)


def test_what_excludes_each_other_is_said(capsys):
    assert main(["push", "checkpoint", "user/repo", "--slim", "--self-contained"]) == 1
    assert "exclude each other" in capsys.readouterr().err


def test_names_of_layers_win_over_indices():
    assert read_layers(["-1", "3", "layer1"], ["layer1", "3"]) == [-1, "3", "layer1"]
    assert read_layers(None, ["layer1"]) is None


def test_the_loggers_answer_to_the_verbosity_of_transformers():
    from transformers.utils import logging as verbosity

    import devil_hf.checkpoints.loading  # noqa: F401 - brings files that log

    loggers = [name for name in logging.root.manager.loggerDict if "devil_hf" in name]
    assert loggers and all(name.startswith("transformers.devil_hf") for name in loggers), loggers
    before = verbosity.get_verbosity()
    logger = logging.getLogger("transformers.devil_hf.data.decoding")
    logging.getLogger("transformers.devil_hf").setLevel(logging.NOTSET)
    verbosity.set_verbosity_info()
    assert logger.isEnabledFor(logging.INFO)
    verbosity.set_verbosity_error()
    assert not logger.isEnabledFor(logging.WARNING)
    verbosity.set_verbosity(before)


def test_the_command_line_says_which_package_speaks(greeting, capfd):
    from transformers.utils import logging as verbosity

    verbosity.set_verbosity_warning()
    assert main(["greet", "you"]) == 0
    for name in ("transformers.models.some", "transformers.devil_hf.data.some"):
        record = logging.LogRecord(name, logging.WARNING, "file", 1, "take care", None, None)
        shown = [handler.format(record) for handler in verbosity.get_logger().handlers]
        assert f"[{name.split('.')[1] if 'devil' in name else 'transformers'}] take care" in shown
