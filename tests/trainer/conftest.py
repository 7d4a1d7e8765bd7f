"""Fixtures of this room: a real MLflow server."""

from collections.abc import Iterator

import pytest

from tests.trainer.mlflow_server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the module's own, over SQLite."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()
