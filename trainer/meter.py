"""What a run measures of itself: losses as exact global means, speed, waiting, time left."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharding.stream import Batch
from trainer.clock import Clock
from trainer.layout import Counts
from trainer.transfer import Transfer, denominators, weights
from trainer.world import World, sum_over_ranks


@dataclass
class LossMeter:
    """Global mean of every loss term over a span of steps.

    A step's global loss is the sum over ranks and micro batches of ``sum / denominator``, so adding these
    shares up and reducing them once per span gives the exact mean at the cost of one collective.
    """

    shares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sums: Mapping[str, Tensor], denominators: Mapping[str, float]) -> None:
        """Add this rank's share of one micro batch, a sum per row; nothing is read back from the device."""
        for key, value in sums.items():
            share = value.detach().sum().double() / denominators[key]
            self.shares[key] = self.shares.get(key, torch.zeros_like(share)) + share

    def means(self, weights: Mapping[str, float], steps: int) -> dict[str, float]:
        """Return the mean per step of every term and of the weighted ``total``, and reset (collective)."""
        keys = list(weights)
        reduced = sum_over_ranks(torch.stack([self.shares[key] for key in keys])) / steps
        self.shares = {}
        values = dict(zip(keys, reduced.tolist(), strict=True))
        return {"total": sum(weights[key] * value for key, value in values.items()), **values}


class CorpusMeter:
    """Mean of every loss term over all valid elements of a span, for all rows and for each corpus's."""

    def __init__(self, names: Sequence[str], transfer: Transfer, teacher_hidden_size: int) -> None:
        self.names, self.transfer, self.teacher_hidden_size = names, transfer, teacher_hidden_size
        self._sums: dict[str, Tensor] = {}  # float64 [corpora]
        self._counts: Tensor | None = None  # of ``trainer.layout.row_counts``: int64 [corpora, 3]

    def add(self, sums: Mapping[str, Tensor], corpus_B: Tensor, counts_B3: Tensor) -> None:
        """Add one micro batch: a sum per row and term, each row's corpus and counts."""
        if self._counts is None:
            self._counts = counts_B3.new_zeros(len(self.names), 3)
            self._sums = {key: corpus_B.new_zeros(len(self.names), dtype=torch.float64) for key in sums}
        self._counts.index_add_(0, corpus_B, counts_B3)
        for key, value_B in sums.items():
            self._sums[key].index_add_(0, corpus_B, value_B.detach().double())

    def means(self, device: torch.device) -> dict[str, float]:
        """Return the means, and reset (collective).

        Keys are the terms and their weighted ``total``; with several corpora these once more under
        ``corpus/<name>/``, for the corpora that have rows in the span.
        """
        keys, corpora = list(weights(self.transfer)), len(self.names)
        sums = torch.zeros(len(keys), corpora, device=device, dtype=torch.float64)
        counts = torch.zeros(corpora, 3, device=device, dtype=torch.int64)
        if self._counts is not None:  # this rank has seen rows
            sums, counts = torch.stack([self._sums[key] for key in keys]), self._counts
        sums, counts = sum_over_ranks(sums), sum_over_ranks(counts)
        self._counts = None
        found = self._weighed(
            dict(zip(keys, sums.sum(dim=1).tolist(), strict=True)), Counts(*counts.sum(dim=0).tolist())
        )
        for index, name in enumerate(self.names if corpora > 1 else ()):
            counted = Counts(*counts[index].tolist())
            if counted.tokens:
                own = self._weighed(dict(zip(keys, sums[:, index].tolist(), strict=True)), counted)
                found |= {f"corpus/{name}/{key}": value for key, value in own.items()}
        return found

    def _weighed(self, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        counted = denominators(self.transfer, counts.positive(), self.teacher_hidden_size)
        values = {key: value / counted[key] for key, value in sums.items()}
        of_term = weights(self.transfer)
        return {"total": sum(of_term[key] * value for key, value in values.items()), **values}


PARTS = ("forward", "losses", "backward", "optimizer")  # of a student's step


@dataclass
class SpeedMeter:
    """Rows and tokens per second over all ranks, where this rank's time goes, time left."""

    flops_per_row: float | None
    """Model operations per row: teacher forward, and three forwards' worth for every student; None when an
    architecture's are not known, which leaves the two figures out that need them."""
    floor_s_per_row: float
    """Seconds that one rank's matrix units would need for a row's operations at their measured rate."""
    clock: Clock
    """Takes the time of a step's parts: ``data``, ``teacher``, ``<student>/<part>`` for all of ``PARTS``; and
    of ``checkpoint``, between steps."""
    rows: int = 0  # since the last report, over all ranks
    tokens: int = 0
    steps: int = 0
    span_s: float = 0.0  # of steps; evaluation and saving are left out
    total_rows: int = 0  # of this process, over all reports
    total_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)  # per step of the span last reported
    _clock_s: dict[str, float] = field(default_factory=dict)  # the clock's, at the last report
    _asked_s: float = 0.0  # when the step in progress asked for its rows
    _began_s: float | None = None  # when this process's first step did
    _reported_s: float = field(default_factory=time.perf_counter)  # when the last report was made

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; the time that each step waits for its own is kept."""
        iterator = iter(batches)
        while True:
            self._asked_s = time.perf_counter()
            self._began_s = self._asked_s if self._began_s is None else self._began_s
            with self.clock.part("data"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def add(self, rows: int, tokens: int) -> None:
        """Close a step of ``rows`` and ``tokens`` over all ranks."""
        self.span_s += time.perf_counter() - self._asked_s
        self.rows += rows
        self.tokens += tokens
        self.steps += 1

    def report(self, rows_left: int, world: World) -> dict[str, float]:
        """Return this span's figures and reset.

        Of the time left there are two: ``time/eta_s`` by the wall clock since this process's first step, with
        evaluations, saves and whatever else came between steps; ``time/eta_by_rows_s`` as if the rest were
        nothing but steps at this span's speed.
        """
        self.total_rows += self.rows
        self.total_s += self.span_s
        wall_s = time.perf_counter() - self._began_s if self._began_s is not None else self.total_s
        rows_per_s = self.rows / self.span_s
        split_s = self._split()
        figures = {
            "speed/rows_per_s": rows_per_s,
            "speed/tokens_per_s": self.tokens / self.span_s,
            "speed/step_s": self.span_s / self.steps,
            "time/eta_s": rows_left * wall_s / self.total_rows,
            "time/eta_by_rows_s": rows_left / rows_per_s,
            **{f"time/{part}_s": part_s for part, part_s in split_s.items()},
            **{f"share/{part}": part_s * self.steps / self.span_s for part, part_s in split_s.items()},
            **self._checkpoint(),
            **_memory(world),
        }
        if self.flops_per_row is not None:
            rows_per_rank_s = rows_per_s / world.size
            figures["speed/tflops_per_rank"] = rows_per_rank_s * self.flops_per_row / 1e12
            figures["speed/mfu"] = rows_per_rank_s * self.floor_s_per_row
        self.forget()
        return figures

    def forget(self) -> None:
        """Begin a new span; what its parts have taken so far belongs to none."""
        self.rows = self.tokens = self.steps = 0
        self.span_s = 0.0
        self._clock_s = self.clock.totals()

    def _checkpoint(self) -> dict[str, float]:
        """Seconds that saves have held training up since the last report; their share of all time."""
        waited_s, before_s = self.parts_s.get("checkpoint", 0.0) * self.steps, self._reported_s
        self._reported_s = time.perf_counter()
        share = waited_s / (self._reported_s - before_s)
        return {"time/checkpoint_s": waited_s, "share/checkpoint": share}

    def of_student(self, name: str) -> dict[str, float]:
        """Return one student's own seconds per step over the span last reported."""
        return {f"time/{part}_s": self.parts_s.get(f"{name}/{part}", 0.0) for part in PARTS}

    def seconds(self) -> dict[str, float]:
        """Return the seconds that all parts of steps, and steps as ``step``, have taken in this process."""
        parts_s = {part: own_s for part, own_s in self.clock.totals().items() if part != "checkpoint"}
        return {"step": self.total_s + self.span_s, **parts_s}

    def _split(self) -> dict[str, float]:
        """Seconds per step of the span's parts, over all students; they add up to the step.

        Communication counts where it happens: gradients in ``backward`` and ``optimizer``, at ZeRO stage 3
        weights in ``forward``; what is left is ``other``. ``trainer.profile`` tells it apart.
        """
        now_s = self.clock.totals()
        self.parts_s = {part: (now_s[part] - self._clock_s.get(part, 0.0)) / self.steps for part in now_s}
        self._clock_s = now_s
        split_s = {part: self.parts_s.get(part, 0.0) for part in ("data", "teacher")}
        for part in PARTS:
            split_s[part] = sum(own_s for name, own_s in self.parts_s.items() if name.endswith(f"/{part}"))
        return split_s | {"other": self.span_s / self.steps - sum(split_s.values())}


def _memory(world: World) -> dict[str, float]:
    if world.device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(world.device) / 2**30}
    with open("/proc/self/status", encoding="ascii") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {"memory/peak_gib": peak_kib / 2**20}
