"""Worker processes: bounded work under way, and none left behind, however the parent ends."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sharding.manifest import CorpusError
from sharding.workers import in_workers


def square(number: int) -> int:
    return number * number


def fail_at(limit: int, number: int) -> int:
    if number >= limit:
        raise CorpusError(f"{number} is too much")
    return number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(number: int) -> None:
    time.sleep(100_000)  # past the time that a test is given


def test_every_job_once() -> None:
    assert sorted(in_workers(square, range(50), 3)) == [number**2 for number in range(50)]
    assert list(in_workers(square, [], 2)) == []


def test_jobs_are_taken_as_they_are_needed() -> None:
    taken = 0

    def jobs() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    for done, _ in enumerate(in_workers(square, jobs(), 2), start=1):
        assert taken <= done + 4


def test_an_error_of_a_job_is_the_callers() -> None:
    with pytest.raises(CorpusError, match="is too much"):
        list(in_workers(functools.partial(fail_at, 5), range(100), 2))


def test_a_worker_that_is_killed() -> None:
    with pytest.raises(CorpusError, match="worker process was killed.* set processes below 2"):
        list(in_workers(die, range(2), 2))


def test_who_stops_early_waits_for_nobody() -> None:
    def jobs() -> Iterator[int]:
        yield 1
        yield 2
        while len(psutil.Process().children(recursive=True)) < 3:  # two workers, one resource tracker
            time.sleep(0.02)
        raise KeyboardInterrupt

    before = psutil.Process().children(recursive=True)
    with pytest.raises(KeyboardInterrupt):
        list(in_workers(sleep_long, jobs(), 2))
    left = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert [process for process in left if "resource_tracker" not in " ".join(process.cmdline())] == []


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "from tests.sharding.test_workers import in_workers, sleep_long\n"
        "if __name__ == '__main__':\n    list(in_workers(sleep_long, range(9), 2))\n"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)})
    workers: list[psutil.Process] = []
    while len(workers) < 3:
        assert parent.poll() is None
        workers = psutil.Process(parent.pid).children(recursive=True)
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
