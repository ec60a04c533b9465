"""What the site makes from the code: the start page, one API page per room, the options of every verb, what is registered.

Two comments in a page are replaced:

* `<!-- verb: evaluate maps -->` by example and settings of a verb of `devil`;
* `<!-- registry: devil_hf.data.pairs:PAIR_SOURCES -->` by the names of a registry, each with the first line of its docstring.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from devil_hf.cli.verb import VERBS
from devil_hf.settings import markdown_table

ROOT = Path(__file__).parents[1]
COPIES = {"index.md": "README.md", "changes.md": "CHANGELOG.md", "contribute.md": "CONTRIBUTING.md"}
NOT_PAGES = {"LICENSE", "CITATION.cff", "pyproject.toml"}
ROOMS = {
    "model": "Model: what travels with a checkpoint",
    "build": "Build: a model from a network and a language model",
    "baselines": "Baselines: ClipCap, ClipCap-MLP, LiMBeR",
    "data": "Data: worlds, captioned images, objects, exemplars",
    "training": "Training: recipes, trainer, caches",
    "evaluation": "Evaluation: one contract, its instances, statistics",
    "questions": "Questions: what one asks of a trained model",
    "report": "Report: figures, tables, pages, the atlas",
    "hub": "Hub: publish, cards, Spaces",
    "demo": "Demo: the app",
    "cli": "Verbs: one file each",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a page of the reference for every room to the navigation."""
    reference = next(section["Reference"] for section in config.nav if "Reference" in section)
    reference += [{title.partition(":")[0]: f"reference/{room}.md"} for room, title in ROOMS.items()]
    reference.append({"Settings and registries": "reference/root.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, not written."""
    pages = {page: site_links((ROOT / source).read_text(encoding="utf-8")) for page, source in COPIES.items()}
    pages |= {f"reference/{room}.md": api_page(title, f"devil_hf.{room}") for room, title in ROOMS.items()}
    pages["reference/root.md"] = "# Settings, registries, extras\n\n" + "\n\n".join(
        f"::: devil_hf.{name}" for name in modules("devil_hf", packages=False)
    )
    pages["reference/command_line.md"] = command_line_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Replace the comments that stand for tables."""
    markdown = re.sub(r"<!-- verb: ([\w -]+) -->", lambda match: verb_table(match[1]), markdown)
    return re.sub(r"<!-- registry: ([\w.]+):(\w+) -->", lambda match: registry_table(match[1], match[2]), markdown)


def site_links(text: str) -> str:
    """Links of a file in the repository's root, as the site has them."""
    for page, source in COPIES.items():
        text = text.replace(f"]({source})", f"]({page})")
    for name in NOT_PAGES:
        text = re.sub(rf"\[([^\]]+)\]\({re.escape(name)}\)", r"\1", text)
    return text.replace("](docs/", "](").replace('src="docs/', 'src="')


def modules(package: str, packages: bool = True) -> list[str]:
    """Names of a package's modules, relative to it, those of its folders included."""
    path = importlib.import_module(package).__path__
    if not packages:
        return [module.name for module in pkgutil.iter_modules(path) if not module.ispkg]
    found = [module for module in pkgutil.walk_packages(path, f"{package}.") if not module.ispkg]
    return [module.name.removeprefix(f"{package}.") for module in found if ".hub_metrics." not in module.name]


def api_page(title: str, package: str) -> str:
    """A page with every public class and function of a room, from their docstrings."""
    about = inspect.getdoc(importlib.import_module(package)) or ""
    return f"# {title}\n\n{about}\n\n" + "\n\n".join(f"::: {package}.{name}" for name in modules(package))


def command_line_page() -> str:
    """Every verb with its example and its settings; members of a group, such as the evaluators, each on their own."""
    text = "# Command line\n\nOptions have hyphens; underscores are understood. `--config FILE` reads settings from YAML.\n"
    for name, verb in VERBS.items():
        text += f"\n## devil {name}\n\n{verb_table(name)}"
        for member in verb.subjects() if verb.subjects else ():
            text += f"\n### devil {name} {member}\n\n{verb_table(f'{name} {member}')}"
    return text


def verb_table(name: str) -> str:
    """Summary, example and settings of a verb, or of a member of a group (`evaluate maps`)."""
    group, _, member = name.partition(" ")
    verb = VERBS[group].subjects()[member] if member else VERBS[group]
    table = markdown_table(verb.settings()) if verb.settings else ""
    return f"{verb.summary[:1].upper()}{verb.summary[1:]}.\n\n```bash\n{verb.example}\n```\n\n{table}\n"


def registry_table(module: str, name: str) -> str:
    """Names of a registry, each with what it is."""
    registry = getattr(importlib.import_module(module), name)
    rows = [f"| `{key}` | {first_line(entry)} |" for key, entry in registry.items()]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def first_line(entry: object) -> str:
    """The first line of what an entry says of itself."""
    return (getattr(entry, "summary", None) or inspect.getdoc(entry) or "").partition("\n")[0]
