"""The watchdog: a rank that stops moving says where it stands, and ends.

A process that hangs, a node that dies and a link that goes down look alike to the other ranks: silence in a
collective. So a rank's loop gives a *beat* with every place that it reaches. When none comes for the limit, a
thread prints rank, host, place and every thread's stack, and ends the process, whatever its main thread waits
for. All ranks print: they wait in the same collective, but for the one that is to blame.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback

from trainer import exits
from trainer.world import World

STDERR = 2
GRACE_S = 5.0
"""Time between the print and the end. Without it the first to end would have ended the others, whose last
beats came a little later, before they print."""


class Watchdog:
    """Ends this process when no beat has come for the limit.

    Code that holds Python's interpreter lock holds up the thread as well. For that the C library's timers
    stand by, which the thread puts off as long as it runs: they print the stacks (faulthandler), and end the
    process by SIGALRM.
    """

    def __init__(self, world: World, limit_s: float) -> None:
        """Begin to watch.

        Args:
            world: the ranks; this one is named in the print.
            limit_s: longest time without a beat, in seconds.
        """
        self._who = f"rank {world.rank} of {world.size} ({socket.gethostname()}, process {os.getpid()})"
        self._limit_s = limit_s
        self._last = (time.monotonic(), "the start")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, place: str) -> None:
        """Note that the main thread moves, and what it does next; costs well under a microsecond."""
        self._last = (time.monotonic(), place)

    def limit(self, seconds: float) -> None:
        """Set the longest time without a beat; it begins anew."""
        self._last = (time.monotonic(), self._last[1])
        self._limit_s = seconds

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self) -> None:
        while True:
            limit_s = self._limit_s
            backstop_s = limit_s + 2 * min(GRACE_S, limit_s)
            faulthandler.dump_traceback_later(backstop_s, file=STDERR)
            signal.setitimer(signal.ITIMER_REAL, backstop_s + 1)
            if self._closed.wait(min(1.0, limit_s / 10)):
                return
            beat_s, place = self._last
            if time.monotonic() - beat_s > self._limit_s:
                break
        faulthandler.cancel_dump_traceback_later()
        os.write(STDERR, self._report(place).encode(errors="replace"))  # in one: other ranks print as well
        self._closed.wait(min(GRACE_S, self._limit_s))
        os._exit(exits.LOST)

    def _report(self, place: str) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"  thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
            if ident != threading.get_ident()
        ]
        return (
            f"\nhung: {self._who} has not moved for {self._limit_s:g} s. It was in: {place}\n"
            f"{''.join(stacks)}It ends now with code {exits.LOST}: start again from the newest checkpoint. "
            "A rank that is behind the others, or prints nothing, is to blame; where all wait in one "
            "collective, the network is. If all is well and only slow, raise timeouts.start_s (before the "
            "first step) or timeouts.step_s.\n"
        )
