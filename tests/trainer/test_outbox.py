"""The outbox against a store that fails on command: order, once, bounds, and an end in any case."""

import logging
import threading
import time

import pytest

from trainer import outbox
from trainer.outbox import Outbox


class Store:
    """Takes points and calls while ``error`` is None, raises it otherwise."""

    def __init__(self) -> None:
        self.points: list[int] = []
        self.error: Exception | None = None
        self.attempted = threading.Event()

    def take(self, points: list[int]) -> None:
        self.attempted.set()
        if self.error is not None:
            raise self.error
        self.points += points


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SEND_EVERY_S", 0.01)


def open_outbox(store: Store) -> Outbox[int]:
    return Outbox("run", store.take, is_refusal=lambda error: isinstance(error, KeyError))


def test_points_arrive_once_and_in_order_over_many_batches() -> None:
    store = Store()
    box = open_outbox(store)
    for start in range(0, 5000, 7):
        box.put(range(start, min(start + 7, 5000)))
    assert box.close(wait_s=10) == 0
    assert store.points == list(range(5000))


def test_what_a_dead_store_missed_arrives_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    store, texts = Store(), []
    store.error = ConnectionError("down")
    box = open_outbox(store)
    with caplog.at_level(logging.WARNING):
        box.put(range(10))
        box.call("text", lambda: texts.append("hello"))
        assert store.attempted.wait(10)
        store.error = None
        assert box.close(wait_s=10) == 0
    assert (store.points, texts) == (list(range(10)), ["hello"])
    assert [record.message for record in caplog.records].count(
        "run: no answer; training goes on, what is logged is kept and sent again. down"
    ) == 1


def test_beyond_its_bound_the_oldest_points_are_given_up_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_KEPT_POINTS", 100)
    store = Store()
    store.error = ConnectionError("down")
    box = open_outbox(store)
    box.put(range(250))
    assert store.attempted.wait(10)
    while len(box._points) > 100:  # the thread trims right after the failed attempt
        time.sleep(0.01)
    store.error = None
    assert box.close(wait_s=10) == 150
    assert store.points == list(range(150, 250))


def test_what_the_store_refuses_for_good_does_not_hold_up_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    store, done = Store(), []

    def refuse() -> None:
        raise KeyError("no such artifact")

    box = open_outbox(store)
    box.call("bad text", refuse)
    box.call("good text", lambda: done.append(True))
    box.put([1, 2])
    with caplog.at_level(logging.WARNING):
        assert box.close(wait_s=10) == 0
    assert (store.points, done) == ([1, 2], [True])
    assert "not sent: bad text" in caplog.text


def test_close_gives_up_on_a_dead_store_and_says_what_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.error = ConnectionError("down")
    box = open_outbox(store)
    box.put(range(3))
    box.call("student", lambda: store.take([]))
    with caplog.at_level(logging.WARNING):
        assert box.close(wait_s=0.1) == 3
    assert "3 points were lost; not sent: student" in caplog.text


def test_close_leaves_a_call_that_hangs() -> None:
    store, release = Store(), threading.Event()
    box = open_outbox(store)
    box.call("hangs", release.wait)
    assert box.close(wait_s=0.05) == 0  # returning at all is the point
    release.set()


def test_a_failing_sample_ends_the_samples_and_nothing_else() -> None:
    store = Store()

    def sample() -> list[int]:
        raise OSError("driver gone")

    box = Outbox("run", store.take, is_refusal=lambda error: False, sample=sample)
    box.put([1])
    assert box.close(wait_s=10) == 0
    assert store.points == [1]
