"""A bounded queue and the thread that empties it into a store which may be slow, down or gone.

Training puts points (metrics) and calls (anything else to be sent) in and never waits. Only the thread
takes out, and only what the store has taken or refused for good; the rest is sent again, so sending the
same thing twice must be harmless.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

SEND_EVERY_S = 1.0
MAX_DOUBLINGS = 5  # of the pause between attempts that fail: at most 32 s
MAX_BATCH_POINTS = 1000
MAX_KEPT_POINTS = 100_000  # about 30 MB of metrics; beyond it the oldest are given up

Point = TypeVar("Point")


class Outbox(Generic[Point]):
    """Two queues, of points and of calls, and their thread, which ends with ``close`` or the process."""

    def __init__(
        self,
        name: str,
        send_points: Callable[[list[Point]], object],
        is_refusal: Callable[[Exception], bool],
        sample: Callable[[], list[Point]] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            name: Named in warnings.
            send_points: Takes up to ``MAX_BATCH_POINTS`` points, or raises.
            is_refusal: Whether an exception means that the store will never take it.
            sample: Asked for further points before every send.
        """
        self._name = name
        self._send_points = send_points
        self._is_refusal = is_refusal
        self._sample = sample
        self._lock = threading.Lock()  # guards the two queues
        self._points: deque[Point] = deque()
        self._calls: deque[tuple[str, Callable[[], object]]] = deque()
        self._lost_points = 0
        self._lost_calls: list[str] = []
        self._failures = 0  # in a row
        self._last_success_s = time.monotonic()
        self._wait_s = 0.0  # patience once closing
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, points: Iterable[Point]) -> None:
        """Queue points. They are sent in this order."""
        with self._lock:
            self._points.extend(points)

    def call(self, what: str, send: Callable[[], object]) -> None:
        """Queue a call, named ``what`` in warnings. A call that fails lets the others go first."""
        with self._lock:
            self._calls.append((what, send))

    def close(self, wait_s: float) -> int:
        """Send what is queued and return the number of points lost.

        Gives up ``wait_s`` after the last thing that the store took, and after ten times that in all.
        """
        self._wait_s, self._last_success_s = wait_s, time.monotonic()
        self._closing.set()
        self._thread.join(10 * wait_s)
        with self._lock:
            lost_points = self._lost_points + len(self._points)
            lost_calls = self._lost_calls + [what for what, _ in self._calls]
        if lost_points or lost_calls:
            self._warn(f"{lost_points} points were lost; not sent: {', '.join(lost_calls) or 'nothing else'}")
        return lost_points

    def _warn(self, text: str) -> None:
        logger.warning("%s: %s", self._name, text)

    def _work(self) -> None:
        while not self._closing.wait(SEND_EVERY_S * 2 ** min(self._failures, MAX_DOUBLINGS)):
            self._take_sample()
            self._drain()
        while not self._drain() and time.monotonic() < self._last_success_s + self._wait_s:
            time.sleep(SEND_EVERY_S)

    def _take_sample(self) -> None:
        try:
            if self._sample is not None:
                self.put(self._sample())
        except Exception as error:  # it reads drivers of all kinds; not worth a run
            self._warn(f"no more samples: {error}")
            self._sample = None

    def _drain(self) -> bool:
        """Send until nothing is queued (True) or something has to be sent again (False)."""
        while self._points or self._calls:
            with self._lock:
                batch = [self._points[index] for index in range(min(MAX_BATCH_POINTS, len(self._points)))]
                what, send = ("", partial(self._send_points, batch)) if batch else self._calls[0]
            try:
                send()
                self._failures, self._last_success_s = 0, time.monotonic()
            except Exception as error:
                if not self._is_refusal(error):
                    self._keep(error)
                    return False
                self._warn(f"{what or f'{len(batch)} points'} refused for good: {error}")
                self._lost_points += len(batch)
                self._lost_calls += [what] if what else []
            with self._lock:
                for _ in batch:
                    self._points.popleft()
                if not batch:
                    self._calls.popleft()
        return True

    def _keep(self, error: Exception) -> None:
        """After a failure: say it once, bound the memory, let another call go first next time."""
        if self._failures == 0:
            self._warn(f"no answer; training goes on, what is logged is kept and sent again. {error}")
        self._failures += 1
        with self._lock:
            while len(self._points) > MAX_KEPT_POINTS:
                self._points.popleft()
                self._lost_points += 1
            self._calls.rotate(-1)
