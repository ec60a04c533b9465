"""`devil audit`: claims about what a network carries, from a file, judged for a CI: exit code, JUnit XML, and a page."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from devil_hf.cli.verb import VERBS, Verb, show
from devil_hf.settings import ModelSettings, option

FAILED = 1  # exit code
WIDE = 12  # letters for a key


def notes() -> str:
    """The keys of the file, as `devil_hf.questions.audit_file` has them, and the exit codes."""
    from devil_hf.questions.audit_file import AuditFile, Check, Control

    told = []
    for kind, heading in ((AuditFile, "file"), (Check, "each of `checks`"), (Control, "its `control`")):
        told.append(f"keys of {heading}:")
        told += [f"  {one.name:<{WIDE}}{one.metadata['help']}" for one in fields(kind)]
    codes = "exit codes: 0 where every claim holds, 1 where one does not, and for what cannot be audited"
    return "\n".join([*told, "", "folders and files are relative to FILE", "", codes])


@dataclass(kw_only=True)
class AuditSettings(ModelSettings):
    """What `devil audit` does."""

    file: Path = option("YAML file of checks", positional=True)
    junit: Path | None = option("write the verdicts as JUnit XML, which CI servers read, into this file", None)
    html: Path | None = option("write a page with figures and the worst images into this file", None)


def audit(settings: AuditSettings) -> int:
    """Judge every check, print and write the verdicts; 1 where a claim does not hold."""
    from devil_hf.checkpoints.loading import open_checkpoint
    from devil_hf.folders import written
    from devil_hf.questions.audit_file import read_audits
    from devil_hf.report.audit import audit_page, junit_xml
    from devil_hf.report.templates import one_line

    if not settings.file.is_file():
        raise FileNotFoundError(f"there is no file {settings.file}: name a YAML file of checks")
    for file in filter(None, (settings.junit, settings.html)):
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder: name a file in it")
    if settings.junit is not None and settings.html is not None and settings.junit.resolve() == settings.html.resolve():
        raise ValueError(f"--junit and --html are both {settings.html}: name two files")
    named, planned = read_audits(settings.file)
    own = settings.checkpoint or named
    if own is None:
        raise ValueError(
            f"{settings.file} names no network: write `checkpoint: DIRECTORY_OR_HUB_ID` into it, or give --checkpoint"
        )
    names = dict.fromkeys([own, *(one.checkpoint or own for one in planned)])
    opened = {name: open_checkpoint(name, settings.device, settings.quantize) for name in names}
    networks = [(opened[own], opened[one.checkpoint or own]) for one in planned]
    for one, pair in zip(planned, networks, strict=True):
        one.check(*pair)
    found = [one.answer(*pair) for one, pair in zip(planned, networks, strict=True)]
    found = [replace(one, checkpoint=str(own)) for one in found]
    failed = sum(not one.passed for one in found)
    lines = [f"{'passed' if one.passed else 'FAILED'}  {one_line(one.message)}" for one in found]
    show(settings, [one.as_record() for one in found], "\n".join([*lines, f"{len(found)} checks, {failed} failed"]))
    title, pages = settings.file.name, {}
    if settings.junit is not None:
        pages[settings.junit] = junit_xml(title, found)
    if settings.html is not None:
        pages[settings.html] = audit_page(title, found, [one.asked for one in planned])
    for file, text in pages.items():
        with written(file) as unfinished:
            unfinished.write_text(text, encoding="utf-8", errors="replace")  # names of files need not be text
    return FAILED if failed else 0


VERBS.register(
    "audit",
    Verb(
        "audit",
        "judge claims about what a network carries, and what it must not",
        "devil audit audit.yaml --junit audit.xml --html audit.html",
        lambda: AuditSettings,
        audit,
        notes=notes,
    ),
)
