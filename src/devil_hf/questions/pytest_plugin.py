"""Audits in pytest: one option and two fixtures, there in every session once devil-hf is installed (entry point `pytest11`).

```python
def test_the_network_does_not_read_the_hospital_tag(devil_audit):
    devil_audit.assert_not_encoded("a hospital tag", tagged, untagged, layers="layer4")
```

`pytest --devil-checkpoint user/devil-chest` says whose features are asked; a project writes it into a fixture of its own, of the
name `devil_checkpoint`, which is how several networks are audited, too. Nothing heavy is imported before a test asks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from devil_hf.model.modeling_devil import DevilModel
    from devil_hf.model.processing_devil import DevilProcessor
    from devil_hf.questions.audit import Finding


@dataclass(frozen=True)
class Auditor:
    """The questions of `devil_hf.questions.audit` about one checkpoint, whose first two arguments are `model` and `processor`."""

    model: "DevilModel"
    processor: "DevilProcessor"

    def assert_encoded(self, phrase: str, *images: Any, **options: Any) -> "Finding":
        """See `devil_hf.questions.audit.assert_encoded`."""
        from devil_hf.questions.audit import assert_encoded

        return assert_encoded(self.model, self.processor, phrase, *images, **options)

    def assert_not_encoded(self, phrase: str, *images: Any, **options: Any) -> "Finding":
        """See `devil_hf.questions.audit.assert_not_encoded`."""
        from devil_hf.questions.audit import assert_not_encoded

        return assert_not_encoded(self.model, self.processor, phrase, *images, **options)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The checkpoint that is asked."""
    told = "directory or Hub id of the DeViL checkpoint that the fixture devil_audit asks (default: photos, a shipped one)"
    parser.getgroup("devil").addoption("--devil-checkpoint", metavar="CHECKPOINT", help=told)


@pytest.fixture(scope="session")
def devil_checkpoint(request: pytest.FixtureRequest) -> str | None:
    """Name of the checkpoint; None is that of photographs, see `locate`."""
    return request.config.getoption("--devil-checkpoint")


@pytest.fixture(scope="session")
def devil_auditor() -> Callable[[str | None], Auditor]:
    """Opens checkpoints by name, each once a session."""
    opened: dict[str | None, Auditor] = {}

    def auditor(checkpoint: str | None) -> Auditor:
        from devil_hf.checkpoints.loading import load

        if checkpoint not in opened:
            opened[checkpoint] = Auditor(*load(checkpoint))
        return opened[checkpoint]

    return auditor


@pytest.fixture
def devil_audit(devil_auditor: Callable[[str | None], Auditor], devil_checkpoint: str | None) -> Auditor:
    """`assert_encoded` and `assert_not_encoded` of the checkpoint."""
    return devil_auditor(devil_checkpoint)
