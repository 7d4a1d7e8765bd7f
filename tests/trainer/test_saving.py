"""Saving in the background: training goes on, order is kept, and no failure is lost."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small_disk
from tests.trainer.saved import assert_equal, checkpoint, keep, names
from trainer.checkpoint import list_complete, load, step_of, verify
from trainer.saving import Saved, Writer


class Gate:
    """Holds every call of a function of ``os`` up until it is opened; the real one then runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "fsync") -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        real = getattr(os, name)

        def held_up(*arguments: Any) -> Any:
            self.reached.set()
            assert self.open.wait(60)
            return real(*arguments)

        monkeypatch.setattr(os, name, held_up)


def make(folder: Path, patience_s: float = 60.0, background: bool = True) -> tuple[Writer, list[Saved]]:
    told: list[Saved] = []
    return Writer(folder, replace(keep(3), background=background), told.append, patience_s), told


@pytest.mark.parametrize("background", [True, False])
def test_what_is_put_is_written_in_order(tmp_path, background):
    writer, told = make(tmp_path, background=background)
    for step in (1, 2, 3):
        writer.put(checkpoint(step), since_s=0.0)
        assert background or [saved.step for saved in told] == list(range(1, step + 1))
    writer.finish(60.0)
    assert [(saved.step, saved.path, saved.error) for saved in told] == [
        (step, tmp_path / f"step-{step:08d}", None) for step in (1, 2, 3)
    ]
    assert all(saved.seconds > 0 for saved in told)
    for step in (1, 2, 3):
        assert_equal(load(tmp_path / f"step-{step:08d}"), checkpoint(step))


def test_a_slow_disk_holds_no_step_up(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    writer, told = make(tmp_path)
    writer.put(checkpoint(1), since_s=0.0)
    assert gate.reached.wait(60)  # it writes, and here we are
    assert list_complete(tmp_path) == [] and told == []
    gate.open.set()
    writer.finish(60.0)
    assert names(tmp_path) == ["step-00000001"] and told[0].path is not None


def test_what_is_saved_is_where_the_run_stood(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "mkdir")  # before anything is written
    writer, told = make(tmp_path)
    put = checkpoint(1)
    writer.put(put, since_s=0.0)
    assert gate.reached.wait(60)
    put.progress.step, put.progress.rows = 2, 48
    put.progress.quarantined.append((0, 7))
    gate.open.set()
    writer.finish(60.0)
    assert told[0].path == tmp_path / "step-00000001"
    assert_equal(load(tmp_path / "step-00000001"), checkpoint(1))


def test_a_save_that_takes_too_long_costs_the_next_one_only(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    writer, told = make(tmp_path, patience_s=0.1)
    writer.put(checkpoint(1), since_s=0.0)
    writer.put(checkpoint(2), since_s=0.0)
    assert [(saved.step, saved.path) for saved in told] == [(2, None)]
    assert "the save of step 1 has taken" in str(told[0].error)
    gate.open.set()
    writer.finish(60.0)
    writer.put(checkpoint(3), since_s=0.0)
    writer.finish(60.0)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_file_system_that_hangs_does_not_keep_the_run_from_its_end(tmp_path, monkeypatch, caplog):
    gate = Gate(monkeypatch)
    writer, told = make(tmp_path)
    writer.put(checkpoint(1), since_s=0.0)
    writer.finish(0.1)
    assert "step 1 is NOT saved" in caplog.text and "is the file system hanging?" in caplog.text
    gate.open.set()
    writer.finish(60.0)
    assert told[0].path is not None


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_costs_a_checkpoint_and_the_next_one_is_saved(tmp_path, background):
    with small_disk(tmp_path / "disk", 64 * 4096) as disk:
        writer, told = make(disk / "checkpoints", background=background)
        writer.put(checkpoint(1), since_s=0.0)
        writer.finish(60.0)
        filler = disk / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (os.statvfs(disk).f_bavail - 2) * 4096)
        writer.put(checkpoint(2, numbers=2000), since_s=0.0)
        writer.finish(60.0)
        assert names(disk / "checkpoints") == ["step-00000001"]
        filler.unlink()
        writer.put(checkpoint(3, numbers=2000), since_s=0.0)
        writer.finish(60.0)
        found = list_complete(disk / "checkpoints")
        assert [step_of(path) for path in found] == [1, 3] and not any(map(verify, found))
    assert [saved.path is not None for saved in told] == [True, False, True]
    assert "No space left on device" in str(told[1].error)


@pytest.mark.parametrize("background", [True, False])
def test_a_mistake_of_ours_is_not_swallowed(tmp_path, background):
    broken = checkpoint(1)
    broken.config["unwritable"] = object()
    writer, told = make(tmp_path, background=background)
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.put(broken, since_s=0.0)
        writer.put(checkpoint(2), since_s=0.0)
    writer.put(checkpoint(3), since_s=0.0)  # told once
    writer.finish(60.0)
    assert names(tmp_path) == ["step-00000003"] and [saved.step for saved in told] == [3]
