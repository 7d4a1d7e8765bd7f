"""System metrics: real samples of two nodes' processes, in one run."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.launcher.conftest import ROOT
from tests.trainer.mlflow_server import wait_for
from tests.trainer.test_tracking import start
from trainer import outbox, system_metrics
from trainer.system_metrics import NodeSamples
from trainer.tracking import resolve_uri

SAMPLE = """
import sys, time
from pathlib import Path
from trainer.system_metrics import sample_into
sample_into(Path(sys.argv[1]))
time.sleep(600)
"""


def test_every_node_has_its_curves_which_go_on_when_the_job_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    monkeypatch.setattr(outbox, "SEND_EVERY_S", 0.1)
    monkeypatch.setattr(system_metrics, "READ_EVERY_S", 0.1)
    folder, uri = tmp_path / "tracking", resolve_uri(None, tmp_path)
    client, seen = MlflowClient(uri), 0
    for _ in range(2):
        samples = NodeSamples(folder / "system", alone=False)
        assert not list(folder.glob("system/*")), "of the job before nothing is read again"
        run = start(None, tmp_path, journal=folder, sample=samples)
        run_id = run.opened()
        nodes = [
            subprocess.Popen([sys.executable, "-c", SAMPLE, str(folder / f"system/{name}.jsonl")], cwd=ROOT)
            for name in ("n1", "n2")
        ]
        keys = [f"system/{name}/cpu_utilization_percentage" for name in ("n1", "n2")]
        for key in keys:
            enough = seen + 2
            wait_for(lambda: len(client.get_metric_history(run_id, key)) >= enough, key)  # noqa: B023
        for node in nodes:
            node.kill()
            node.wait()
        assert run.finish() == 0
        histories = [client.get_metric_history(run_id, key) for key in keys]
        for history in histories:
            assert sorted(point.step for point in history) == list(range(len(history)))
            assert all(0 <= point.value <= 100 for point in history)
        seen = max(map(len, histories))


def test_a_node_alone_has_the_names_that_mlflow_knows_and_half_a_line_waits(tmp_path: Path) -> None:
    samples = NodeSamples(tmp_path, alone=True)
    file = tmp_path / "n1.jsonl"
    file.write_text('{"at": 5, "values": {"cpu": 1.0}}\n{"at": 6, "val')
    (entry,) = samples()
    assert (entry["at"], entry["values"], entry["step"]) == (5, {"system/cpu": 1.0}, None)
    with file.open("a") as lines:
        lines.write('ues": {"cpu": 2.0}}\n')
    samples._due_s = 0.0
    assert [entry["at"] for entry in samples()] == [6]
    file.write_text('{"at": 7, "values": {"cpu": 3.0}}\n')  # it began anew
    samples._due_s = 0.0
    assert [entry["at"] for entry in samples()] == [7]
