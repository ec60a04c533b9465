"""`devil report`: pages and figures of what a checkpoint knows, one subject each.

A file of this room, or of another package, adds one: `REPORTS.register("mine", Verb("mine", ...))`.
"""

from devil_hf.cli.verb import VERBS, Verb
from devil_hf.registry import Registry

REPORTS: Registry[Verb] = Registry("report", "devil_hf.cli")

VERBS.register(
    "report",
    Verb(
        "report",
        "show what a checkpoint knows, as figures and pages; `devil report CHECKPOINT IMAGES` writes the page",
        "devil report user/devil-resnet50-opt125m photos/ --output-dir report",
        subjects=lambda: REPORTS,
        usual="page",
    ),
)
