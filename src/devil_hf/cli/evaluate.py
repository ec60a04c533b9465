"""`devil evaluate`: what a checkpoint says, measured against ground truth."""

from collections.abc import Mapping
from functools import partial

from devil_hf.cli.verb import VERBS, Verb


def subjects() -> Mapping[str, Verb]:
    """The evaluations: every entry of the registry of evaluators."""
    from devil_hf.evaluation.evaluator import EVALUATORS, run_and_print

    found = {}
    for name, one in EVALUATORS.items():
        summary = one.summary if name == one.name else f"the same as {one.name}"
        example = one.example.replace(f"evaluate {one.name}", f"evaluate {name}", 1)
        found[name] = Verb(name, summary, example, partial(getattr, one, "Settings"), partial(run_and_print, name), long=True)
    return found


VERBS.register(
    "evaluate",
    Verb("evaluate", "measure a checkpoint against ground truth", "devil evaluate shapes CHECKPOINT", subjects=subjects),
)
