"""Outages against a real server: servers and jobs that are killed, at the start, meanwhile, both."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as StoredRun

from tests.launcher.conftest import ROOT
from tests.trainer.mlflow_server import Server, wait_for
from tests.trainer.test_tracking import points, start
from tests.trainer.tracked_worker import LAST

pytestmark = pytest.mark.usefixtures("promptly")


def job(uri: str, folder: Path, first: int, last: int, *under: str) -> subprocess.Popen[str]:
    """A job of its own process; what it says is read from ``stdout``."""
    arguments = [uri, str(folder), str(first), str(last), *under]
    command = [sys.executable, "-m", "tests.trainer.tracked_worker", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], said: str) -> None:
    assert process.stdout is not None
    assert any(line.strip() == said for line in process.stdout), "the job ended"


def runs_named(uri: str, name: str) -> list[StoredRun]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("distillation")
    assert found is not None
    where = f"attributes.run_name = '{name}'"
    return list(client.search_runs([found.experiment_id], where))


EXPECTED = [(step, step / 8) for step in range(1, LAST + 1)]


def test_a_server_that_is_killed_again_and_again_gets_every_point_once(
    server: Server, tmp_path: Path
) -> None:
    run = start(server.uri, tmp_path)
    for life in range(3):
        for step in range(life * 500 + 1, life * 500 + 501):
            run.log_metrics({"loss": 1 / step}, step)
            time.sleep(0.0005)
        run.log_text(f"in life {life}", f"{life}.txt")
        server.kill()  # amid its answers
        for step in range(life * 500 + 501, life * 500 + 601):
            run.log_metrics({"other": 1 / step}, step)
        server.start()
    assert run.finish() == 0
    assert points(server.uri, run.id, "loss") == [(step, 1 / step) for step in range(1, 1501)]
    expected = [step for life in range(3) for step in range(life * 500 + 501, life * 500 + 601)]
    assert [step for step, _ in points(server.uri, run.id, "other")] == expected
    assert run.id is not None
    files = MlflowClient(server.uri).list_artifacts(run.id)
    assert [file.path for file in files] == ["0.txt", "1.txt", "2.txt"]


def test_a_job_killed_while_the_server_is_down_and_started_again_is_one_run_with_every_point_once(
    server: Server, tmp_path: Path
) -> None:
    """The server is down from the start, and comes while the third start of the job runs."""
    server.kill()
    for first, last in ((1, 400), (300, 800)):  # steps from 300 on are trained again
        process = job(server.uri, tmp_path / "killed", first, last)
        until(process, str(last))
        process.kill()
        process.wait()
    with job(server.uri, tmp_path / "killed", 700, LAST) as process:
        until(process, "800")
        server.start()
        assert process.wait(240) == 0
    (run,) = runs_named(server.uri, "killed")
    assert points(server.uri, run.info.run_id, "loss") == EXPECTED
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"] == f"**Outcome:** all {LAST} steps"


def test_a_job_killed_while_it_delivers_is_one_run_with_every_point_once(
    server: Server, tmp_path: Path
) -> None:
    for first, last in ((1, 500), (450, 900)):
        process = job(server.uri, tmp_path / "amid", first, last)
        until(process, str(last))
        process.kill()
        process.wait()
    with job(server.uri, tmp_path / "amid", 850, LAST) as process:
        assert process.wait(240) == 0
    (run,) = runs_named(server.uri, "amid")
    assert points(server.uri, run.info.run_id, "loss") == EXPECTED


def test_jobs_that_make_a_group_at_once_share_it(server: Server, tmp_path: Path) -> None:
    names = ("first", "second", "third")
    jobs = [job(server.uri, tmp_path / name, 1, LAST, "wiki-2026", "sst2") for name in names]
    for process in jobs:
        with process:
            assert process.wait(240) == 0
    (outer,), (inner,) = runs_named(server.uri, "wiki-2026"), runs_named(server.uri, "sst2")
    assert inner.data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert inner.data.tags["distil.path"] == "wiki-2026 / sst2"
    for name in names:
        (run,) = runs_named(server.uri, name)
        assert run.data.tags["mlflow.parentRunId"] == inner.info.run_id
        assert inner.data.tags[f"outcome.{name}"] == f"all {LAST} steps"
        assert f"- **{name}**: all {LAST} steps" in inner.data.tags["mlflow.note.content"]
    assert {outer.info.status, inner.info.status} == {"FINISHED"}
    assert outer.data.tags["outcome.sst2"].endswith(f": all {LAST} steps")

    run = start(server.uri, tmp_path, name="fourth", under=["wiki-2026", "sst2"])
    wait_for(lambda: runs_named(server.uri, "sst2")[0].info.status == "RUNNING", "the group to run again")
    run.finish("FAILED", outcome="lost its data")
    (inner,) = runs_named(server.uri, "sst2")
    assert (inner.info.status, inner.data.tags["outcome.fourth"]) == ("FAILED", "lost its data")


def test_of_two_groups_made_unseen_the_oldest_stays_when_the_run_ends(server: Server, tmp_path: Path) -> None:
    """An older one turns up late, as after a slow answer; the run moves there and its own goes."""
    run = start(server.uri, tmp_path, name="mover", under=["late"])
    run_id = run.opened()
    (own,) = runs_named(server.uri, "late")
    client = MlflowClient(server.uri)
    tags = {"distil.path": "late", "distil.made_by": "another"}
    older = client.create_run(own.info.experiment_id, own.info.start_time - 1000, tags, "late")
    twin = {"distil.key": client.get_run(run_id).data.tags["distil.key"]}  # an opening answered too late
    client.create_run(own.info.experiment_id, tags=twin, run_name="mover")
    run.finish()
    (left,), (moved,) = runs_named(server.uri, "late"), runs_named(server.uri, "mover")
    assert left.info.run_id == older.info.run_id and moved.info.run_id == run_id
    assert moved.data.tags["mlflow.parentRunId"] == older.info.run_id
