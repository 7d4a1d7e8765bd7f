"""Runs that are asked to leave: by signals at any moment, to any rank, and by the clock. Real processes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.launcher.conftest import Launch, command, student
from tests.launcher.test_general import assert_equal, final_weights
from trainer import exits

pytestmark = pytest.mark.network_of_ranks


def events(output: str, kind: str | None = None) -> list[dict[str, Any]]:
    """What a run has kept of what happened to it."""
    path = Path(output, "events.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if kind in (None, event["event"])]


def start(folder: Path, config: dict[str, Any], *overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, config, *overrides, ranks=ranks, by="torchrun"),
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the ranks, by rank."""
    children = psutil.Process(launcher.pid).children()
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def wait_for(process: subprocess.Popen[str], output: str, kind: str) -> dict[str, Any]:
    while not (found := events(output, kind)):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    return found[-1]


def test_asked_twice_at_once_it_saves_leaves_and_goes_on_bitwise(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """Two students, dropout on. SIGUSR1 to every process of rank 1, readers too, then SIGTERM to rank 0."""
    run_config["students"].append(student("other", layers=1))
    run_config["train"]["steps"] = 300
    run_config |= {"checkpoint": {"every_steps": 100}, "evaluation": {"every_steps": 100, "rows": 40}}
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    done = general(run_config, f"output={whole}", ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr

    run_config["tracking"] = {
        "enabled": True,
        "uri": f"sqlite:///{tmp_path}/mlflow.db",
        "system_metrics": False,
    }
    process = start(tmp_path, run_config, f"output={broken}")
    wait_for(process, broken, "training")
    ranks = ranks_of(process)
    for each in [ranks[1], *ranks[1].children(recursive=True)]:
        each.send_signal(signal.SIGUSR1)
    ranks[0].send_signal(signal.SIGTERM)
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait() != 0
    assert f"exitcode  : {exits.STOPPED}" in said, said
    (stopped,) = events(broken, "stopped")
    assert 0 < stopped["step"] < 300 and "SIGUSR1 at rank 1" in stopped["reason"]
    assert Path(broken, "checkpoints", f"step-{stopped['step']:08d}", "files.json").exists()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    stored = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in stored} == {"SCHEDULED"}

    done = general(run_config, f"output={broken}", ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in events(broken, "started")] == [0, stopped["step"]]
    for name in ("small", "other"):
        assert_equal(final_weights(broken, name), final_weights(whole, name))
    again = client.search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in again} == {run.info.run_id for run in stored}
    assert {run.info.status for run in again} == {"FINISHED"}
