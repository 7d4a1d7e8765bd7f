"""What people read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.load import load_config
from configs.schema import RunConfig
from launcher.reporting import Reporter
from launcher.runfolder import RunFolder
from launcher.wording import by_kind, duration
from tests.launcher.conftest import written
from trainer.checkpoint import CheckpointError, Progress
from trainer.clock import Stations
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
