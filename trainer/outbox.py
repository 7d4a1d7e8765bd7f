"""Between training and a store that may be slow, down or gone: a queue, a journal, two threads.

Training puts entries in and waits for nothing. One thread writes them to the journal at once, so that a disk
that hangs holds up this thread alone; the other delivers what the journal holds, so that a server that hangs
keeps nothing in memory that a killed process would take with it. What the store does not take stays in the
journal: for the next attempt, the next job in this folder, or ``launcher/track.py sync``.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from trainer.journal import Entry, Journal, Position

logger = logging.getLogger(__name__)

SEND_EVERY_S = 1.0
MAX_DOUBLINGS = 5  # of the pause between attempts that fail: at most 32 s
MAX_WAITING = 100_000  # entries in memory while the disk hangs; beyond it they are given up


class Outbox:
    """The queue and its threads, which end with ``close`` or the process."""

    def __init__(
        self,
        journal: Journal,
        deliver: Callable[[], object],
        sample: Callable[[], list[Entry]] = list,
    ) -> None:
        """Start the threads.

        Args:
            journal: written here, and delivered while this process holds its lock.
            deliver: delivers all that the journal holds, or raises.
            sample: asked for further entries every second, once something was put.
        """
        self.journal = journal
        self._deliver, self._sample = deliver, sample
        self._queue: deque[Entry] = deque()
        self._put = self._on_disk = 0  # entries so far
        self._lost = 0
        self._delivered = False  # all of it
        self._news, self._closing = threading.Event(), threading.Event()
        self._written, self._given_up = threading.Event(), threading.Event()
        self._writer = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._deliverer = threading.Thread(target=self._deliver_all, name="tracking", daemon=True)
        self._writer.start()
        self._deliverer.start()

    def put(self, entry: Entry) -> None:
        """Queue an entry. They are written and delivered in this order."""
        if len(self._queue) >= MAX_WAITING:
            self._lost += 1
        else:
            self._put += 1
            self._queue.append(entry)
            self._news.set()

    def flush(self, wait_s: float) -> bool:
        """Wait until all that was put so far is on disk; False if it was not in time."""
        put, until_s = self._put, time.monotonic() + wait_s
        while self._on_disk < put and time.monotonic() < until_s:
            time.sleep(0.005)
        return self._on_disk >= put

    def close(self, wait_s: float) -> int:
        """Deliver what is there, and return how many entries are not, in the journal or lost.

        Gives up ``wait_s`` after the last thing that the store took, and after ten times that in all.
        """
        self._closing.set()
        self._news.set()
        self._writer.join(wait_s)
        until_s, seen, seen_s = time.monotonic() + 10 * wait_s, self._progress(), time.monotonic()
        while self._deliverer.is_alive() and time.monotonic() < min(until_s, seen_s + wait_s):
            self._deliverer.join(0.05)
            if self._progress() != seen:
                seen, seen_s = self._progress(), time.monotonic()
        self._given_up.set()
        lost = self._lost + len(self._queue) + self.journal.unwritten
        if lost:
            logger.warning("%s did not take %d entries: they are lost", self.journal.folder, lost)
        if self._delivered:
            return 0
        left = self._count(wait_s)
        logger.warning(
            "%s entries are not delivered. They are kept; a job started again in this folder goes on "
            "delivering, and so does: python launcher/track.py sync %s",
            left or "some",
            self.journal.folder,
        )
        return left + lost

    def _progress(self) -> list[Position]:
        return list(self.journal.positions.values())

    def _count(self, wait_s: float) -> int:
        """What is left; 1 from a disk that does not say so in time."""
        found = [1]
        thread = threading.Thread(target=lambda: found.append(len(self.journal.left())), daemon=True)
        thread.start()
        thread.join(wait_s)
        return found[-1]

    def _write_all(self) -> None:
        failures = taken = 0
        while True:
            closing = self._closing.is_set()  # before the queue is emptied: nothing comes after
            self._news.clear()
            entries = [self._queue.popleft() for _ in range(len(self._queue))]
            taken += len(entries)
            try:
                self.journal.append([*entries, *(self._samples() if taken else [])])
                failures, self._on_disk = 0, taken
                if closing:
                    self.journal.close()
                    self._written.set()
                    return
            except OSError as error:
                if failures == 0:
                    logger.warning("%s: no room? %s. Training goes on", self.journal.folder, error)
                failures += 1
                time.sleep(_pause_s(failures))
            self._news.wait(SEND_EVERY_S)

    def _samples(self) -> list[Entry]:
        try:
            return self._sample()
        except Exception as error:  # not worth a run
            logger.warning("no more system metrics: %s", error)
            self._sample = list
            return []

    def _deliver_all(self) -> None:
        failures = 0
        while not self._given_up.is_set():
            closing = self._written.wait(_pause_s(failures))
            try:
                if not self.journal.lock():
                    raise ConnectionError(f"{self.journal.folder} is delivered by {self.journal.holder()}")
                self._deliver()
                failures = 0
                if closing:
                    self.journal.unlock()
                    self._delivered = True
                    return
            except Exception as error:  # every store and driver fails in its own way
                if failures == 0:
                    logger.warning(
                        "tracking cannot deliver; training goes on, what is logged is kept in %s: %s",
                        self.journal.folder,
                        error,
                    )
                failures += 1
                if closing:
                    self._given_up.wait(SEND_EVERY_S)
        self.journal.unlock()


def _pause_s(failures: int) -> float:
    return SEND_EVERY_S * 2.0 ** min(failures, MAX_DOUBLINGS)
