"""What a store refuses, loses or has already, against a real server and a proxy before it."""

import logging
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.trainer.mlflow_server import Server, proxy, wait_for
from tests.trainer.test_tracking import points, start
from trainer.delivery import Delivery
from trainer.journal import Journal

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


def test_a_proxy_that_refuses_everything_costs_nothing(server: Server, tmp_path: Path) -> None:
    status = 0
    with proxy(server.uri, lambda method, path, size: status) as uri:
        run = start(uri, tmp_path, journal=tmp_path / "tracking")
        run_id = run.opened()
        run.log_metrics({"loss": 1.0}, 0)
        wait_for(lambda: points(server.uri, run_id, "loss") != [], "the first point")
        status = 400
        for step in range(1, 10):
            run.log_metrics({"loss": 1.0}, step)
        run.log_text("hello", "a.txt")
        assert run.finish(wait_s=1.0) >= 10
        status = 0
        found = Journal(tmp_path / "tracking")
        Delivery(found).deliver()
    assert found.left() == [] and len(points(server.uri, run_id, "loss")) == 10


def test_another_store_is_told_nothing_of_a_run_that_it_does_not_hold(server: Server, tmp_path: Path) -> None:
    folder, other = tmp_path / "tracking", f"sqlite:///{tmp_path}/other.db"
    run = start(server.uri, tmp_path, journal=folder, under=["group"])
    run.opened()
    assert run.finish() == 0
    found = Journal(folder)  # of a job that starts again, and ends before it has delivered anything
    again = {**run._opening, "kind": "open", "run": "", "at": 1, "user": "me"}
    found.append([again, {"kind": "metrics", "run": "", "at": 2, "step": 1, "values": {"loss": 1.0}}])
    with pytest.raises(LookupError, match=f"does not hold MLflow run {run.id}.*sync --drop-missing"):
        Delivery(found, other).deliver()
    assert len(found.left()) == 2 and MlflowClient(other).get_experiment_by_name("distillation") is None
    Delivery(found).deliver()
    assert found.left() == [] and points(server.uri, run.id, "loss") == [(1, 1.0)]


def test_a_resumed_run_whose_journal_is_gone_counts_on_and_may_go_back(tmp_path: Path) -> None:
    folder, uri = tmp_path / "tracking", f"sqlite:///{tmp_path}/mlflow.db"

    def job(run_id: str | None, name: float, *steps: int) -> str:
        """Log these steps, with a rollback where they go back; the values say whose they are."""
        sample = {"kind": "metrics", "run": "", "at": 0, "step": None, "values": {"system/cpu": name}}
        due = [sample] * 6
        run = start(
            uri, tmp_path, journal=folder, run_id=run_id, sample=lambda: [due.pop() for _ in range(len(due))]
        )
        for before, step in pairwise((-1, *steps)):
            if step < before:
                run.log_again(step - 1)
                name += 1
            run.log_metrics({"loss": name}, step)
        assert run.finish() == 0 and run.id is not None
        shutil.rmtree(folder)
        return run.id

    run_id = job(None, 1.0, *range(20))
    job(run_id, 2.0, *range(15, 25), *range(8, 12), *range(10, 13))
    cpu = points(uri, run_id, "system/cpu")
    assert cpu == [(step, 1.0) for step in range(6)] + [(step, 2.0) for step in range(6, 12)]
    logged = {1.0: range(20), 2.0: range(20, 25), 3.0: range(8, 12), 4.0: range(10, 13)}
    expected = sorted((step, name) for name, steps in logged.items() for step in steps)
    assert points(uri, run_id, "loss") == expected
