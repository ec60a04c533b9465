"""The `devil` command: reads the settings of the chosen verb and runs it; every verb is one call into the library."""

import argparse
import sys
from collections.abc import Sequence
from logging import Formatter, LogRecord
from subprocess import CalledProcessError
from typing import Any

from devil_hf.cli.verb import VERBS, Verb
from devil_hf.extras import explain
from devil_hf.settings import add_options, from_namespace, names_file, understood

EPILOG = "Checkpoints are directories or Hub ids; without one, the shapes-world checkpoint of the package answers."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, that of the verb, or 1 for an error, which is named on stderr. A command line that cannot be read
        ends the process with 2.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = "devil " + next((word for word in words if not word.startswith("-")), "")
    debug = "--debug" in words
    try:
        namespace = build_parser().parse_args(words)
        verb, settings_class, name = namespace.chosen
        settings = from_namespace(settings_class, namespace)
        set_verbosity(namespace.verbose)
        return verb.run(settings) or 0
    except Exception as error:
        if debug or not isinstance(error, _expected()):
            raise
        said = explain(error) if isinstance(error, ImportError) else error
        print(f"{name.strip()}: {said}", file=sys.stderr)
        return 1


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
        if self.verb.subjects is not None:
            subjects = self.add_subparsers(dest="subject", required=True, metavar="SUBJECT", parser_class=_VerbParser)
            for name, subject in self.verb.subjects().items():
                subjects.add_parser(name, help=subject.summary, verb=subject)
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


def _expected() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ImportError, ValueError, TypeError, RuntimeError, StrictDataclassError, CalledProcessError


if __name__ == "__main__":
    sys.exit(main())
