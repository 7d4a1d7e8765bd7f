"""Fixtures of this room: a real MLflow server, and tracking without its pauses."""

from collections.abc import Iterator

import pytest

from tests.trainer.mlflow_server import Server
from trainer import delivery, outbox


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the module's own, over SQLite."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def promptly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracking that delivers at once, to where it is told: nothing comes from the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(outbox, "SEND_EVERY_S", 0.2)
    monkeypatch.setattr(delivery, "SETTLE_S", 0.2)
