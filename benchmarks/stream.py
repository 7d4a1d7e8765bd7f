"""Reading rows in training order: our stream against webdataset's own pipelines and a memory map.

    python benchmarks/stream.py [--json PATH] [--quick]

Every reader gives endless batches of 256 rows of 128 tokens, int64, with their lengths, from the page cache,
in one process and with one and two DataLoader workers:

- ``ours``: ``sharding.stream``, exactly once an epoch in one global order, checksums compared.
- ``webdataset, a member per row``: how WebDataset corpora are mostly laid out. Raw uint16, decoded a batch
  at a time; a buffer of 1,024 rows shuffles.
- ``webdataset, our blocks``: the shards of ours. Sixteen blocks are decoded without a copy, mixed and cut
  into batches: as much shuffling as ours, but not resumed, another order on other ranks, and not checked.
- ``memmap``: the rows as one array on disk, gathered at random in the order of ours: the limit.

Workers of all readers send plain uint16 arrays, of which the main process makes tensors: three times as fast
as sending tensors. The readers take turns. Memory: resident bytes over an epoch, sampled once a group, once
the caches are full.
"""

import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch
import webdataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Report, interleaved_medians, parse_arguments
from benchmarks.rows import BLOCK_ROWS, SEQ_LEN, random_blocks, write_manifest, write_random_shard
from sharding.manifest import Corpus, open_corpus
from sharding.order import Order
from sharding.stream import Batch, stream

BATCH_ROWS, GROUP_BLOCKS, SHARDS = 256, 16, 4
ENDLESS = 10**15  # rows
OURS, PER_ROW, BLOCKS, MEMMAP = "ours", "webdataset, a member per row", "webdataset, our blocks", "memmap"
LayOut = dict[str, list[str]]
Stored = tuple[NDArray[np.uint16], NDArray[np.uint16]]
"""ids [256, 128], lengths [256]."""
RowBatch = tuple[Tensor, Tensor]
"""The same as int64."""


def write_rows(root: Path, blocks: int) -> None:
    """Write the same rows as a corpus, as a member per row, and as two flat arrays."""
    shards = [write_random_shard(root / "corpus", number, blocks // SHARDS) for number in range(SHARDS)]
    write_manifest(root / "corpus", shards)
    (root / "per_row").mkdir()
    with open(root / "ids.bin", "wb") as ids_file, open(root / "lengths.bin", "wb") as lengths_file:
        for number in range(SHARDS):
            writer = webdataset.TarWriter(str(root / "per_row" / f"{number:05d}.tar"), encoder=False)
            for index, block in enumerate(random_blocks(blocks // SHARDS, seed=number)):
                block.ids.tofile(ids_file)
                block.lengths.tofile(lengths_file)
                for row, (length, ids) in enumerate(zip(block.lengths, block.ids, strict=True)):
                    content = length.tobytes() + ids.tobytes()
                    writer.write({"__key__": f"{number}-{index * BLOCK_ROWS + row:08d}", "row": content})
            writer.close()


def our_batches(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """Our stream, as one rank of one reads it."""
    return stream(
        corpus,
        "train",
        seed=0,
        group_blocks=GROUP_BLOCKS,
        start_row=0,
        stop_row=ENDLESS // BATCH_ROWS * BATCH_ROWS,
        global_batch_rows=BATCH_ROWS,
        rank=0,
        world_size=1,
        workers=workers,
        prefetch_steps=4,
    )


def per_row_batches(folder: Path, workers: int) -> Iterator[RowBatch]:
    """webdataset on a member per row: shards and rows shuffled, a whole batch decoded at once."""

    def collate(samples: list[dict[str, bytes]]) -> Stored:
        content = b"".join([sample["row"] for sample in samples])
        packed = np.frombuffer(content, np.uint16).reshape(-1, SEQ_LEN + 1)
        return packed[:, 1:], packed[:, 0]

    dataset = _web_dataset(folder).shuffle(1024, initial=1024).batched(BATCH_ROWS, collation_fn=collate)
    return _loaded(dataset.repeat(), workers)


def block_batches(folder: Path, workers: int) -> Iterator[RowBatch]:
    """webdataset on our shards: groups of blocks in a buffer, mixed, and cut into batches."""

    def rows(samples: Iterable[dict[str, bytes]]) -> Iterator[Stored]:
        samples, random = iter(samples), np.random.default_rng(0)
        header = 128  # bytes before the data of every .npy member
        while group := list(islice(samples, GROUP_BLOCKS)):
            parts = [np.frombuffer(sample["ids.npy"], np.uint16, offset=header) for sample in group]
            ids = np.concatenate(parts).reshape(-1, SEQ_LEN)
            lengths = np.concatenate(
                [np.frombuffer(sample["len.npy"], np.uint16, offset=header) for sample in group]
            )
            order = random.permutation(len(ids))
            for first in range(0, len(ids), BATCH_ROWS):
                taken = order[first : first + BATCH_ROWS]
                yield ids[taken], lengths[taken]

    return _loaded(_web_dataset(folder).compose(rows).repeat(), workers)


def _web_dataset(folder: Path) -> webdataset.WebDataset:
    urls = sorted(str(path) for path in folder.iterdir())
    return webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)


def _loaded(dataset: Any, workers: int) -> Iterator[RowBatch]:
    if not workers:
        return map(_as_tensors, dataset)
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=4, collate_fn=_as_it_is
    )
    return map(_as_tensors, loader)


def _as_it_is(stored: Any) -> Any:
    return stored


def _as_tensors(stored: Stored) -> RowBatch:
    ids, lengths = (torch.from_numpy(array.astype(np.int64)) for array in stored)
    return ids, lengths


class MappedRows(Dataset[Stored]):
    """Batches gathered from flat arrays on disk in the order of ours."""

    def __init__(self, root: Path, blocks: int) -> None:
        self.ids = np.memmap(root / "ids.bin", np.uint16, "r").reshape(-1, SEQ_LEN)
        self.lengths = np.memmap(root / "lengths.bin", np.uint16, "r")
        self.order = Order([BLOCK_ROWS] * blocks, seed=0, group_blocks=GROUP_BLOCKS)

    def __getitem__(self, start: int) -> Stored:
        block, row = self.order.locate(start, BATCH_ROWS)
        stored = block * BLOCK_ROWS + row
        return self.ids[stored], self.lengths[stored]


def mapped_batches(root: Path, blocks: int, workers: int) -> Iterator[RowBatch]:
    """The memory map; without a worker also without a DataLoader."""
    dataset, starts = MappedRows(root, blocks), range(0, ENDLESS, BATCH_ROWS)
    if not workers:
        return map(_as_tensors, map(dataset.__getitem__, starts))
    loader = DataLoader(
        dataset, batch_size=None, sampler=starts, num_workers=workers, prefetch_factor=4, collate_fn=_as_it_is
    )
    return map(_as_tensors, loader)


def memory_growth_bytes(batches: Iterator[Any], blocks: int) -> tuple[int, int]:
    """Resident bytes of this process and its workers once the caches are full, and by how much they grow over
    an epoch from there."""
    group = GROUP_BLOCKS * BLOCK_ROWS // BATCH_ROWS
    take(batches, 3 * group)
    resident = []
    for _ in range(blocks // GROUP_BLOCKS):
        own = psutil.Process()
        resident.append(sum(process.memory_info().rss for process in [own, *own.children(recursive=True)]))
        take(batches, group)
    return resident[0], max(resident) - resident[0]


def take(batches: Iterator[Any], count: int) -> None:
    """Read so many batches and let them go."""
    deque(islice(batches, count), maxlen=0)


def main() -> None:
    """Measure all readers in turn and print the table."""
    arguments = parse_arguments(__doc__)
    blocks = 64 if arguments.quick else 512
    repeats = 3 if arguments.quick else 9
    report = Report(f"rows/s in batches of {BATCH_ROWS} x {SEQ_LEN}; {blocks * BLOCK_ROWS:,} rows")
    torch.set_num_threads(1)  # what a worker has
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rows(root, blocks)
        corpus = open_corpus(root / "corpus")
        growth = {workers: memory_growth_bytes(our_batches(corpus, workers), blocks) for workers in (0, 1)}
        readers: dict[str, Callable[..., Iterator[Any]]] = {
            OURS: partial(our_batches, corpus),
            PER_ROW: partial(per_row_batches, root / "per_row"),
            BLOCKS: partial(block_batches, root / "corpus" / "train"),
            MEMMAP: partial(mapped_batches, root, blocks),
        }
        # So many that what workers have prepared while others had their turn (8 batches) does not count.
        turns = {name: (64 if name == PER_ROW else 512) for name in readers}
        rates: dict[str, dict[int, float]] = {name: {} for name in readers}
        for workers in (0, 1, 2):
            running = {name: reader(workers=workers) for name, reader in readers.items()}
            calls = {name: partial(take, running[name], turns[name]) for name in readers}
            for name, median_s in interleaved_medians(calls, repeats).items():
                rates[name][workers] = turns[name] * BATCH_ROWS / median_s
            del running, calls
    for name, rate in rates.items():
        figures = {f"{workers} workers": round(rate[workers]) for workers in rate}
        ratios = {f"ours / it, {workers}": rates[OURS][workers] / rate[workers] for workers in rate}
        report.add(reader=name, **figures, **ratios)
    ours = rates[OURS][0]
    for workers, (resident, grown) in growth.items():
        print(
            f"memory, {workers} workers: {resident / 1e6:.0f} MB, grows by {grown / 1e6:.1f} MB over an epoch"
        )
    report.finish(
        f"in one process ours reads {ours:,.0f} rows/s: {ours / rates[PER_ROW][0]:.0f}x webdataset's member "
        f"per row, {ours / rates[BLOCKS][0]:.2f}x webdataset on the same blocks, "
        f"{ours / rates[MEMMAP][0]:.2f}x a memory map; memory grows by {growth[0][1] / 1e6:.1f} MB an epoch",
        arguments.json,
    )


if __name__ == "__main__":
    main()
