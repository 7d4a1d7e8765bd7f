"""Being asked to leave, by real signals to this process."""

import os
import signal
import time

import pytest

from trainer.interruption import SIGNALS, Interruption


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_further_ones_change_nothing(number):
    asked = Interruption(rank=2)
    asked.listen()
    assert asked.reason is None
    os.kill(os.getpid(), number)
    assert asked.reason == f"{number.name} at rank 2 ({os.uname().nodename})"
    for other in [*SIGNALS, *SIGNALS]:
        os.kill(os.getpid(), other)
    assert asked.reason.startswith(number.name)


def test_the_time_counts_from_the_process_s_start():
    assert Interruption(max_hours=1.0).reason is None
    assert Interruption(max_hours=1.0, started_s=time.monotonic() - 3599).reason is None
    over = Interruption(max_hours=1.0, started_s=time.monotonic() - 3600)
    assert over.reason == "train.max_hours=1 are over"


def test_a_clock_that_is_set_ends_no_run(monkeypatch):
    asked = Interruption(max_hours=1.0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert asked.reason is None
