"""What a run measures of itself: losses as exact global means, speed, waiting, time left."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharding.stream import Batch
from trainer.world import World, sum_over_ranks


@dataclass
class LossMeter:
    """Global mean of every loss term over a span of steps.

    A step's global loss is the sum over ranks and micro batches of ``sum / denominator``, so adding these
    shares up and reducing them once per span gives the exact mean at the cost of one collective.
    """

    shares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sums: Mapping[str, Tensor], denominators: Mapping[str, float]) -> None:
        """Add this rank's share of one micro batch; nothing is read back from the device."""
        for key, value in sums.items():
            share = value.detach().double() / denominators[key]
            self.shares[key] = self.shares.get(key, torch.zeros_like(share)) + share

    def means(self, weights: Mapping[str, float], steps: int) -> dict[str, float]:
        """Return the mean per step of every term and of the weighted ``total``, and reset (collective)."""
        keys = list(weights)
        reduced = sum_over_ranks(torch.stack([self.shares[key] for key in keys])) / steps
        self.shares = {}
        values = dict(zip(keys, reduced.tolist(), strict=True))
        return {"total": sum(weights[key] * value for key, value in values.items()), **values}


@dataclass
class SpeedMeter:
    """Rows and tokens per second over all ranks, the share of time spent waiting for data, time left."""

    flops_per_row: float | None
    """Model operations per row: teacher forward, and three forwards' worth for every student; None when an
    architecture's are not known, which leaves the two figures out that need them."""
    floor_s_per_row: float
    """Seconds that one rank's matrix units would need for a row's operations at their measured rate."""
    rows: int = 0  # since the last report, over all ranks
    tokens: int = 0
    steps: int = 0
    wait_s: float = 0.0
    span_s: float = 0.0  # of steps; evaluation and saving are left out
    total_rows: int = 0  # of this process, over all reports
    total_s: float = 0.0
    _asked_s: float = 0.0  # when the step in progress asked for its rows

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; the time that each step waits for its own is kept."""
        iterator = iter(batches)
        while True:
            self._asked_s = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.wait_s += time.perf_counter() - self._asked_s
            yield batch

    def add(self, rows: int, tokens: int) -> None:
        """Close a step of ``rows`` and ``tokens`` over all ranks."""
        self.span_s += time.perf_counter() - self._asked_s
        self.rows += rows
        self.tokens += tokens
        self.steps += 1

    def report(self, rows_left: int, world: World) -> dict[str, float]:
        """Return this span's figures and reset; the time left goes by the mean speed of this process."""
        self.total_rows += self.rows
        self.total_s += self.span_s
        rows_per_s = self.rows / self.span_s
        figures = {
            "speed/rows_per_s": rows_per_s,
            "speed/tokens_per_s": self.tokens / self.span_s,
            "speed/step_s": self.span_s / self.steps,
            "data/wait_s": self.wait_s / self.steps,
            "data/wait_share": self.wait_s / self.span_s,
            "time/eta_s": rows_left * self.total_s / self.total_rows,
            **_memory(world),
        }
        if self.flops_per_row is not None:
            rows_per_rank_s = rows_per_s / world.size
            figures["speed/tflops_per_rank"] = rows_per_rank_s * self.flops_per_row / 1e12
            figures["speed/mfu"] = rows_per_rank_s * self.floor_s_per_row
        self.rows = self.tokens = self.steps = 0
        self.wait_s = self.span_s = 0.0
        return figures


def _memory(world: World) -> dict[str, float]:
    if world.device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(world.device) / 2**30}
    with open("/proc/self/status", encoding="ascii") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {"memory/peak_gib": peak_kib / 2**20}
