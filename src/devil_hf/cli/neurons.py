"""`devil neurons`: a name for every unit of a network, a check of the names, and an atlas."""

from devil_hf.cli.verb import VERBS, Verb, show


def settings() -> type:
    """The settings, which stand with the work."""
    from devil_hf.report.neurons import NeuronsSettings

    return NeuronsSettings


def run(settings) -> None:
    """Run a stage, or all of them, and print the summary."""
    from devil_hf.report.neurons import neurons

    summary = neurons(settings)
    show(settings, summary, "\n".join(f"{name}: {value}" for name, value in summary.items()))


VERBS.register(
    "neurons",
    Verb(
        "neurons",
        "name every unit of a network, check the names, write an atlas",
        "devil neurons photos/ --output-dir atlas --checkpoint user/devil-resnet50-opt125m --layers layer4",
        settings,
        run,
        long=True,
    ),
)
