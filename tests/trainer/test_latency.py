"""Latency by a clock of the test's own."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.latency import Latency, measure, random_rows
from trainer.served import Forward, Ids


def test_percentiles_of_what_each_call_took_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    called: list[tuple[str, tuple[int, ...]]] = []

    def runtime(name: str, takes_ms: list[float]) -> Forward:
        takes = iter(takes_ms)

        def forward(ids: Ids, mask: Ids, types: Ids) -> dict[str, NDArray[np.float32]]:
            nonlocal now_s
            now_s += next(takes) / 1e3
            called.append((name, ids.shape))
            return {}

        return forward

    monkeypatch.setattr("trainer.latency.time.perf_counter", lambda: now_s)
    # Of each: two calls to warm up, then five, for 2 rows; the same for 3 rows.
    slow = runtime("slow", [900, 900, 10, 50, 20, 40, 30, 900, 900, 1, 1, 1, 1, 1])
    fast = runtime("fast", [900, 900, 1, 1, 1, 1, 101, 900, 900, 2, 2, 2, 2, 2])
    found = measure({"slow": slow, "fast": fast}, rows=(2, 3), seq_len=8, calls=5, warm_calls=2)
    assert [(own.runtime, own.rows) for own in found] == [("slow", 2), ("slow", 3), ("fast", 2), ("fast", 3)]
    assert [own.p50_ms for own in found] == pytest.approx([30, 1, 1, 2])
    assert [own.p90_ms for own in found] == pytest.approx([46, 1, 61, 2])
    assert [own.p99_ms for own in found] == pytest.approx([49.6, 1, 97, 2])
    assert found[0].rows_per_s == pytest.approx(2 / 0.030)
    assert called == [("slow", (2, 8)), ("fast", (2, 8))] * 7 + [("slow", (3, 8)), ("fast", (3, 8))] * 7


def test_rows_are_full_and_the_same_every_time() -> None:
    ids, mask, types = random_rows(4, 16, 100)
    again, _, _ = random_rows(4, 16, 100)
    assert np.array_equal(ids, again) and ids.max() < 100 and len(np.unique(ids)) > 10
    assert ids.dtype == np.int64 and (mask == 1).all() and (types == 0).all()
    assert Latency("any", 1, 16, 1, 2.0, 2.0, 2.0).rows_per_s == 500
