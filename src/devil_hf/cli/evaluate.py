"""`devil evaluate`: what a checkpoint says, measured against ground truth."""

from collections.abc import Mapping
from functools import partial

from devil_hf.cli.verb import VERBS, Verb


def subjects() -> Mapping[str, Verb]:
    """The evaluations: every entry of the registry of evaluators."""
    from devil_hf.evaluation.evaluator import EVALUATORS, run_and_print

    return {
        name: Verb(name, one.summary, one.example, partial(getattr, one, "Settings"), partial(run_and_print, name))
        for name, one in EVALUATORS.items()
    }


VERBS.register(
    "evaluate",
    Verb(
        "evaluate",
        "measure a checkpoint against ground truth",
        "devil evaluate shapes CHECKPOINT",
        subjects=subjects,
    ),
)
