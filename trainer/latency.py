"""How long a served model takes for rows: percentiles of many calls, warm, runtimes in turns.

What is timed is a call as a server makes it: host arrays in, host arrays out, the copies to a GPU and back
included.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.served import Forward, Ids


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call with ``rows`` rows of ``seq_len`` tokens, over ``calls`` calls."""

    runtime: str
    rows: int
    seq_len: int
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @property
    def rows_per_s(self) -> float:
        """Throughput of one call after the other, at the median."""
        return 1e3 * self.rows / self.p50_ms


def measure(
    runtimes: Mapping[str, Forward],
    *,
    rows: Sequence[int] = (1, 32),
    seq_len: int = 128,
    vocab_size: int = 1000,
    calls: int = 50,
    warm_calls: int = 3,
) -> list[Latency]:
    """Time every runtime at every number of rows; all tokens are valid.

    The runtimes take turns, call by call, so that what else the machine does meets all alike.

    Args:
        runtimes: by name; threads, device and precision are theirs.
        vocab_size: token ids are drawn below it.
        calls: counted for each; ``warm_calls`` more come first.

    Returns:
        One entry for every runtime and number of rows, in that order.
    """
    found: dict[tuple[str, int], Latency] = {}
    for count in rows:
        batch = random_rows(count, seq_len, vocab_size)
        taken_s: dict[str, list[float]] = {name: [] for name in runtimes}
        for turn in range(warm_calls + calls):
            for name, forward in runtimes.items():
                started_s = time.perf_counter()
                forward(*batch)
                if turn >= warm_calls:
                    taken_s[name].append(time.perf_counter() - started_s)
        for name, own_s in taken_s.items():
            p50, p90, p99 = 1e3 * np.percentile(own_s, (50, 90, 99))
            found[name, count] = Latency(name, count, seq_len, calls, float(p50), float(p90), float(p99))
    return [found[name, count] for name in runtimes for count in rows]


def random_rows(rows: int, seq_len: int, vocab_size: int) -> tuple[Ids, Ids, Ids]:
    """Return ids, mask and token types of random full rows, int64 [rows, seq_len], the same every time."""
    ids_BS = np.random.default_rng(0).integers(0, vocab_size, (rows, seq_len))
    return ids_BS, np.ones_like(ids_BS), np.zeros_like(ids_BS)
