"""The `devil` command: reads the settings of the chosen verb and runs it; every verb is one call into the library.

This is the one place where errors end. What a user, his files, his disk and the network can cause is one line that names it; a
fault of this package keeps its traceback, and says where to report it.
"""

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from linecache import getline
from logging import Formatter, LogRecord
from pathlib import Path
from traceback import walk_tb
from typing import Any

from devil_hf import __version__
from devil_hf.cli.verb import VERBS, Verb
from devil_hf.extras import explain
from devil_hf.folders import is_full
from devil_hf.settings import add_options, from_namespace, names_file, understood

INTERRUPTED, NOBODY_READS = 130, 141  # 128 and the number of the signal, as shells have it
LONGEST_LINE = 2_000  # characters of an error that are shown
# Errors of other packages that are no OSError, ImportError, ValueError or RuntimeError, by module; they are looked up where they
# could have been raised, so that nothing is imported for it.
FOREIGN = {
    "huggingface_hub.errors": ("StrictDataclassError",),
    "httpx": ("HTTPError", "InvalidURL"),
    "httpx2": ("HTTPError", "InvalidURL"),  # of huggingface_hub from 2.0 on
    "requests": ("RequestException",),
    "safetensors": ("SafetensorError",),
    "datasets.exceptions": ("DatasetsError",),
    "datasets.builder": ("DatasetGenerationError",),
    "pyarrow.lib": ("ArrowException",),
    "tarfile": ("TarError",),
    "zlib": ("error",),
    "zipfile": ("BadZipFile",),
    "pickle": ("PickleError",),
    "yaml": ("YAMLError",),
    "PIL.Image": ("DecompressionBombError",),
    "xml.etree.ElementTree": ("ParseError",),
    "subprocess": ("CalledProcessError",),
}
PACKAGE = Path(__file__).parents[1]
# New objects after which Python looks for dead ones: a start makes half a million, which stay; and from then on. At its own 700
# it spends a fifth of a start on that.
STARTED, COLLECTED = 1_000_000, 50_000
# What RuntimeErrors of torch say that the machine causes, and no shape.
OF_THE_MACHINE = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "_alloc_failed",
    "cuda error",
    "cudnn",
    "nccl",
    "driver",
)
EPILOG = "Checkpoints are directories, Hub ids, or the package's own: `photos`, which answers where none is named, and `shapes`."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, that of the verb, or 1 for an error, which is named on stderr; 130 when it was interrupted, and 141 when
        nobody reads what it prints. A command line that cannot be read ends the process with 2.

    Raises:
        Exception: a fault of this package, and with `--debug` every error.
    """
    if argv is None:  # a process of its own, which imports thousands of modules that all stay
        gc.set_threshold(STARTED, *gc.get_threshold()[1:])
        gc.callbacks.append(_search_often)
        atexit.register(gc.freeze)  # or they would all be searched several times once more before they go
    words = list(sys.argv[1:] if argv is None else argv)
    name = "devil " + next((word for word in words if not word.startswith("-")), "")
    chosen: list[argparse.Namespace] = []
    debug = "--debug" in words
    code = bounded(name.strip(), lambda: chosen.append(build_parser().parse_args(words)), debug)
    return bounded(chosen[0].chosen[2], lambda: _run(chosen[0]), debug) if chosen else code


def _search_often(*_: Any) -> None:
    """Search for dead objects often from now on: where long work begins, or at the first search, which says that it is long."""
    if gc.get_threshold()[0] == STARTED:
        gc.set_threshold(COLLECTED, *gc.get_threshold()[1:])


def _run(namespace: argparse.Namespace) -> int | None:
    verb, settings_class, _ = namespace.chosen
    settings = from_namespace(settings_class, namespace)
    set_verbosity(namespace.verbose)
    if verb.long:
        _search_often()
    return verb.run(settings)


def bounded(name: str, work: Callable[[], int | None], debug: bool = False) -> int:
    """Do the work of a verb or a script, where its errors end.

    Args:
        name: of the command, for the line that names the error.
        debug: let errors through.

    Returns:
        The exit code, see `main`.
    """
    try:
        code = work() or 0
        sys.stdout.flush()  # a full disk or a closed pipe is noticed here, and not by the interpreter at its end
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        _close_progress_bars()
        print(f"\n{name}: interrupted; what was written is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # of an output that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush
        return NOBODY_READS
    except Exception as error:
        if not is_expected(error):
            error.add_note(f"This is a fault of devil-hf {__version__}: please report it, with these lines, to its repository")
        if debug or not is_expected(error):
            raise
        _close_progress_bars()
        print(f"{name}: {told(error)}", file=sys.stderr)
        return 1


def _close_progress_bars() -> None:
    """Let bars of work that ended in an error draw their last line now: they would do so behind the message that names it."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def build_parser() -> argparse.ArgumentParser:
    """The parser, in which every verb reads its settings when it is chosen."""
    parser = argparse.ArgumentParser(prog="devil", description="Ask a vision model what it sees.", epilog=EPILOG)
    _add_global_options(parser, False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_VerbParser)
    for verb in VERBS.values():
        verbs.add_parser(verb.name, help=verb.summary, verb=verb)
    return parser


def _add_global_options(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
    parser.add_argument("--verbose", action="store_true", default=default, help="say more of what is done")


class _VerbParser(argparse.ArgumentParser):
    """The parser of a verb, whose settings are imported when it is the one chosen."""

    def __init__(self, verb: Verb, **options: Any):
        super().__init__(
            description=verb.summary[0].upper() + verb.summary[1:] + ".",
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.verb = verb

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        words = list(args or [])
        if self.verb.notes is not None:
            self.epilog = f"{self.verb.notes()}\n\nexample:\n  {self.verb.example}"
        if self.verb.subjects is not None:
            subjects = self.add_subparsers(dest="subject", required=True, metavar="SUBJECT", parser_class=_VerbParser)
            members = self.verb.subjects()
            for name, subject in members.items():
                subjects.add_parser(name, help=subject.summary, verb=subject)
            if self.verb.usual and words and words[0] not in (*members, "-h", "--help"):
                words.insert(0, self.verb.usual)
        else:
            settings_class = self.verb.settings()  # type: ignore[misc]
            words = understood(settings_class, words)
            add_options(self, settings_class, relaxed=names_file(words))
            _add_global_options(self, argparse.SUPPRESS)
            self.set_defaults(chosen=(self.verb, settings_class, self.prog))
        return super().parse_known_args(words, namespace)


def set_verbosity(verbose: bool) -> None:
    """How much is said: transformers' verbosity (TRANSFORMERS_VERBOSITY) governs, `--verbose` adds what this package tells."""
    from transformers.utils import logging

    logging.get_logger("transformers.devil_hf").setLevel(logging.INFO if verbose else logging.NOTSET)
    for handler in logging.get_logger().handlers:
        handler.setFormatter(_Named())
    logging.disable_progress_bar()  # of loading weights; what takes long shows its own


class _Named(Formatter):
    """Says which of the two packages speaks."""

    def format(self, record: LogRecord) -> str:
        library, _, rest = record.name.partition(".")
        return f"[{rest.partition('.')[0] if rest.startswith('devil_hf') else library}] {super().format(record)}"


def is_expected(error: BaseException) -> bool:
    """Whether a user, his files, his disk or the network may cause an error; else it is a fault of this package.

    What nobody has written a sentence for tells nothing to a user: a call or an operator that went wrong in code of this package
    (`int("")`, an unpacking), and an operator of torch on shapes that do not fit.
    """
    if isinstance(error, RecursionError | NotImplementedError):
        return False
    if isinstance(error, TypeError):
        return _is_raised_by_statement(error)
    if type(error) is ValueError and _is_raised_in(error, PACKAGE):  # not of texts that a terminal cannot show, of damaged JSON
        return _is_raised_by_statement(error)
    if type(error) is RuntimeError and _is_raised_in(error, PACKAGE, *_operators()):
        return _is_raised_by_statement(error) or is_full(error) or any(text in str(error).lower() for text in OF_THE_MACHINE)
    if type(error) is Exception:  # of packages written in Rust, such as tokenizers, for files that they cannot read
        return True
    return isinstance(error, (OSError, ImportError, ValueError, RuntimeError, MemoryError, EOFError, *_foreign()))


def _is_raised_by_statement(error: BaseException) -> bool:
    *_, (frame, line) = walk_tb(error.__traceback__)
    return getline(frame.f_code.co_filename, line).lstrip().startswith("raise")


def _is_raised_in(error: BaseException, *folders: Path) -> bool:
    *_, (frame, _) = walk_tb(error.__traceback__)
    return any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in folders)


def _operators() -> list[Path]:
    """Where torch's operators are called, and no file is read."""
    torch = sys.modules.get("torch")
    return [Path(str(torch.__file__)).with_name(name) for name in ("nn", "functional.py", "_tensor.py")] if torch else []


def _foreign() -> Iterator[type[BaseException]]:
    for module, names in FOREIGN.items():
        for name in names if module in sys.modules else ():
            if kind := getattr(sys.modules[module], name, None):
                yield kind


def told(error: BaseException) -> str:
    """An error in one line that is not too long."""
    said = explain(error) if isinstance(error, ImportError) else str(error)
    line = " ".join(said.split()) or type(error).__name__
    if isinstance(error, MemoryError):
        line = f"there is not enough memory ({line})"
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ... (--debug shows the rest)"


if __name__ == "__main__":
    sys.exit(main())
