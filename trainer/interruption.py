"""Leaving when asked: SIGTERM, SIGUSR1 or the end of the time given. A rank notes it, all agree in the loop.

The ranks add their notes up in the collective with which every step begins, so all of them leave after the
same step, saved, and asking costs nothing. Python runs handlers between bytecodes of the main thread: one
that comes while a rank waits in a collective is noted after it.
"""

import logging
import signal
import socket
import time
from types import FrameType

log = logging.getLogger("distil")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Whether this rank has been asked to leave."""

    def __init__(self, rank: int = 0, max_hours: float | None = None, started_s: float | None = None) -> None:
        """Not asked yet.

        Args:
            rank: named in reasons.
            max_hours: time after which the rank asks itself; None: never.
            started_s: when that time began, by ``time.monotonic``; None: now.
        """
        self._where = f"rank {rank} ({socket.gethostname()})"
        self._max_hours = max_hours
        self._started_s = time.monotonic() if started_s is None else started_s
        self._signal: str | None = None

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 are notes, the first counts; main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    @property
    def reason(self) -> str | None:
        """Who has been asked by what; None: not yet."""
        if self._signal is not None:
            return f"{self._signal} at {self._where}"
        if self._max_hours is not None and time.monotonic() - self._started_s >= self._max_hours * 3600:
            return f"train.max_hours={self._max_hours:g} are over"
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number).name
