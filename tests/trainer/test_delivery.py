"""What a store refuses, loses or has already, against a real server and a proxy before it."""

import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.trainer.mlflow_server import Server, proxy
from tests.trainer.test_tracking import points, start

pytestmark = pytest.mark.usefixtures("promptly")


@pytest.mark.parametrize("status", [413, 415, 422])
def test_a_file_that_a_proxy_refuses_holds_no_later_one_up(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """As nginx does with what is larger than 1 MB."""
    with (
        caplog.at_level(logging.WARNING),
        proxy(server.uri, lambda method, path, size: status * (size > 1 << 20)) as uri,
    ):
        run = start(uri, tmp_path)
        run.log_text("x" * (1 << 21), "large.txt")
        run.log_text("hello", "small.txt")
        run.log_metrics({"loss": 1.0}, 1)
        assert run.finish() == 0
    assert "MLflow refuses text large.txt for good" in caplog.text and caplog.text.count("refuses") == 1
    assert run.id is not None
    assert [file.path for file in MlflowClient(server.uri).list_artifacts(run.id)] == ["small.txt"]
    assert points(server.uri, run.id, "loss") == [(1, 1.0)]
