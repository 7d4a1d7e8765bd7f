"""The outbox over a real journal, against a store that fails on command."""

import errno
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import small_disk
from trainer import outbox
from trainer.journal import MAIN, Entry, Journal
from trainer.outbox import Outbox


class Store:
    """Takes what the journal holds while ``error`` is None, raises it otherwise."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.steps: list[int] = []
        self.error: Exception | None = None
        self.attempted = threading.Event()

    def deliver(self) -> None:
        self.attempted.set()
        if self.error is not None:
            raise self.error
        for entry, position in self.journal.read(MAIN, 10**6):
            self.steps += [entry["step"]] if entry["kind"] == "metrics" else []
            self.journal.advance(MAIN, position)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SEND_EVERY_S", 0.01)


def point(step: int) -> Entry:
    return {"kind": "metrics", "run": "", "at": 0, "step": step, "values": {"loss": 1.0}}


def test_what_a_dead_store_missed_arrives_in_order_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(Journal(tmp_path))
    store.error = ConnectionError("down")
    box = Outbox(store.journal, store.deliver)
    with caplog.at_level(logging.WARNING):
        for step in range(5000):
            box.put(point(step))
        assert store.attempted.wait(10)
        time.sleep(0.1)  # further attempts fail, and are not worth a line each
        assert box.flush(wait_s=10) and len(Journal(tmp_path).left()) == 5000
        store.error = None
        assert box.close(wait_s=10) == 0
    assert store.steps == list(range(5000))
    assert caplog.text.count("cannot deliver; training goes on") == 1


def test_close_gives_up_on_a_dead_store_and_the_next_job_delivers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(Journal(tmp_path))
    store.error = ConnectionError("down")
    box = Outbox(store.journal, store.deliver)
    for step in range(3):
        box.put(point(step))
    with caplog.at_level(logging.WARNING):
        assert box.close(wait_s=0.2) == 3
    assert "3 entries are not delivered. They are kept; a job started again" in caplog.text
    assert f"python launcher/track.py sync {tmp_path}" in caplog.text

    again = Store(Journal(tmp_path))
    box = Outbox(again.journal, again.deliver)
    for step in (1, 2, 3):  # the first two are trained once more
        box.put(point(step))
    assert box.close(wait_s=10) == 0
    assert again.steps == [0, 1, 2, 3]


def test_what_a_disk_did_not_take_is_not_delivered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that delivers has ended by the time that ``close`` looks at it."""
    monkeypatch.setattr(outbox, "MAX_WAITING", 1)
    store = Store(Journal(tmp_path))
    store.error = ConnectionError("down")
    box = Outbox(store.journal, store.deliver)

    def until_it_ended(record: logging.LogRecord) -> bool:
        if "they are lost" in record.getMessage():
            box._deliverer.join(10)
            assert not box._deliverer.is_alive()
        return True

    monkeypatch.setattr(logging.getLogger("trainer.outbox"), "filters", [until_it_ended])
    for step in range(1000):  # more than the thread can write meanwhile
        box.put(point(step))
    assert box.close(wait_s=0.2) == 1000
    assert "they are lost" in caplog.text and "entries are not delivered" in caplog.text


def test_neither_a_store_nor_a_disk_that_hangs_holds_anybody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    journal = Journal(tmp_path / "store")
    box = Outbox(journal, release.wait)
    box.put(point(1))
    assert box.close(wait_s=0.2) == 1 and len(Journal(tmp_path / "store").left()) == 1

    really = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: release.wait() and really(file))
    store = Store(Journal(tmp_path / "disk"))
    box = Outbox(store.journal, store.deliver)
    for step in range(2000):  # the thread hangs in the first
        box.put(point(step))
    assert not box.flush(wait_s=0.05)
    with caplog.at_level(logging.WARNING):
        box.close(wait_s=0.2)  # returning at all is the point
    assert "entries: they are lost" in caplog.text
    release.set()


def test_a_full_disk_costs_nothing_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 16 * 4096) as disk:
        store = Store(Journal(disk / "tracking"))
        filler = disk / "filler"
        box = Outbox(store.journal, store.deliver)
        store.error = ConnectionError("down")  # so that nothing delivered makes room
        box.put(point(0))
        while not store.journal.left():
            time.sleep(0.01)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        with caplog.at_level(logging.WARNING):
            for step in range(1, 200):
                box.put(point(step))
            while "Training goes on" not in caplog.text:
                time.sleep(0.01)
            filler.unlink()
            store.error = None
            assert box.close(wait_s=10) == 0
        assert list(dict.fromkeys(store.steps)) == list(range(200))  # some twice: harmless, they are the same


def test_a_failing_sample_ends_the_samples_and_nothing_else(tmp_path: Path) -> None:
    def sample() -> list[Entry]:
        raise OSError("driver gone")

    store = Store(Journal(tmp_path))
    box = Outbox(store.journal, store.deliver, sample)
    box.put(point(1))
    assert box.close(wait_s=10) == 0
    assert store.steps == [1]
