"""The node's cache: one fetch per entry, a budget that holds; no crash and no full disk breaks anything."""

import fcntl
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

from sharding.cache import NodeCache
from tests.conftest import small_disk

FORK = multiprocessing.get_context("fork")
SIZE = 10_000


def content_of(name: str) -> bytes:
    return sha256(name.encode()).digest() * (SIZE // 32) + bytes(SIZE % 32)


def never() -> bytes:
    raise AssertionError("fetched again")


def held(folder: Path) -> int:
    """Bytes of all entries, those in the making included, at an instant: nothing grows under this lock."""
    with open(folder / "used", "a") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        sizes = {}
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.is_file() and path.name != "used":
                    sizes[status.st_ino] = status.st_size  # it may get its name while it is looked at
        return sum(sizes.values())


def test_an_entry_is_fetched_once(tmp_path: Path) -> None:
    for _ in range(2):
        cache = NodeCache(str(tmp_path / "new" / "cache"), 10 * SIZE)
        assert cache.get("a", SIZE, lambda: content_of("a")) == content_of("a")
        assert cache.get("a", SIZE, never) == content_of("a")
        assert cache.read("a", 40, 7) == content_of("a")[40:47]
        assert cache.read("b", 0, 1) is None
    cache.discard("a", "test")
    assert cache.read("a", 0, 1) is None


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 10 * SIZE)

    def cut() -> Iterator[bytes]:
        yield content_of("a")[:100]
        raise ValueError("the connection went")

    with pytest.raises(ValueError, match="connection went"):
        cache.add("a", SIZE, cut)
    with pytest.raises(AssertionError, match="fetched again"):
        cache.get("a", SIZE, never)
    assert held(tmp_path) == 0 and list((tmp_path / "partial").iterdir()) == []
    pieces = [content_of("a")[:4000], content_of("a")[4000:]]
    assert cache.add("a", SIZE, lambda: pieces)
    assert cache.add("a", SIZE, cut)  # it is there, so nothing is fetched
    assert cache.read("a", 0, SIZE) == content_of("a")


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 10 * SIZE)
    for number in range(10):
        cache.get(f"{number}", SIZE, lambda number=number: content_of(f"{number}"))
    assert held(tmp_path) == 10 * SIZE
    cache.read("0", 0, 1)
    cache.get("10", SIZE, lambda: content_of("10"))
    assert held(tmp_path) <= 10 * SIZE
    assert {"0", "9", "10"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "1").exists()


def test_an_entry_that_is_being_read_may_go(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 2 * SIZE)
    cache.get("a", SIZE, lambda: content_of("a"))
    with open(tmp_path / "a", "rb") as file:
        for name in "bcd":
            cache.get(name, SIZE, lambda name=name: content_of(name))
        assert not (tmp_path / "a").exists()
        assert file.read() == content_of("a")


@pytest.mark.parametrize("text", ["", "torn", "00000000000000000000"])
def test_a_count_that_is_lost_is_made_anew(tmp_path: Path, text: str) -> None:
    cache = NodeCache(str(tmp_path), 4 * SIZE)
    for name in "abcd":
        cache.get(name, SIZE, lambda name=name: content_of(name))
    if text == "00000000000000000000":
        (tmp_path / "d").unlink()  # the only way to a number that is too high: less is there than was taken
    else:
        (tmp_path / "used").write_text(text)
    for name in "efgh":
        cache.get(name, SIZE, lambda name=name: content_of(name))
        assert held(tmp_path) <= 4 * SIZE
    assert cache.get("h", SIZE, never) == content_of("h")


def test_an_entry_larger_than_the_budget_passes_by(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = NodeCache(str(tmp_path), SIZE - 1)
    for _ in range(2):
        assert cache.get("a", SIZE, lambda: content_of("a")) == content_of("a")
    assert held(tmp_path) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"more than the cache's max_bytes={SIZE - 1}" in caplog.text


def test_a_disk_that_fills_costs_the_caching_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", 8 * 4096) as disk:
        cache = NodeCache(str(disk), 100 * SIZE)
        for number in range(8):
            name = f"{number}"
            assert cache.get(name, SIZE, lambda name=name: content_of(name)) == content_of(name)
        assert cache.get("0", SIZE, never) == content_of("0")
        assert list((disk / "partial").iterdir()) == []
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text


@pytest.mark.parametrize("folder", ["file/cache", "dangling/cache"])
def test_a_folder_that_cannot_be_used_costs_the_caching_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("/proc/no/such")
    cache = NodeCache(str(tmp_path / folder), 10 * SIZE)
    for _ in range(2):
        assert cache.get("a", SIZE, lambda: content_of("a")) == content_of("a")
        assert not cache.add("b", SIZE, lambda: [content_of("b")])
    assert len(caplog.records) == 1 and "reading goes on without it" in caplog.text


def test_a_folder_that_goes_in_between_is_made_again(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path / "cache"), 10 * SIZE)
    cache.get("a", SIZE, lambda: content_of("a"))
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert cache.get("a", SIZE, lambda: content_of("a")) == content_of("a")
    assert cache.get("a", SIZE, never) == content_of("a")


def slow_fetch(folder: str, name: str, count: str, seconds: float) -> None:
    """In a process: get an entry whose fetch takes a while, and leave a mark for each fetch."""

    def fetch() -> bytes:
        with open(count, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return content_of(name)

    assert NodeCache(folder, 10 * SIZE).get(name, SIZE, fetch) == content_of(name)


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; for ever is a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.005)


def test_processes_that_want_one_entry_fetch_it_once(tmp_path: Path) -> None:
    count = tmp_path / "fetches"
    arguments = (str(tmp_path / "cache"), "a", str(count), 0.3)
    processes = [FORK.Process(target=slow_fetch, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(count.read_text().splitlines()) == 1


def test_who_waits_takes_over_when_the_fetcher_is_killed(tmp_path: Path) -> None:
    count, folder = tmp_path / "fetches", tmp_path / "cache"
    first = FORK.Process(target=slow_fetch, args=(str(folder), "a", str(count), 1000.0))
    first.start()
    until(count.exists)
    second = FORK.Process(target=slow_fetch, args=(str(folder), "a", str(count), 0.0))
    second.start()
    os.kill(first.pid or 0, signal.SIGKILL)
    first.join()
    second.join()
    assert second.exitcode == 0
    assert len(count.read_text().splitlines()) == 2
    assert NodeCache(str(folder), 10 * SIZE).get("a", SIZE, never) == content_of("a")
    assert list((folder / "partial").iterdir()) == []


def test_the_rest_of_a_killed_process_is_swept_up_but_not_that_of_a_living_one(tmp_path: Path) -> None:
    folder, counts = tmp_path / "cache", [tmp_path / "0", tmp_path / "1"]
    processes = [
        FORK.Process(target=slow_fetch, args=(str(folder), f"{number}", str(counts[number]), 1000.0))
        for number in range(2)
    ]
    for process in processes:
        process.start()
    until(lambda: all(count.exists() for count in counts))
    os.kill(processes[0].pid or 0, signal.SIGKILL)
    processes[0].join()
    NodeCache(str(folder), 10 * SIZE)
    assert [path.name for path in (folder / "partial").iterdir()] == ["1"]
    os.kill(processes[1].pid or 0, signal.SIGKILL)
    processes[1].join()
    NodeCache(str(folder), 10 * SIZE)
    assert list((folder / "partial").iterdir()) == []


def test_a_lock_that_a_forked_child_inherited_is_free_when_its_fetch_is_done(tmp_path: Path) -> None:
    """DataLoader forks its workers while threads fetch: a child must not hold an entry for ever."""
    cache, children = NodeCache(str(tmp_path), 10 * SIZE), []

    def fetch() -> bytes:
        children.append(FORK.Process(target=time.sleep, args=(1000,)))
        children[0].start()
        return content_of("a")

    cache.get("a", SIZE, fetch)
    cache.discard("a", "test")
    assert cache.get("a", SIZE, lambda: content_of("a")) == content_of("a")
    children[0].kill()
    children[0].join()


def use_at_random(folder: str, seed: int, rounds: int) -> None:
    """In a process: entries at random, some large, each compared with what it must be."""
    cache, chance = NodeCache(folder, 5 * SIZE), random.Random(seed)
    for _ in range(rounds):
        name = f"{chance.randrange(12)}"
        if chance.random() < 0.2:
            pieces = [content_of(name)[at : at + 1000] for at in range(0, SIZE, 1000)]
            cache.add(name, SIZE, lambda pieces=pieces: pieces)
        else:
            assert cache.get(name, SIZE, lambda name=name: content_of(name)) == content_of(name)


def test_many_processes_under_a_tight_budget_and_kills(tmp_path: Path) -> None:
    """Fourteen processes are killed at random points; the budget holds at every look, contents are right."""
    chance = random.Random(1)
    for round_ in range(7):
        processes = [
            FORK.Process(target=use_at_random, args=(str(tmp_path), 10 * round_ + number, 100_000))
            for number in range(2)
        ]
        survivor = FORK.Process(target=use_at_random, args=(str(tmp_path), 10 * round_ + 2, 150))
        for process in (*processes, survivor):
            process.start()
        until((tmp_path / "used").exists)
        stop = time.monotonic() + chance.uniform(0.01, 0.2)
        while time.monotonic() < stop:
            assert held(tmp_path) <= 5 * SIZE
        for process in processes:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        survivor.join()
        assert survivor.exitcode == 0
    cache = NodeCache(str(tmp_path), 5 * SIZE)
    assert list((tmp_path / "partial").iterdir()) == []
    for path in tmp_path.iterdir():
        if path.is_file() and path.name != "used":
            assert cache.read(path.name, 0, SIZE + 1) == content_of(path.name)


@pytest.mark.parametrize("of", ["link", "another user"])
def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = NodeCache(None, SIZE).folder
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert NodeCache(None, SIZE).folder == folder  # this user's own
    if of == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif os.getuid():
        pytest.skip("only root can give a folder to another user")
    else:
        os.chown(folder, 12345, 12345)
    with pytest.raises(ValueError, match="is not this user's own; remove it, or set data.cache.folder"):
        NodeCache(None, SIZE)
