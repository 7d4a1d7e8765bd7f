"""A profile of a hand-made step; tests/launcher/test_students.py has whole runs on two ranks."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import tensor

from sharding.stream import Batch
from trainer.clock import Clock
from trainer.meter import SpeedMeter
from trainer.profile import Profile
from trainer.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def steps(meter: SpeedMeter, profile: Profile, count: int) -> None:
    """Steps with a teacher that multiplies matrices."""
    a = torch.ones(64, 64)
    for _ in meter.timed([Batch(1, *(tensor([1]),) * 6)] * count):
        with meter.clock.part("teacher"):
            for _ in range(10):
                a @ a
        with meter.clock.part("s/backward"):
            a.exp()
        meter.add(rows=8, tokens=50)
        profile.step()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def made(tmp_path: Path, told: list[str]) -> tuple[SpeedMeter, Profile]:
    """A profile of two steps."""
    meter = SpeedMeter(None, 0.0, Clock(ALONE.device))
    return meter, Profile(tmp_path / "profile", ALONE, meter, 2, told.append)


def annotations(folder: Path) -> list[str]:
    (path,) = folder.iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_the_steps_after_the_first_two_are_profiled_once(made, told, tmp_path):
    meter, profile = made
    steps(meter, profile, 3)
    assert not (tmp_path / "profile").exists() and told == []
    steps(meter, profile, 4)
    profile.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank0.trace.json.gz"]
    assert annotations(tmp_path / "profile").count("teacher") == 2
    (text,) = told
    assert text.startswith("profile of 2 steps, trace in ")
    lines = {line[:50].strip(): line[50:].split() for line in text.splitlines()[1:]}
    assert lines["aten::mm"][0] == "10" and lines["aten::exp"][0] == "1", "calls a step"
    shares = [float(lines[part][-1][:-1]) for part in ("data", "teacher", "s/backward", "other")]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert float(lines["communication, inside these"][0]) == 0


def test_a_run_that_ends_early_writes_what_there_is(made, told, tmp_path):
    meter, profile = made
    steps(meter, profile, 3)
    profile.close()
    assert annotations(tmp_path / "profile").count("teacher") == 1
    assert told[0].startswith("profile of 1 steps")


def test_a_run_that_ends_before_it_begins_writes_nothing(made, told, tmp_path):
    meter, profile = made
    steps(meter, profile, 1)
    profile.close()
    assert told == [] and not (tmp_path / "profile").exists()


def test_a_disk_that_takes_nothing_does_not_end_the_run(made, told, tmp_path):
    meter, profile = made
    (tmp_path / "profile").write_text("in the way")
    steps(meter, profile, 6)
    (text,) = told
    assert text.startswith("profile of 2 steps, whose trace could not be written: ")
    assert "part of the step" in text
    assert meter.steps == 6
