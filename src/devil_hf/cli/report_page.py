"""`devil report page`, or `devil report CHECKPOINT IMAGES`: sentences about many images on one page."""

from devil_hf.cli.report import REPORTS
from devil_hf.cli.verb import Verb, show


def page_settings() -> type:
    """The settings of the page, which stand with the work."""
    from devil_hf.report.page import PageSettings

    return PageSettings


def page(settings) -> None:
    """Write the page, and print what stands in it."""
    from devil_hf.evaluation.evaluator import evaluate
    from devil_hf.report.page import PAGE, Page

    evaluation = evaluate(Page, settings)
    if evaluation is not None:
        written = str(settings.output_dir / PAGE)
        show(settings, evaluation.as_record() | {"page": written}, f"{evaluation.text}\n\npage: {written}")


REPORTS.register(
    "page",
    Verb(
        "page",
        "write one page of sentences, where their words come from, and controls; it opens from disk",
        "devil report page user/devil-resnet50-opt125m photos/ --output-dir report",
        page_settings,
        page,
        long=True,
    ),
)
