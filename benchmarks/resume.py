"""Resuming at nine tenths of an epoch of 36 million rows: seeking against replaying.

    python benchmarks/resume.py [--json PATH] [--quick]

The manifest has its true size, 35,157 blocks of 1,024 rows of 128 tokens in 73 shards (9.2 GB), each with its
own entry. The shards are links to two files of random rows, so that what is read is real and its checksums
hold, but lies in the page cache; ``cold`` drops it from there before each reading.

Opening a corpus reads, parses and checks its manifest and looks for every shard. A seek computes the order at
the position; the first batch, 256 rows, needs the 16 blocks of a group. Replaying, as webdataset's users do,
takes up to an hour, so its time is extrapolated: that of all rows before, at the rate of a sample.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import Report, interleaved_medians, parse_arguments
from benchmarks.rows import BLOCK_ROWS, write_manifest, write_random_shard
from benchmarks.stream import (
    BATCH_ROWS,
    GROUP_BLOCKS,
    block_batches,
    per_row_batches,
    take,
    write_rows,
)
from sharding.manifest import Corpus, Shard, open_corpus, read_manifest
from sharding.order import Order
from sharding.stream import Batch, stream

BLOCKS, SHARD_BLOCKS = 35_157, 488
START = BLOCKS * BLOCK_ROWS * 9 // 10 // BATCH_ROWS * BATCH_ROWS


def write_true_size(root: Path) -> None:
    """Write the corpus: two shards of random rows, and links to the first."""
    full, last = write_random_shard(root, 0, SHARD_BLOCKS), BLOCKS // SHARD_BLOCKS
    shards: list[Shard] = [full]
    for number in range(1, last):
        path = f"train/{number:05d}.tar"
        os.link(root / full.path, root / path)
        shards.append(replace(full, path=path))
    shards.append(write_random_shard(root, last, BLOCKS % SHARD_BLOCKS))
    write_manifest(root, shards)


def resumed(corpus: Corpus, start_row: int = START) -> Iterator[Batch]:
    """Our stream from a position."""
    return stream(
        corpus,
        "train",
        seed=0,
        group_blocks=GROUP_BLOCKS,
        start_row=start_row,
        stop_row=start_row + 1_000_000 * BATCH_ROWS,
        global_batch_rows=BATCH_ROWS,
        rank=0,
        world_size=1,
        workers=0,
        prefetch_steps=4,
    )


def seek(corpus: Corpus) -> None:
    """The order alone, from nothing to the first batch's places."""
    rows = [rows for shard in corpus.split("train").shards for rows in shard.rows]
    Order(rows, seed=0, group_blocks=GROUP_BLOCKS).locate(START, BATCH_ROWS)


def cold_first_batch_s(corpus: Corpus, root: Path, repeats: int) -> float:
    """Median seconds of the first batch when no shard is in the page cache."""
    taken_s = []
    for _ in range(repeats):
        for shard in corpus.split("train").shards:
            descriptor = os.open(root / shard.path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        started_s = time.perf_counter()
        next(resumed(corpus))
        taken_s.append(time.perf_counter() - started_s)
    return sorted(taken_s)[repeats // 2]


def replay_s(root: Path, repeats: int) -> dict[str, float]:
    """Seconds to read all rows before, from the rate of a sample of 64 blocks."""
    write_rows(root, 64)
    sample = open_corpus(root / "corpus")
    readers: dict[str, tuple[Iterator[Any], int]] = {
        "replay webdataset, a member per row": (per_row_batches(root / "per_row", 0), 64),
        "replay webdataset, our blocks": (block_batches(root / "corpus" / "train", 0), 512),
        "replay ours": (resumed(sample, start_row=0), 512),
    }
    calls: dict[str, Callable[[], object]] = {
        name: partial(take, batches, count) for name, (batches, count) in readers.items()
    }
    medians = interleaved_medians(calls, repeats)
    return {name: START / (readers[name][1] * BATCH_ROWS) * median for name, median in medians.items()}


def main() -> None:
    """Measure, extrapolate, and print the table."""
    arguments = parse_arguments(__doc__)
    repeats = 3 if arguments.quick else 11
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "true_size"
        write_true_size(root)
        corpus = open_corpus(root)
        assert corpus.split("train").rows == BLOCKS * BLOCK_ROWS
        measured = interleaved_medians(
            {
                "manifest": lambda: read_manifest(root),
                "open": lambda: open_corpus(root),
                "seek": lambda: seek(corpus),
                "first batch": lambda: next(resumed(corpus)),
            },
            repeats,
        )
        cold_s = cold_first_batch_s(corpus, root, repeats)
        replayed = replay_s(Path(folder), repeats)
    first_s, open_s = measured["first batch"], measured["open"]
    report = Report(f"to the batch at row {START:,} of {BLOCKS * BLOCK_ROWS:,}")
    rows = {
        "open the corpus: read, parse and check the manifest": measured["manifest"],
        "open the corpus: that, and look for every shard": open_s,
        "seek: the order alone": measured["seek"],
        "seek + first batch, corpus open": first_s,
        "seek + first batch, corpus open, cold": cold_s,
        "open + seek + first batch": open_s + first_s,
        **{f"{name} (extrapolated)": taken_s for name, taken_s in replayed.items()},
    }
    for name, taken_s in rows.items():
        report.add(what=name, milliseconds=1e3 * taken_s, **{"of seek + first batch": taken_s / first_s})
    per_row_s = replayed["replay webdataset, a member per row"]
    report.finish(
        f"seek + first batch take {1e3 * first_s:.0f} ms ({1e3 * cold_s:.0f} ms cold), opening the corpus "
        f"{1e3 * open_s:.0f} ms; webdataset would replay for {per_row_s / 60:.0f} minutes",
        arguments.json,
    )


if __name__ == "__main__":
    main()
