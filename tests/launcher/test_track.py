"""Whole runs with the server down, and ``launcher/track.py`` afterwards, against a real server."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from launcher import track
from launcher.tracked import heldout, surroundings
from tests.launcher.conftest import ROOT, Launch, student
from tests.trainer.mlflow_server import Server
from trainer import exits, outbox
from trainer.journal import Journal
from trainer.tracking import Run as TrackedRun

TIMED = ("speed/", "time/", "share/", "memory/", "start/", "system/")  # differ from run to run
OF_ONE_RUN = ("distil.key", "mlflow.parentRunId", "mlflow.note.content")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``launcher/track.py``."""
    line = [sys.executable, str(ROOT / "launcher/track.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


@pytest.fixture
def called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Call it in this process; return its exit code and what it printed."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["track.py", *arguments])
        capsys.readouterr()
        return track.main(), capsys.readouterr().out

    return call


def told(client: MlflowClient, run: Run) -> dict[str, Any]:
    """All that a store holds of a run and that does not differ between two equal runs."""
    keys = [key for key in run.data.metrics if not key.startswith(TIMED)]
    histories = {
        key: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
        for key in keys
    }
    return {
        "status": run.info.status,
        "histories": {key: sorted(points) for key, points in histories.items()},
        "timed": {key for key in run.data.metrics if key.startswith(TIMED) and "system/" not in key},
        "params": {key: value for key, value in run.data.params.items() if key != "output"},
        "tags": {key: value for key, value in run.data.tags.items() if key not in OF_ONE_RUN},
        "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        "datasets": [(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs],
    }


def test_a_run_without_its_server_ends_well_and_is_delivered_later_as_any_other(
    run_config: dict[str, Any],
    general: Launch,
    called: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")  # not started
    run_config["students"].append(student("other", layers=1))
    run_config["tracking"] = {"uri": server.uri, "under": ["wiki-2026"], "tags": {"owner": "us"}}
    alone, healthy = str(tmp_path / "alone"), str(tmp_path / "healthy")
    done = general(run_config, f"output={alone}", "tracking.run_name=alone")
    assert done.returncode == exits.DONE, done.stderr
    assert f"tracking.uri={server.uri} does not answer" in done.stderr
    assert f"python launcher/track.py sync {alone}/tracking" in done.stderr
    left = len(Journal(Path(alone, "tracking")).left())
    code, shown = called("status", alone)
    assert code == exits.DONE and str(left) in shown and server.uri in shown
    code, failed = called("sync", alone)
    assert code == exits.LOST and f"{left} entries left" in failed
    assert not Path(alone, "mlflow.json").exists()

    server.start()
    try:
        done = general(run_config, f"output={healthy}", "tracking.run_name=healthy")
        assert done.returncode == exits.DONE and "in MLflow: http" in done.stderr, done.stderr
        synced = command("sync", str(tmp_path))  # all journals below it
        assert synced.returncode == exits.DONE, synced.stdout + synced.stderr
        assert "metrics" in synced.stdout and synced.stdout.count("; 0 entries left") == 2
        code, again = called("sync", alone, healthy)
        assert code == exits.DONE and again.count("delivered nothing; 0 entries left") == 2

        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("distillation")
        assert experiment is not None
        runs = list(client.search_runs([experiment.experiment_id]))
        tops = {run.info.run_name: run for run in runs if run.info.run_name in ("alone", "healthy")}
        (group,) = [run for run in runs if run.info.run_name == "wiki-2026"]
        assert len(runs) == 1 + 2 + 4
        found = []
        for top in (tops["alone"], tops["healthy"]):
            assert top.data.tags["mlflow.parentRunId"] == group.info.run_id
            children = {
                run.info.run_name: run
                for run in runs
                if run.data.tags.get("mlflow.parentRunId") == top.info.run_id
            }
            whole = {"": top, **children}
            found.append({name: told(client, run) for name, run in whole.items()})
            for tag in ("mlflow.runName", "tracking.run_name"):
                found[-1][""]["tags"].pop(tag, None)
            found[-1][""]["params"].pop("tracking.run_name")
        assert set(found[0]) == {"", "small", "other"}
        assert found[0] == found[1]
        check(found[0], group, tops["alone"])
    finally:
        server.kill()


def check(found: dict[str, Any], group: Run, run: Run) -> None:
    """What a tracked run holds, looked at by itself."""
    job, small = found[""], found["small"]
    assert job["status"] == small["status"] == group.info.status == "FINISHED"
    assert [step for step, _ in small["histories"]["loss/total"]] == [1, 2, 3, 4, 5, 6]
    assert job["histories"]["progress/rows"] == [(step, 24.0 * step) for step in range(1, 7)]
    tokens = [value for _, value in job["histories"]["progress/tokens"]]
    assert tokens == sorted(tokens) and 0 < tokens[0] <= 24 * 32 and tokens[-1] <= 6 * 24 * 32
    assert any(key.startswith("system/cpu") for key in run.data.metrics), "one host needs no name"
    assert set(job["files"]) >= {"config.yaml", "deepspeed.json", "origin.json", "summary.json"}
    assert small["files"] == ["model"]
    assert job["tags"]["owner"] == "us" and job["tags"]["hosts"] and job["tags"]["version.deepspeed"]
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("Stage general: `small` (2 x 24), `other` (1 x 24) from `")
    assert "**Outcome:** small held-out loss " in note and note.endswith("; finished")
    assert "small held-out loss" in group.data.tags["outcome.alone"]
    assert "- **healthy**: small held-out loss" in group.data.tags["mlflow.note.content"]


def test_what_goes_to_runs_that_a_server_has_lost_is_kept_until_it_is_given_up(
    called: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "SEND_EVERY_S", 0.2)
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    try:
        about: dict[str, Any] = {"experiment": "e", "name": "r", "params": {}, "tags": {}}
        journal = tmp_path / "run/tracking"
        run = TrackedRun.start(uri=server.uri, default_folder=tmp_path, journal=journal, **about)
        run.opened()
        server.kill()
        run.log_metrics({"loss": 1.0}, 1)
        assert run.finish(wait_s=0.5) >= 2
        (tmp_path / "server/server.db").unlink()
        server.start()
        code, said = called("sync", str(tmp_path))
        assert (
            code == exits.LOST and f"does not hold MLflow run {run.id}" in said and "--drop-missing" in said
        )
        assert len(Journal(journal).left()) >= 2
        code, said = called("sync", str(tmp_path), "--drop-missing")
        assert code == exits.DONE and "; 0 entries left" in said
    finally:
        server.kill()


def test_a_folder_without_a_journal_is_an_error(
    tmp_path: Path, called: Callable[..., tuple[int, str]]
) -> None:
    code, told = called("status", str(tmp_path))
    assert code == exits.WRONG and "no journal" in told


def test_outcomes_come_from_what_was_evaluated(tmp_path: Path) -> None:
    assert heldout(tmp_path / "none") == {}
    file = tmp_path / "evaluations.jsonl"
    lines = [
        '{"step": 0, "student": "a", "losses": {"total": 2.5}}',
        '{"step": 9, "student": "a", "losses": {"total": 0.5, "score/accuracy": 0.75}}',
    ]
    file.write_text("\n".join(lines) + "\n" + '{"step": 12, "stu')  # cut off by a crash
    assert heldout(file) == {"a": "held-out loss 2.5 to 0.5, accuracy 0.7500"}


def test_where_a_run_is_becomes_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    alone = surroundings(["n1", "n1"])
    assert alone["hosts"] == "n1" and not [tag for tag in alone if tag.startswith("slurm.")]
    assert alone["version.torch"].startswith("2.")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    found = surroundings(["n2", "n1", "n2"])
    assert found["hosts"] == "n1, n2"
    slurm = {"slurm.job_id": "123", "slurm.nodes": "n[1-2]", "slurm.restarts": "2"}
    assert {tag: value for tag, value in found.items() if tag.startswith("slurm.")} == slurm
