"""Corpora behind real S3 and HTTP servers: the rows of the local corpus, whatever network and disk do."""

import hashlib
import json
import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sharding import blocks, store
from sharding.manifest import CorpusError, open_corpus
from sharding.store import Store
from sharding.stream import Batch, sequential
from sharding.verify import verify
from tests.sharding.conftest import SINGLE_BLOCKS, assert_same, block_paths, cached, read
from tests.sharding.servers import Proxy, Request
from tests.sharding.test_cache import until

FORK = multiprocessing.get_context("fork")
FAILURES = ["drop", "503", "429", "truncate", "lengthen", "wrong", "hang"]


def once_each(kind: Callable[[], str]) -> Callable[[Request], str | None]:
    """A plan: the first request for each part of a shard meets with a fault."""
    known: set[Request] = set()

    def plan(request: Request) -> str | None:
        if request.range is None or request in known:
            return None
        known.add(request)
        return kind()

    return plan


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("share", [None, 0.3, SINGLE_BLOCKS, 3.0])
def test_rows_are_those_of_the_local_corpus(
    remote: tuple[str, Proxy], local: list[Batch], tmp_path: Path, workers: int, share: float | None
) -> None:
    corpus = open_corpus(remote[0])
    cache = None if share is None else cached(tmp_path / "cache", corpus, share)
    assert_same(list(read(corpus, workers=workers, node_cache=cache)), local)


def test_a_remote_corpus_is_opened_checked_and_read_in_sequence(
    remote: tuple[str, Proxy], tiny_corpus: Path
) -> None:
    corpus, own = open_corpus(remote[0]), open_corpus(tiny_corpus)
    assert corpus.fingerprint == own.fingerprint and corpus.store.name == "tiny"
    assert verify(corpus, progress=False, workers=1) == []
    settings = dict(rows=70, batch_rows=16, rank=1, world_size=2)
    assert_same(
        list(sequential(corpus, "heldout", **settings)),  # type: ignore[arg-type]
        list(sequential(own, "heldout", **settings)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", FAILURES)
def test_a_fault_is_mended_and_reported(
    remote: tuple[str, Proxy],
    local: list[Batch],
    log_lines: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    url, proxy = remote
    corpus = open_corpus(url)
    if kind == "hang":
        monkeypatch.setattr(store, "TIMEOUT_S", 1.0)
    proxy.plan = once_each(lambda: kind)
    assert_same(list(read(corpus, stop_row=480))[:10], local[:10])
    reasons = {
        "drop": "",
        "503": "503",
        "429": "429",
        "truncate": "bytes came, not",
        "lengthen": "bytes came, not",
        "wrong": "does not match its checksum",
        "hang": "no complete answer in time",
    }
    assert len(proxy.injected) >= 6
    until(lambda: len(log_lines()) >= len(proxy.injected))  # what is not needed any more fails a little later
    assert len(log_lines()) == len(proxy.injected) or kind == "hang"  # on a busy machine more is too slow
    for line in log_lines():
        assert reasons[kind] in line
        assert line.startswith(f"{url}/train/") and ": attempt " in line and "; again in " in line


def test_slow_replies_and_a_server_without_ranges(
    remote: tuple[str, Proxy], local: list[Batch], log_lines: Callable[[], list[str]]
) -> None:
    url, proxy = remote
    corpus = open_corpus(url)
    kinds = random.Random(0)
    store._warn_of_no_ranges.cache_clear()
    proxy.plan = lambda request: kinds.choice(["slow", "whole"]) if request.range else None
    assert_same(list(read(corpus)), local)
    # Threads that find it out at the same time may each say so.
    assert set(log_lines()) == {
        f"{url}: the server ignores byte ranges, so that each block costs a whole shard"
    }


@pytest.mark.parametrize("share", [0.3, 3.0])
def test_a_storm_of_faults_under_workers_and_a_cache(
    remote: tuple[str, Proxy],
    local: list[Batch],
    tmp_path: Path,
    log_lines: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    url, proxy = remote
    corpus = open_corpus(url)
    monkeypatch.setattr(store, "TIMEOUT_S", 1.0)
    chance, faults = random.Random(3), Counter[Request]()

    def plan(request: Request) -> str | None:
        if request.range is None or faults[request] == 2 or chance.random() < 0.5:
            return None
        faults[request] += 1
        return chance.choice(
            [kind for kind in FAILURES if kind != "lengthen"]
        )  # at 0 it looks like ``whole``

    proxy.plan = plan
    cache = cached(tmp_path / "cache", corpus, share)
    batches = []
    for batch in read(corpus, workers=2, node_cache=cache):
        batches.append(batch)
        seen = list(proxy.seen)  # at last before the readers are ended
    assert_same(batches, local)
    reported = len(log_lines())
    # The last request of its kind may still be under way in a reader then.
    followed = [
        request for at, (request, kind) in enumerate(seen) if kind and (request in dict(seen[at + 1 :]))
    ]
    assert 5 < len(followed) <= reported


def test_faults_while_opening(remote: tuple[str, Proxy], log_lines: Callable[[], list[str]]) -> None:
    url, proxy = remote
    known: Counter[Request] = Counter()

    def plan(request: Request) -> str | None:
        known[request] += 1
        return "503" if known[request] == 1 else None

    proxy.plan = plan
    open_corpus(url)
    assert len([line for line in log_lines() if "503" in line]) >= 2


def test_wrong_bytes_for_ever_are_damage(remote: tuple[str, Proxy], tmp_path: Path) -> None:
    url, proxy = remote
    corpus = open_corpus(url)
    shard = corpus.split("train").shards[1]
    proxy.plan = lambda request: "wrong" if request.range and shard.path in request.path else None
    for workers in (0, 1):
        cache = cached(tmp_path / f"{workers}", corpus, 3.0)
        with pytest.raises(CorpusError, match=f"corrupt shard {url}/{shard.path}: member") as error:
            list(read(corpus, workers=workers, node_cache=cache))
        assert "corpus.py verify" in str(error.value) and "Traceback" not in str(error.value)


def test_damage_under_quarantine_is_masked_but_an_outage_is_not(
    over_http: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch, local: list[Batch]
) -> None:
    url, proxy = over_http
    corpus = open_corpus(url)
    shard = corpus.split("train").shards[1]
    damaged = {index for index, path in enumerate(block_paths(corpus)) if path == shard.path}
    proxy.plan = lambda request: "wrong" if request.range and shard.path in request.path else None
    batches = list(read(corpus, quarantined=()))
    assert {found.block for batch in batches for found in batch.damage} == damaged
    assert_same(batches, [masked_from(batch, damaged) for batch in local])
    monkeypatch.setattr(store, "PATIENCE_S", 0.1)
    proxy.plan = lambda request: "503" if request.range else None
    with pytest.raises(CorpusError, match="no whole answer for .* at last: HTTP 503.*resume when it answers"):
        list(read(corpus, quarantined=()))


def masked_from(batch: Batch, blocks: set[int]) -> Batch:
    """A batch of the local corpus as it is when these blocks are masked: their ids are padding too."""
    masked = batch.masked({(0, block) for block in blocks})
    return replace(masked, ids_BS=masked.ids_BS.masked_fill(masked.length_B[:, None] == 0, 0))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("status", "message"), [("404", "there is no such file"), ("403", "access denied")])
def test_a_shard_that_goes_or_is_denied(
    remote: tuple[str, Proxy], status: str, message: str, workers: int
) -> None:
    url, proxy = remote
    corpus = open_corpus(url)
    proxy.plan = lambda request: status if request.range else None
    with pytest.raises(CorpusError, match=message) as error:
        list(read(corpus, workers=workers))
    assert "testing" not in str(error.value)


def test_what_does_not_pass_is_not_tried_again(remote: tuple[str, Proxy]) -> None:
    url, proxy = remote
    corpus = open_corpus(url)
    proxy.reset()
    proxy.plan = lambda request: "404"
    with pytest.raises(store.StoreError, match="there is no such file"):
        corpus.store.read("train/none.tar", 0, 10)
    assert len(proxy.seen) == 1


def test_shards_come_whole_where_they_fit_and_are_asked_for_no_more(
    remote: tuple[str, Proxy], local: list[Batch], tmp_path: Path
) -> None:
    url, proxy = remote
    corpus = open_corpus(url)
    split = corpus.split("train")
    batches = []
    for batch in read(corpus, node_cache=cached(tmp_path / "cache", corpus, 3.0)):
        batches.append(batch)
        if batch.position > split.rows:  # an epoch has been read: wait for what is fetched in the background
            break
        time.sleep(0.02)
    until(lambda: all((tmp_path / "cache" / shard.sha256).exists() for shard in split.shards))
    for shard in split.shards:
        content = (tmp_path / "cache" / shard.sha256).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert_same(batches, local[: len(batches)])
    proxy.plan = lambda request: "404"
    again = read(corpus, node_cache=cached(tmp_path / "cache", corpus, 3.0), workers=2)
    assert_same(list(again), local)
    assert not proxy.injected


@pytest.mark.parametrize("share", [None, 0.3, 3.0])
def test_after_the_first_step_no_block_is_fetched_inside_a_step(
    over_http: tuple[str, Proxy],
    local: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float | None,
) -> None:
    """What is announced is all that is needed: bandwidth allowing, a step finds its blocks in memory."""
    corpus = open_corpus(over_http[0])
    inside, asked = list[str](), list[Future[Any]]()
    read_whole, in_background = Store.read, blocks._in_background

    def watched_read(self: Store, *arguments: Any, **keywords: Any) -> bytes:
        if threading.current_thread() is threading.main_thread():
            inside.append(arguments[0])
        return read_whole(self, *arguments, **keywords)

    def watched_background(call: Callable[[], Any]) -> Future[Any]:
        asked.append(in_background(call))
        return asked[-1]

    monkeypatch.setattr(Store, "read", watched_read)
    monkeypatch.setattr(blocks, "_in_background", watched_background)
    batches = []
    for batch in read(corpus, node_cache=None if share is None else cached(tmp_path, corpus, share)):
        batches.append(batch)
        if len(batches) > 1:
            assert inside == [], f"step {len(batches)}"
        inside.clear()
        wait(asked)
    assert_same(batches, local)
    assert len(asked) > len(block_paths(corpus))


def test_a_url_with_a_secret_is_refused_without_repeating_it() -> None:
    for url in ("https://user:hunter2@host/corpus", "https://host/corpus?signature=hunter2"):
        with pytest.raises(CorpusError, match="holds no user, password, query") as error:
            open_corpus(url)
        assert "hunter2" not in str(error.value) and error.value.__cause__ is None


def test_manifest_edits_are_seen_behind_urls_too(over_http: tuple[str, Proxy], tiny_corpus: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist, so .*/none is no corpus"):
        open_corpus(over_http[0].replace("/tiny", "/none"))
    assert json.loads((tiny_corpus / "manifest.json").read_text())["fingerprint"]
