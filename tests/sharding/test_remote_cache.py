"""Processes of a node on one cache of a remote corpus: together, killed, its disk full, its files rotten."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.cache import NodeCache
from sharding.manifest import open_corpus
from sharding.stream import Batch
from tests.conftest import small_disk
from tests.sharding.conftest import SINGLE_BLOCKS, assert_same, block_paths, cached, read
from tests.sharding.servers import Proxy

FORK = multiprocessing.get_context("fork")


def consume(url: str, folder: str, share: float, rank: int, digests: str) -> None:
    """In a process: read on from where the digests of the steps end, a line for each step that is done."""
    corpus = open_corpus(url)
    done = len(Path(digests).read_text().splitlines()) if Path(digests).exists() else 0
    with open(digests, "a") as file:
        for batch in read(
            corpus,
            start_row=done * 48,
            rank=rank,
            world_size=2,
            node_cache=cached(Path(folder), corpus, share),
        ):
            file.write(digest(batch) + "\n")
            file.flush()


def digest(batch: Batch) -> str:
    content = b"".join(tensor.numpy().tobytes() for tensor in (batch.ids_BS, batch.length_B, batch.segment_B))
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def local_digests(tiny_corpus: Path) -> list[list[str]]:
    """Of both of two ranks."""
    corpus = open_corpus(tiny_corpus)
    return [[digest(batch) for batch in read(corpus, rank=rank, world_size=2)] for rank in range(2)]


@pytest.mark.parametrize("share", [0.3, SINGLE_BLOCKS])
def test_processes_of_a_node_share_one_cache(
    remote: tuple[str, Proxy], tmp_path: Path, local_digests: list[list[str]], share: float
) -> None:
    url, proxy = remote
    targets = [tmp_path / f"{number}" for number in range(4)]
    processes = [
        FORK.Process(target=consume, args=(url, str(tmp_path / "cache"), share, number % 2, str(target)))
        for number, target in enumerate(targets)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for number, target in enumerate(targets):
        assert target.read_text().splitlines() == local_digests[number % 2]
    blocks = len(block_paths(open_corpus(url)))
    counts = Counter(proxy.reads)
    assert len(counts) == blocks
    if share == SINGLE_BLOCKS:
        assert set(counts.values()) == {1}, "one fetch per node"


@pytest.mark.parametrize("share", [0.3, 3.0])
def test_readers_that_are_killed_at_any_point(
    over_http: tuple[str, Proxy], tmp_path: Path, local_digests: list[list[str]], share: float
) -> None:
    """Thirteen kills each; the readers after them go on exactly where a step was done."""
    url, proxy = over_http
    proxy.plan = lambda request: "slow" if request.range else None
    chance = random.Random(4)
    targets = [tmp_path / "0", tmp_path / "1"]

    def start(rank: int) -> Any:
        arguments = (url, str(tmp_path / "cache"), share, rank, str(targets[rank]))
        process = FORK.Process(target=consume, args=arguments)
        process.start()
        return process

    for kill in range(13):
        process = start(kill % 2)
        time.sleep(chance.uniform(0.0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for target in targets:  # a line that was cut by the kill was no step that was done
            if target.exists():
                whole = target.read_bytes().rpartition(b"\n")
                target.write_bytes(whole[0] + whole[1])
    for rank, target in enumerate(targets):
        process = start(rank)
        process.join()
        assert process.exitcode == 0
        assert target.read_text().splitlines() == local_digests[rank]
    cached(tmp_path / "cache", open_corpus(url), share)
    assert list((tmp_path / "cache" / "partial").iterdir()) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_disk_that_fills(
    over_http: tuple[str, Proxy],
    local: list[Batch],
    tmp_path: Path,
    log_lines: Callable[[], list[str]],
    workers: int,
) -> None:
    corpus = open_corpus(over_http[0])
    with small_disk(tmp_path / "disk", 40_960) as disk:
        cache = NodeCache(str(disk / "cache"), 10**9)
        assert_same(list(read(corpus, workers=workers, node_cache=cache)), local)
    lines = log_lines()
    assert 1 <= len(lines) <= max(1, workers)
    assert all("No space left on device" in line and "reading goes on without it" in line for line in lines)


@pytest.mark.parametrize("share", [SINGLE_BLOCKS, 3.0])
def test_cached_files_that_rot_are_fetched_again(
    over_http: tuple[str, Proxy],
    local: list[Batch],
    tmp_path: Path,
    log_lines: Callable[[], list[str]],
    share: float,
) -> None:
    corpus = open_corpus(over_http[0])
    for _ in range(2):
        list(read(corpus, node_cache=cached(tmp_path / "cache", corpus, share)))
    rotten = [path for path in (tmp_path / "cache").iterdir() if path.is_file() and path.name != "used"]
    for path in rotten:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 16
        path.write_bytes(content)
    assert_same(list(read(corpus, node_cache=cached(tmp_path / "cache", corpus, share))), local)
    lines = [line for line in log_lines() if "is damaged" in line]
    assert lines and all("does not match its checksum" in line for line in lines)
