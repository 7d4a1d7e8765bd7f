"""The clocks: seconds spent in the named parts of a step, and between the stations before the first one."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function


class Clock:
    """Adds up the seconds of named parts; in a profiler's trace the same parts are ranges of these names.

    On CUDA a part is the time between two events in the stream: nothing is waited for until ``totals`` reads
    them. On CPU it is the wall clock's. Parts of other kinds of work do not overlap: at most one is open.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._totals: Counter[str] = Counter()
        self._unread: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside under ``name``; an exception leaves it uncounted."""
        with record_function(name):
            start = self._now()
            yield
            self._unread.append((name, start, self._now()))

    def totals(self) -> dict[str, float]:
        """Return the seconds of every part since the clock was made (waits for the device)."""
        if self._unread and self.device.type == "cuda":
            self._unread[-1][2].synchronize()
        for name, start, end in self._unread:
            seconds = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            self._totals[name] += seconds
        self._unread.clear()
        return dict(self._totals)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stations:
    """Seconds between the stations that a process passes once each, from its start by the system's record."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.listener: Callable[[str], object] = lambda station: None
        """Told every station that is passed: a watchdog's beat."""
        self.started_s = self._last_s = time.monotonic() - _age_s()

    def passed(self, name: str) -> None:
        """Count the time since the station before under ``name``."""
        now_s = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s
        self.listener(f"the way from station '{name}' to the first step")


def _age_s() -> float:
    """Return how long ago this process was started, to 10 ms.

    By the clock that counts from the system's boot, as the kernel does (``proc_pid_stat(5)``, field 22):
    psutil's ``create_time`` adds the time of the boot, which is known to a second only.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
