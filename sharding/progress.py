"""How far a build is: a bar on a terminal, a line now and then elsewhere."""

import datetime
import sys
import time

from tqdm import tqdm

LINE_EVERY_S = 30.0


class Progress:
    """One phase of a build. Use as a context.

    Args:
        phase: its name.
        total: of what is counted, source bytes or tokens; 0 when it is not known.
        done: how much of it an earlier start did.
        unit: what is counted.
        visible: show anything at all.
    """

    def __init__(self, phase: str, total: int, done: int, unit: str, visible: bool) -> None:
        self.phase, self.total, self.unit, self.visible = phase, total, unit, visible
        self.done, self.start = done, done
        self.documents = self.tokens = 0  # of this start

    def __enter__(self) -> "Progress":
        on_terminal = self.visible and sys.stderr.isatty()
        self._bar = tqdm(
            total=self.total or None,
            initial=self.done,
            desc=self.phase,
            unit=self.unit,
            unit_scale=True,
            disable=not on_terminal,
        )
        self._lines = self.visible and not on_terminal
        self._started_s = self._last_line_s = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    @property
    def share(self) -> float | None:
        """Done of the total; None when that is not known."""
        return self.done / self.total if self.total else None

    def advance(self, done: int, documents: int, tokens: int) -> None:
        """Count one piece of work."""
        self.done += done
        self.documents += documents
        self.tokens += tokens
        self._bar.set_postfix_str(self._counts(), refresh=False)
        self._bar.update(done)
        now_s = time.monotonic()
        if self._lines and now_s - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = now_s
            print(f"{self.phase}: {self._line(now_s - self._started_s)}", file=sys.stderr, flush=True)

    def _counts(self) -> str:
        documents = f"{self.documents:,} documents, " if self.documents else ""
        return f"{documents}{self.tokens:,} tokens"

    def _line(self, taken_s: float) -> str:
        line = self._counts()
        if self.total and self.done > self.start:
            left_s = taken_s * (self.total - self.done) / (self.done - self.start)
            line = f"{self.done / self.total:.1%}, {line}, {datetime.timedelta(seconds=round(left_s))} left"
        return line
