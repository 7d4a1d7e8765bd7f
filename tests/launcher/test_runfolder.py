"""The run folder: one writer at a time, events, MLflow ids."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.runfolder import RunFolder
from tests.conftest import small_disk
from tests.launcher.conftest import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from launcher.runfolder import RunFolder
RunFolder(Path(sys.argv[1])).claim(wait_s=0)
if os.fork() == 0:  # a reader process, which outlives a parent that is killed for a while
    time.sleep(20)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another job that writes there."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_by_name_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    other = hold(tmp_path / "run")
    try:
        with pytest.raises(
            ValueError, match=f"is being written by another job .*pid {other.pid}.*another output"
        ):
            RunFolder(tmp_path / "run").claim(wait_s=0.5)
        other.send_signal(signal.SIGKILL)
        other.wait()
        RunFolder(tmp_path / "run").claim(wait_s=0)
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(other.pid)], check=False)


def test_it_waits_for_a_job_that_is_ending(tmp_path: Path) -> None:
    other = hold(tmp_path / "run")
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -KILL -{other.pid}"])
    begun_s = time.monotonic()
    RunFolder(tmp_path / "run").claim(wait_s=30)
    assert killer.wait() == 0 and time.monotonic() - begun_s < 30
    other.wait()


def test_events_are_lines_in_order_and_a_full_disk_costs_only_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 4 * 4096) as disk:
        folder = RunFolder(disk / "run")
        folder.claim()
        folder.event("started", 0, ranks=2)
        folder.event("stopped", 7, reason="asked")
        lines = [json.loads(line) for line in (disk / "run/events.jsonl").read_text().splitlines()]
        assert [(line["event"], line["step"]) for line in lines] == [("started", 0), ("stopped", 7)]
        assert (
            lines[0]["ranks"] == 2 and lines[0]["at"] <= lines[1]["at"] and lines[0]["at"].endswith("+00:00")
        )
        folder.event("saved", 8, path="x" * 20_000)
        assert "event saved of step 8 could not be kept" in caplog.text


def test_mlflow_ids_are_kept_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.tracking_run_ids() == {}
    folder.keep_tracking_run_ids({"": "1", "small": "2"})
    assert RunFolder(tmp_path).tracking_run_ids() == {"": "1", "small": "2"}
