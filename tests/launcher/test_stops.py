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

from tests.launcher.conftest import Launch, command, evaluations, student
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


def test_the_end_of_the_time_is_a_stop(run_config: dict[str, Any], general: Launch) -> None:
    """Over before the first step: it makes one, saves it, and is to be started again."""
    done = general(run_config, "train.max_hours=1e-6")
    assert done.returncode == exits.STOPPED, done.stderr
    assert "STOPPED by train.max_hours=1e-06 are over" in done.stderr
    assert [event["step"] for event in events(run_config["output"], "stopped")] == [1]
    for steps in (2, 3):
        assert general(run_config, "train.max_hours=1e-6").returncode == exits.STOPPED
        assert events(run_config["output"], "stopped")[-1]["step"] == steps


def test_a_run_rolled_back_ends_well_and_harms_no_other_student(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """A rate of 1e30 breaks the second step; one rollback multiplies it by 1e-32."""
    run_config["deepspeed"] = {"zero_stage": 2}
    assert general(run_config, f"output={tmp_path}/alone", ranks=2, by="torchrun").returncode == 0
    wild = student("wild", layers=1, optimizer={"lr": 1e30, "warmup": 0.0, "max_grad_norm": None})
    run_config["students"] = [wild, *run_config["students"]]
    run_config["train"] |= {"non_finite": "rollback", "rollback_lr_factor": 1e-32}
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_config["tracking"] = {"enabled": True, "uri": uri, "system_metrics": False}
    done = general(run_config, ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr
    output = run_config["output"]
    assert_equal(final_weights(output), final_weights(f"{tmp_path}/alone"))
    (back,) = events(output, "rolled_back")
    assert (back["student"], back["from_step"], back["step"]) == ("wild", 1, 0)
    assert back["lr_scale"] == 1e-32 and "step 2 (rows from 24) is not finite" in back["reason"]
    losses = [entry["losses"]["total"] for entry in evaluations(output) if entry["student"] == "wild"]
    assert losses[-1] < losses[0]
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    runs = {run.info.run_name: run.data for run in client.search_runs([experiment.experiment_id])}
    assert (
        runs["wild"].metrics["optimizer/rollbacks"] == 1 and runs["small"].metrics["optimizer/rollbacks"] == 0
    )
    ids = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    steps = {
        name: sorted(point.step for point in client.get_metric_history(ids[name], "loss/total"))
        for name in ("wild", "small")
    }
    assert steps["wild"] == [1, 1, 2, 3, 4, 5, 6], "it goes another way from step 0 on"
    assert steps["small"] == [1, 2, 3, 4, 5, 6]


def test_an_elastic_run_learns_the_same_on_any_number_of_ranks(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """26 rows on 1 rank, and on 3 ranks (9, 9 and 8 rows) from where 2 go on: without dropout the same."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    run_config["students"][0]["overrides"] = still
    run_config["train"]["global_batch_rows"] = 26
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    refused = general(run_config, f"output={whole}", "train.micro_batch_rows=13", ranks=3, by="torchrun")
    assert "global_batch_rows=26 is not a multiple of 39" in refused.stderr
    assert "or allow any number of ranks with train.elastic=true" in refused.stderr
    run_config["train"]["elastic"] = True
    assert general(run_config, f"output={whole}").returncode == 0
    three = ["deepspeed.zero_stage=3", f"output={parts}"]
    done = general(run_config, *three, "train.max_hours=1e-6", ranks=3, by="torchrun")
    assert "STOPPED by train.max_hours" in done.stderr, done.stderr
    done = general(run_config, f"output={parts}", ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in events(parts, "started")] == [0, 1]
    for found, expected in zip(evaluations(parts), evaluations(whole), strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=2e-4)


def test_a_tracking_store_that_refuses_ends_a_new_run_for_good_and_a_resumed_one_for_now(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    run_config["tracking"] = {"enabled": True, "uri": "ftp://127.0.0.1:9", "system_metrics": False}
    done = general(run_config)
    assert done.returncode == exits.WRONG and "tracking.uri=ftp://127.0.0.1:9 cannot be used" in done.stderr
    assert not Path(run_config["output"]).exists(), "it leaves no trace"
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    assert general(run_config, uri, "train.max_hours=1e-6").returncode == exits.STOPPED
    done = general(run_config, ranks=2, by="deepspeed")
    assert done.returncode == exits.LOST, done.stderr
    assert done.stderr.count("the run's MLflow runs cannot be continued: tracking.uri=ftp") == 1
