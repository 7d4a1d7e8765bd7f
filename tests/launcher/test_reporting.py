"""What people read."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from configs.load import load_config
from configs.schema import RunConfig
from launcher.reporting import Reporter
from launcher.runfolder import RunFolder
from launcher.tracked import Tracked
from launcher.wording import by_kind, duration
from tests.conftest import small_disk
from tests.launcher.conftest import written
from tests.trainer.saved import checkpoint, names
from trainer.checkpoint import CheckpointError, Progress
from trainer.clock import Stations
from trainer.journal import Journal
from trainer.tracking import Run
from trainer.watchdog import Watchdog
from trainer.world import World


def test_what_happens_is_kept_in_the_run_folder(run_config: dict[str, Any]) -> None:
    config = load_config(RunConfig, written(run_config), [])
    folder, place = RunFolder(Path(config.output)), World(0, 1, 0, 1, torch.device("cpu"))
    folder.claim()
    run: Any = SimpleNamespace(config=config, world=place, progress=Progress(step=3), total_steps=6)
    watchdog = Watchdog(place, 60.0)
    reporter = Reporter(run, None, folder, Stations(), watchdog)
    reporter.evaluated(run.progress, {"small": {"total": 1.5, "embedding": 1.5}})
    reporter.stopped("SIGTERM at rank 0")
    watchdog.close()
    (line,) = (folder.path / "evaluations.jsonl").read_text().splitlines()
    expected = {"step": 3, "student": "small", "losses": {"total": 1.5, "embedding": 1.5}}
    assert json.loads(line) == expected and reporter.heldout == (3, {"small": 1.5})
    (event,) = (folder.path / "events.jsonl").read_text().splitlines()
    assert json.loads(event)["reason"] == "SIGTERM at rank 0"
    with pytest.raises(CheckpointError, match="no checkpoint to go back to"):
        reporter.newest_checkpoint()


def tracking(folder: Path, uri: str | None = None) -> Run:
    """A run of its own, with its journal in ``folder/j``."""
    about: dict[str, Any] = {"experiment": "e", "name": "r", "params": {}, "tags": {}}
    return Run.start(uri=uri, default_folder=folder, journal=folder / "j", **about)


def test_a_full_disk_costs_what_was_evaluated_its_line_and_not_the_run(
    run_config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, place = load_config(RunConfig, written(run_config), []), World(0, 1, 0, 1, torch.device("cpu"))
    run: Any = SimpleNamespace(config=config, world=place, progress=Progress(step=3), total_steps=6)
    watchdog, store = Watchdog(place, 60.0), f"sqlite:///{tmp_path}/mlflow.db"
    tracked_run = tracking(tmp_path, store)
    with small_disk(tmp_path / "disk", 16 * 4096) as disk:
        with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        tracked = Tracked(disk, tracked_run, {"small": tracked_run})
        reporter = Reporter(run, tracked, RunFolder(disk), Stations(), watchdog)
        reporter.evaluated(run.progress, {"small": {"total": 1.5}})
        reporter.probed(run.progress, {}, {"small": {"accuracy": 0.5}})
    watchdog.close()
    assert tracked_run.finish() == 0 and tracked_run.id is not None
    metrics = MlflowClient(store).get_run(tracked_run.id).data.metrics
    assert (metrics["heldout/total"], metrics["probe/accuracy"]) == (1.5, 0.5)
    for what in ("losses", "scores"):
        assert f"the {what} of small at step 3 could not be kept: [Errno 28]" in caplog.text


def test_a_checkpoint_whose_points_are_not_on_disk_says_so(
    run_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The journal's disk hangs; the checkpoint's does not."""
    config, place = load_config(RunConfig, written(run_config), []), World(0, 1, 0, 1, torch.device("cpu"))
    run: Any = SimpleNamespace(config=config, world=place, progress=Progress(step=3), total_steps=6)
    watchdog, release, flush, append = Watchdog(place, 60.0), threading.Event(), Run.flush, Journal.append
    monkeypatch.setattr(Run, "flush", lambda self: flush(self, wait_s=0.2))
    tracked_run = tracking(tmp_path)
    reporter = Reporter(run, Tracked(tmp_path, tracked_run, {}), RunFolder(tmp_path), Stations(), watchdog)
    watchdog.close()
    assert tracked_run.flush()
    monkeypatch.setattr(Journal, "append", lambda *about: release.wait() and append(*about))
    tracked_run.log_metrics({"loss": 1.0}, 3)
    reporter.writer.put(checkpoint(3), since_s=0.0)
    reporter.finish_saving()
    release.set()
    assert names(tmp_path / "checkpoints") == ["step-00000003"]
    assert caplog.text.count("are not on disk yet, and the checkpoint is saved all the same") == 1
    assert tracked_run.finish() == 0


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (245, "4m05s"),
        (3600, "1h00m"),
        (11_220, "3h07m"),
        (183_600, "2d03h"),
    ],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_losses_by_kind_are_means_over_layers():
    figures = {
        "loss/total": 9.0,
        "loss/embedding": 1.0,
        "loss/hidden/1": 2.0,
        "loss/hidden/2": 4.0,
        "lr": 5.0,
    }
    assert by_kind(figures, "loss/") == "embedding 1.0000 hidden 3.0000"
    more = figures | {"loss/relation/qq": 1.0, "loss/relation/kk": 2.0, "loss/prediction": 0.5}
    assert by_kind(more, "loss/") == "embedding 1.0000 hidden 3.0000 relation 1.5000 prediction 0.5000"
    figures |= {
        "loss/corpus/wiki/total": 7.0,
        "loss/corpus/wiki/hidden/1": 9.0,
        "loss/corpus/my.own/total": 8.0,
    }
    assert by_kind(figures, "loss/") == "embedding 1.0000 hidden 3.0000; wiki 7.0000 my.own 8.0000"
