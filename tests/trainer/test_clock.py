"""The clock of the step."""

import time

import pytest
import torch
from torch.profiler import profile

from trainer.clock import Clock, Stations

CPU = torch.device("cpu")


def test_parts_add_up_by_name(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(CPU)
    assert clock.totals() == {}
    for part, seconds in (("teacher", 2.0), ("a/forward", 0.5), ("teacher", 3.0)):
        now += 10
        with clock.part(part):
            now += seconds
    assert clock.totals() == {"teacher": 5.0, "a/forward": 0.5}
    with clock.part("a/forward"):
        now += 1
    assert clock.totals() == {"teacher": 5.0, "a/forward": 1.5}, (
        "since the clock was made, however often read"
    )


def test_what_fails_is_left_out():
    clock = Clock(CPU)
    with pytest.raises(ValueError, match="inside"), clock.part("teacher"):
        raise ValueError("inside")
    assert clock.totals() == {}


def test_parts_are_ranges_in_a_trace():
    clock = Clock(CPU)
    with profile() as profiler, clock.part("small/backward"):
        torch.ones(3).sum()
    names = {event.name for event in profiler.events() if event.is_user_annotation}
    assert "small/backward" in names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")
def test_on_cuda_it_is_the_time_of_the_device():
    """Started asynchronously: the host is done with the part long before the device is."""
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    clock = Clock(device)
    a @ a
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    with clock.part("teacher"):
        for _ in range(50):
            a @ a
    torch.cuda.synchronize()
    wall_s = time.perf_counter() - started_s
    assert 0.5 * wall_s < clock.totals()["teacher"] < 1.1 * wall_s


def test_stations_count_from_the_process_s_start_and_not_by_the_wall_clock(monkeypatch):
    stations = Stations()
    stations.passed("imports")
    assert 0.1 < stations.seconds["imports"], "this process has imported torch"
    now = time.monotonic()
    assert stations.started_s == pytest.approx(now - stations.seconds["imports"], abs=1)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    stations.passed("teacher")
    stations.passed("teacher")
    assert stations.seconds["teacher"] == pytest.approx(10, abs=1)
    assert list(stations.seconds) == ["imports", "teacher"]
