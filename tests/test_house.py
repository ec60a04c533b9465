"""The laws of the house (CONTRIBUTING.md), read from the syntax trees of the source."""

import ast
import fnmatch
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "devil_hf"
FILES = sorted(SOURCE.rglob("*.py"))
TOP = "top"  # files in the package's root: what every room may use
# Rooms may import from their own floor and from those below, and no two rooms from each other.
FLOORS = [
    {"model"},
    {"checkpoints"},
    {"build", "baselines", "data"},
    {"training", "evaluation", "questions"},
    {"report"},
    {"demo", "hub"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ABOVE_ALL = {"__init__.py", "__main__.py", "registration.py"}  # they tell Python and transformers what there is
EXTRA_PACKAGES = {
    "accelerate", "datasets", "peft", "pycocotools", "braceexpand", "tensorboard", "evaluate", "scipy", "sklearn", "tabulate",
    "pycocoevalcap", "bert_score", "pytorch_grad_cam", "gradio", "gradio_client", "pandas", "pyarrow", "matplotlib", "fsspec",
}  # fmt: skip
CORE = {TOP, "model", "checkpoints", "build", "baselines", "questions", "hub", "cli"}
LONGEST_FILE, LONGEST_FUNCTION, README_LINES = 500, 60, 150


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def room(file: Path) -> str:
    parts = file.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else TOP


def imported(node: ast.AST, file: Path) -> list[str]:
    """Dotted names of the modules that a statement imports; of `from a import b` also `a.b`, which may be one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ["devil_hf", *file.relative_to(SOURCE).parent.parts]
    start = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join([*start, *([node.module] if node.module else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def all_imports(file: Path) -> list[str]:
    return [name for node in ast.walk(tree(file)) for name in imported(node, file)]


def imports_when_imported(file: Path) -> list[str]:
    """Modules that are imported as soon as a file is: not in functions, not for type checkers, not if they may be missing."""
    found, nodes = [], list(tree(file).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and {"TYPE_CHECKING", "is_peft_available()"} & {ast.unparse(node.test)}:
            nodes += node.orelse
            continue
        if isinstance(node, ast.stmt):
            found += imported(node, file)
        nodes += ast.iter_child_nodes(node)
    return found


def own_file(module: str) -> Path | None:
    """The file of a module of this package."""
    path = SOURCE.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def room_arrows() -> dict[tuple[str, str], list[str]]:
    """Pairs of rooms (who imports, what is imported), with the places."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for file in FILES:
        for name in all_imports(file):
            parts = name.split(".")
            if (file.parent == SOURCE and file.name in ABOVE_ALL) or parts[0] != "devil_hf" or len(parts) < 2:
                continue
            if parts[1] in FLOOR and parts[1] != room(file):
                arrows.setdefault((room(file), parts[1]), []).append(f"{file.relative_to(SOURCE)} imports {name}")
    return arrows


def test_arrows_run_downwards_only():
    arrows = room_arrows()
    up = [place for (own, other), places in arrows.items() if FLOOR.get(own, -1) < FLOOR[other] for place in places]
    both = [place for (own, other), places in arrows.items() if (other, own) in arrows for place in places]
    assert not up + both, "\n".join(up + both)


def test_the_model_knows_nothing_else_of_the_package():
    wrong = [
        f"{file.name}: {name}"
        for file in (SOURCE / "model").glob("*.py")
        for name in all_imports(file)
        if name.startswith("devil_hf") and not name.startswith("devil_hf.model")
    ]
    assert not wrong


def test_private_names_of_the_model_are_used_by_the_model_only():
    wrong = []
    for file in [*FILES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "space").glob("*.py")]:
        if SOURCE in file.parents and room(file) == "model":
            continue
        for node in ast.walk(tree(file)):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if private and ast.unparse(node.value).split(".")[-1] in ("model", "explainer", "translator", "backbone"):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("devil_hf.model"):
                wrong += [f"{file.relative_to(ROOT)}: {a.name}" for a in node.names if a.name.startswith("_")]
    assert not wrong, "\n".join(wrong)


def test_no_file_and_no_function_is_too_long():
    wrong = []
    for file in FILES:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_FILE:
            wrong.append(f"{file.relative_to(SOURCE)}: {lines} lines")
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    wrong.append(f"{file.relative_to(SOURCE)}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def names_no_encoding(node: ast.AST) -> bool:
    """Whether a call opens text as the locale has it."""
    if not isinstance(node, ast.Call) or {"encoding", None} & (words := {word.arg for word in node.keywords}):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    given = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
    modes = [one.value for one in given if isinstance(one, ast.Constant) and re.fullmatch("[rwaxbt+]+", str(one.value))]
    if name == "open":
        opens = isinstance(node.func, ast.Name) or modes or "newline" in words
        return bool(opens) and not any("b" in mode for mode in modes)
    method = isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text")
    return method or (name in ("run", "Popen", "check_output") and "text" in words)


def test_whoever_opens_text_says_that_it_is_utf8():
    """Else a locale (Windows, LC_ALL=C) would decide; `devil_hf.text_files` reads what users bring."""
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node):.80}"
        for file in [*FILES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "space").glob("*.py")]
        for node in ast.walk(tree(file))
        if names_no_encoding(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_decides():
    assert not [str(file.relative_to(SOURCE)) for file in FILES if not ast.get_docstring(tree(file))]


def test_rooms_have_names_of_their_own():
    assert {room(file) for file in FILES} <= {TOP, *FLOOR}
    assert not [file for file in FILES if {"utils", "common", "helpers", "misc"} & {file.stem, *file.parts}]


def test_the_readme_is_a_page_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert not [link for link in links if "://" not in link and not (ROOT / link.partition("#")[0]).is_file()]


def test_the_core_imports_nothing_of_the_extras():
    """What loading and asking import, directly or not, before any function runs."""
    waiting = [file for file in FILES if room(file) in CORE and file.name != "notebook.py"]
    seen, wrong = set(waiting), []
    while waiting:
        file = waiting.pop()
        for name in imports_when_imported(file):
            if name.split(".")[0] in EXTRA_PACKAGES:
                wrong.append(f"{file.relative_to(SOURCE)} imports {name}")
            own = own_file(name) if name.startswith("devil_hf.") else None
            if own is not None and own not in seen:
                seen.add(own)
                waiting.append(own)
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_core_dependencies_are_what_loading_and_asking_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {line.partition(">")[0] for line in project["dependencies"]}
    needed = {"torch", "torchvision", "transformers", "huggingface_hub", "timm", "safetensors", "numpy", "pillow"}
    assert needed <= names <= needed | {"pyyaml", "tqdm", "jinja2"}


def test_help_imports_neither_torch_nor_transformers():
    program = (
        "import sys, devil_hf.cli.main as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join(sorted({'torch', 'transformers', 'datasets', 'gradio'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", ".pre-commit-config.yaml"])
def test_the_project_says_how_it_is_run(name):
    assert (ROOT / name).is_file()


def test_no_folder_of_tests_is_passed_over(request):
    folders = {part for file in (ROOT / "tests").rglob("test_*.py") for part in file.relative_to(ROOT).parts[:-1]}
    passed_over = request.config.getini("norecursedirs")
    assert not [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in passed_over)]
