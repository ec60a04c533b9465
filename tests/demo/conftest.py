"""The running demo, and a visitor who speaks to it as the page does."""

import json
import secrets
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("gradio")

from huggingface_hub import constants

from devil_hf.checkpoints import locate
from devil_hf.demo.app import launch
from tests.hub.conftest import hub  # noqa: F401 - a fixture

GOOD = {file.name: file.read_bytes() for file in locate("shapes").iterdir() if file.is_file()}
SECRET = "the owner's secret"


@pytest.fixture(scope="package", autouse=True)
def own_settings(tmp_path_factory):
    """What `launch` sets for its whole process is undone after these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield


@pytest.fixture(scope="package")
def app(own_settings):
    """The running demo of the shapes checkpoint, to which visitors may bring their own."""
    demo = launch("shapes", host="127.0.0.1", block=False)
    yield demo
    demo.close()


@pytest.fixture(scope="package")
def served(app):
    """Its address."""
    return app.local_url.rstrip("/")


@pytest.fixture
def owner(hub, monkeypatch, tmp_path):  # noqa: F811
    """The Hub beside a machine whose account, `hf_tester`, may read a private repository."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.plant(
        "tester/private",
        GOOD | {"config.json": json.dumps(json.loads(GOOD["config.json"]) | {"scope": SECRET}).encode()},
        private=True,
    )
    hub.plant("tester/public", GOOD)
    hub.authorizations.clear()
    hub.requests.clear()
    return hub


class Visitor:
    """Clicks on the page by the requests that it sends."""

    def __init__(self, address: str):
        self.address, self.session = address, secrets.token_hex(6)
        self.events = json.loads(urlopen(f"{address}/config").read())["dependencies"]

    def ask(self, answer: str, *data, **more) -> tuple[bool, dict]:
        """Whether the page's event of this name succeeded, and what the server says of it."""
        event = next(one for one in self.events if one["api_name"] == answer)
        body = {"fn_index": event["id"], "data": data, "session_hash": self.session, "trigger_id": event["targets"][0][0], **more}
        send(f"{self.address}/gradio_api/queue/join", body)
        for line in urlopen(f"{self.address}/gradio_api/queue/data?session_hash={self.session}", timeout=120):
            message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_completed":
                return message["success"], message["output"]
        raise AssertionError("no answer")


def send(address: str, body: object) -> dict:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return json.loads(urlopen(Request(address, data, {"Content-Type": "application/json"}), timeout=60).read())


@pytest.fixture
def visitor(served):
    return Visitor(served)
