"""The stream: equal for any number of readers and ranks, and loud about damage."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sharding.manifest import CorpusError, open_corpus
from sharding.order import Order
from sharding.stream import Batch, sequential, stream

ROOT = Path(__file__).resolve().parents[2]


def read(
    folder: Path, *, rank: int = 0, world_size: int = 1, workers: int = 0, **changes: int
) -> list[Batch]:
    settings = dict(
        seed=5, group_blocks=3, start_row=0, stop_row=1440, global_batch_rows=48, prefetch_steps=2
    )
    settings.update(changes)
    corpus = open_corpus(folder)
    return list(stream(corpus, "train", rank=rank, world_size=world_size, workers=workers, **settings))  # type: ignore[arg-type]


def assert_equal(left: Batch, right: Batch) -> None:
    assert left.position == right.position
    for name in ("ids_BS", "length_B", "segment_B"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def test_batches_are_the_rows_that_the_order_names(tiny_corpus: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    rows = corpus.split("train").rows
    (stored,) = sequential(corpus, "train", rows=rows, batch_rows=rows, rank=0, world_size=1)
    block_rows = [block.rows for shard in corpus.split("train").shards for block in shard.blocks]
    first_row = np.cumsum([0, *block_rows])
    batches = read(tiny_corpus)
    assert len(batches) == 30 and 1440 > 2 * rows  # three epochs are touched
    for step, batch in enumerate(batches):
        assert batch.position == (step + 1) * 48
        blocks, rows_in_block = Order(block_rows, seed=5, group_blocks=3).locate(step * 48, 48)
        expected = first_row[blocks] + rows_in_block
        assert torch.equal(batch.ids_BS, stored.ids_BS[expected])
        assert torch.equal(batch.length_B, stored.length_B[expected])
        assert torch.equal(batch.segment_B, stored.segment_B[expected])
        assert batch.ids_BS.dtype == batch.length_B.dtype == batch.segment_B.dtype == torch.int64


@pytest.mark.parametrize("workers", [1, 2])
def test_reader_processes_do_not_change_the_batches(tiny_corpus: Path, workers: int) -> None:
    alone, spread = read(tiny_corpus), read(tiny_corpus, workers=workers)
    assert len(alone) == len(spread)
    for left, right in zip(alone, spread, strict=True):
        assert_equal(left, right)


def test_a_reader_dies_with_its_parent(tiny_corpus: Path) -> None:
    """It has the parent's standard output too, which ends with both only. Its own look for it is put off."""
    script = f"""
import os, torch.utils.data._utils.worker as worker
worker.MP_STATUS_CHECK_INTERVAL = 3600
from sharding.manifest import open_corpus
from sharding.stream import stream
settings = dict(seed=5, group_blocks=3, start_row=0, stop_row=1440, global_batch_rows=48, prefetch_steps=2)
batches = stream(open_corpus({str(tiny_corpus)!r}), "train", rank=0, world_size=1, workers=1, **settings)
print(next(batches).position, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (-9, "48\n")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_read_the_global_batch(tiny_corpus: Path, world_size: int) -> None:
    ranks = [
        read(tiny_corpus, rank=rank, world_size=world_size, workers=rank % 2) for rank in range(world_size)
    ]
    for whole, *parts in zip(read(tiny_corpus), *ranks, strict=True):
        assert {part.position for part in parts} == {whole.position}
        assert torch.equal(torch.cat([part.ids_BS for part in parts]), whole.ids_BS)
        assert torch.equal(torch.cat([part.segment_B for part in parts]), whole.segment_B)


def test_a_resumed_stream_continues_the_first(tiny_corpus: Path) -> None:
    whole = read(tiny_corpus)
    for left, right in zip(whole[17:], read(tiny_corpus, start_row=17 * 48, workers=2), strict=True):
        assert_equal(left, right)
    # With another batch size the rows still follow each other in the same order.
    wide = read(tiny_corpus, start_row=17 * 48, stop_row=17 * 48 + 72 * 4, global_batch_rows=72)
    expected = torch.cat([batch.ids_BS for batch in whole[17:23]])
    assert torch.equal(torch.cat([batch.ids_BS for batch in wide]), expected)


def test_a_batch_larger_than_an_epoch(tiny_corpus: Path) -> None:
    rows = open_corpus(tiny_corpus).split("train").rows
    (batch,) = read(tiny_corpus, stop_row=2 * rows, global_batch_rows=2 * rows)
    halves = [sorted(map(tuple, half.tolist())) for half in batch.ids_BS.split(rows)]
    assert halves[0] == halves[1]


def test_uneven_steps_and_more_ranks_than_rows_are_refused(tiny_corpus: Path) -> None:
    with pytest.raises(ValueError, match="not a whole number of steps"):
        read(tiny_corpus, stop_row=100)
    with pytest.raises(ValueError, match="too small for 100 ranks"):
        read(tiny_corpus, world_size=100)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_sequential_deals_every_row_once(tiny_corpus: Path, world_size: int) -> None:
    corpus = open_corpus(tiny_corpus)
    (stored,) = sequential(corpus, "heldout", rows=10**6, batch_rows=10**6, rank=0, world_size=1)
    assert len(stored.ids_BS) == corpus.split("heldout").rows
    batches = [
        batch
        for rank in range(world_size)
        for batch in sequential(corpus, "heldout", rows=70, batch_rows=16, rank=rank, world_size=world_size)
    ]
    batches.sort(key=lambda batch: batch.position)
    assert [len(batch.ids_BS) for batch in batches] == [16, 16, 16, 16, 6]
    assert torch.equal(torch.cat([batch.ids_BS for batch in batches]), stored.ids_BS[:70])


def test_sequential_may_give_a_rank_nothing(tiny_corpus: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    assert list(sequential(corpus, "heldout", rows=16, batch_rows=16, rank=1, world_size=2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_byte_is_named_without_a_workers_traceback(
    tiny_corpus: Path, tmp_path: Path, workers: int
) -> None:
    folder = shutil.copytree(tiny_corpus, tmp_path / "copy")
    shard = open_corpus(folder).split("train").shards[1]
    member = shard.blocks[0].ids
    with open(folder / shard.path, "r+b") as file:
        file.seek(member.offset + 200)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorpusError) as error:
        read(folder, workers=workers)
    message = str(error.value)
    assert f"corrupt shard {folder / shard.path}" in message
    assert (
        f"member {shard.blocks[0].name}.ids.npy ({member.bytes} bytes at offset {member.offset})" in message
    )
    assert "corpus.py verify" in message
    assert "Traceback" not in message and "DataLoader" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_shrinks_or_goes_under_a_running_stream(
    tiny_corpus: Path, tmp_path: Path, workers: int
) -> None:
    for damage, message in (
        (lambda path: path.write_bytes(b""), "corrupt shard"),
        (Path.unlink, "cannot be read"),
    ):
        folder = shutil.copytree(tiny_corpus, tmp_path / message)
        corpus = open_corpus(folder)
        batches = stream(
            corpus,
            "train",
            seed=0,
            group_blocks=1,
            start_row=0,
            stop_row=640,
            global_batch_rows=64,
            rank=0,
            world_size=1,
            workers=workers,
            prefetch_steps=1,
        )
        next(batches)
        for shard in corpus.split("train").shards:
            damage(folder / shard.path)
        with pytest.raises(CorpusError, match=message):
            list(batches)
