"""A run on a person's terminal: one live panel, above it the lines of everything that happens.

Where rank 0's stderr is no terminal (a Slurm log, a file, a pipe) there is no panel: every report is a line.
"""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from configs.public import public
from launcher.wording import KINDS, duration

REFRESHES_PER_S = 1.0  # the clock runs, and the training's threads are left alone
PARTS = ("data", "teacher", "forward", "losses", "backward", "optimizer", "other")

Figures = Mapping[str, Mapping[str, float]]
"""By student and key."""


@dataclass
class View:
    """What the panel shows; whoever trains writes it, the panel's thread reads it."""

    name: str
    total_steps: int
    total_rows: int
    where: str = ""
    """In MLflow, or in the run folder."""
    step: int = 0
    rows: int = 0
    speed: Mapping[str, float] = field(default_factory=dict)
    students: Figures = field(default_factory=dict)
    heldout: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """By student: step, total loss, and the total loss of the first evaluation."""
    saved: tuple[int, float] | None = None
    """The newest checkpoint's step, and when it was whole (monotonic seconds)."""
    reported_s: float = field(default_factory=time.monotonic)

    def report(self, step: int, rows: int, speed: Mapping[str, float], students: Figures) -> None:
        """Take over a report of the loop."""
        self.step, self.rows, self.speed, self.students = step, rows, speed, students
        self.reported_s = time.monotonic()

    def evaluated(self, step: int, totals: Mapping[str, float]) -> None:
        """Take over an evaluation: the total held-out loss by student."""
        for name, total in totals.items():
            first = self.heldout[name][2] if name in self.heldout else total
            self.heldout[name] = step, total, first

    def __rich__(self) -> RenderableType:
        """Return the panel."""
        lines: list[RenderableType] = [self._progress()]
        if self.speed:
            lines += [self._left(), self._speed(), self._table()]
        else:
            lines.append(Text("the first report comes after log.every_steps steps", style="dim"))
        if self.where:
            lines.append(Text(public(self.where), style="dim", overflow="ellipsis", no_wrap=True))
        return Panel(Group(*lines), title=public(self.name), title_align="left", border_style="blue")

    def _progress(self) -> RenderableType:
        share = self.step / self.total_steps if self.total_steps else 1.0
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_row(
            f"step {self.step}/{self.total_steps}",
            ProgressBar(total=1.0, completed=share),
            f"{share:.0%}   {self.rows:,} of {self.total_rows:,} rows",
        )
        return grid

    def _left(self) -> Text:
        """Time left, both ways; it runs down between reports."""
        since_s = time.monotonic() - self.reported_s
        left_s = max(0.0, self.speed["time/eta_s"] - since_s)
        steps_s = max(0.0, self.speed["time/eta_by_rows_s"] - since_s)
        end = time.strftime("%a %H:%M", time.localtime(time.time() + left_s))
        text = Text("ETA ").append(duration(left_s), style="bold")
        text.append(f" by the wall clock ({end}), {duration(steps_s)} by rows")
        if self.saved is not None:
            ago = duration(time.monotonic() - self.saved[1])
            text.append(f"   saved step {self.saved[0]}, {ago} ago", style="green")
        return text

    def _speed(self) -> Text:
        speed = self.speed
        text = Text(f"{speed['speed/rows_per_s']:,.1f} rows/s  {speed['speed/tokens_per_s']:,.0f} tokens/s")
        if "speed/mfu" in speed:
            text.append(f"  MFU {speed['speed/mfu']:.1%}")
        shares = [(part, speed.get(f"share/{part}", 0.0)) for part in PARTS]
        shown = "  ".join(f"{part} {share:.0%}" for part, share in shares if share >= 0.005)
        return text.append(f"   {shown}", style="dim")

    def _table(self) -> Table:
        kinds = [kind for kind in KINDS if any(_kind(own, kind) for own in self.students.values())]
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("student", no_wrap=True)
        for heading in ("loss", *kinds, "held-out", "of the first", "grad", "lr"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, figures in self.students.items():
            heldout = share = ""
            if name in self.heldout:
                step, total, first = self.heldout[name]
                heldout = f"{total:.4f} at {step}"
                share = f"{total / first:.1%}" if first else ""
            table.add_row(
                name,
                f"{figures['loss/total']:.4f}",
                *(
                    f"{sum(found) / len(found):.4f}" if (found := _kind(figures, kind)) else ""
                    for kind in kinds
                ),
                heldout,
                share,
                f"{figures['optimizer/grad_norm']:.2f}",
                f"{figures['optimizer/lr']:.1e}",
            )
        return table


def _kind(figures: Mapping[str, float], kind: str) -> list[float]:
    """The values of one kind of loss, of all layers."""
    return [value for key, value in figures.items() if key.removeprefix("loss/").split("/")[0] == kind]


class Terminal:
    """The live panel of rank 0; a context, so that it leaves the terminal as it found it."""

    def __init__(self, view: View, console: Console | None = None) -> None:
        self.view = view
        self.console = console or Console(stderr=True)
        self.live = Live(view, console=self.console, refresh_per_second=REFRESHES_PER_S)
        self._streams: list[tuple[logging.StreamHandler, object]] = []

    @property
    def is_live(self) -> bool:
        """Whether a person sees the panel; else reports have to be lines."""
        return self.console.is_terminal and not self.console.quiet

    def __enter__(self) -> "Terminal":
        """Show the panel; what is logged appears above it."""
        if self.is_live:
            self.live.start()
            # The handlers took stderr as it was; ``Live`` has put its own in its place.
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler):
                    self._streams.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the panel's last state on the terminal, and go on below it."""
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams.clear()
        if self.is_live:
            self.live.stop()
