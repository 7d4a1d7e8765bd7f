"""The stream: rows of a corpus as batches for one rank, in the order of ``sharding.order``.

Letters: B rows of this rank in one step, S sequence length of the corpus.
"""

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sharding.manifest import Block, Corpus, CorpusError, Member, Shard
from sharding.order import Order, rank_slice


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one global step."""

    position: int
    """Rows of the run (all ranks) consumed once this step is done."""
    ids_BS: Tensor
    """int64 [B, S]; the pad id from each row's length on."""
    length_B: Tensor
    """int64 [B]: valid tokens, special tokens included."""
    segment_B: Tensor
    """int64 [B]: first index of segment B; equal to the length where there is none."""

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; the DataLoader calls it when asked to pin."""
        return Batch(
            self.position, self.ids_BS.pin_memory(), self.length_B.pin_memory(), self.segment_B.pin_memory()
        )


Rows = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.integer]]
"""ids [n, S], lengths [n], segment starts [n], in the dtypes in which they are stored."""


class Reader:
    """Rows of a split by stored place, keeping the ``cache_blocks`` blocks used last.

    A block is read whole, by one positional read, and its checksums are compared each time: unlike a memory
    map, a shard that is cut or rots under a running job ends in a message, never in SIGBUS or wrong rows.
    """

    def __init__(self, corpus: Corpus, split: str, cache_blocks: int) -> None:
        self.root = corpus.root
        self.seq_len = corpus.manifest.seq_len
        self.blocks: list[tuple[Shard, Block]] = [
            (shard, block) for shard in corpus.split(split).shards for block in shard.blocks
        ]
        self._cache_blocks = cache_blocks
        self._cache: OrderedDict[int, Rows] = OrderedDict()

    def gather(self, block_index: NDArray[np.int64], row_in_block: NDArray[np.int64], position: int) -> Batch:
        """The rows (block_index[i], row_in_block[i]) in this order, as the batch that ends at ``position``.

        Raises: CorpusError for a shard that cannot be read or does not match its checksums.
        """
        ids_BS = np.empty((block_index.size, self.seq_len), dtype=np.int64)
        length_B = np.empty(block_index.size, dtype=np.int64)
        segment_B = np.empty(block_index.size, dtype=np.int64)
        for index in np.unique(block_index):
            here = np.flatnonzero(block_index == index)
            ids, lengths, segments = self._block(int(index))
            ids_BS[here] = ids[row_in_block[here]]
            length_B[here] = lengths[row_in_block[here]]
            segment_B[here] = segments[row_in_block[here]]
        return Batch(
            position, torch.from_numpy(ids_BS), torch.from_numpy(length_B), torch.from_numpy(segment_B)
        )

    def _block(self, index: int) -> Rows:
        if index in self._cache:
            self._cache.move_to_end(index)
        else:
            if len(self._cache) >= self._cache_blocks:
                self._cache.popitem(last=False)
            shard, block = self.blocks[index]
            try:
                self._cache[index] = read_block(f"{self.root / shard.path}", block)
            except CorpusError as error:
                raise CorpusError(
                    f"{error}; `python launcher/corpus.py verify {self.root}` lists all damage: copy those "
                    "shards again, or build the corpus again, and resume"
                ) from error
        return self._cache[index]


def read_block(path: str, block: Block) -> Rows:
    """Read one block of the shard at ``path`` and compare its checksums.

    Raises: CorpusError naming shard, member and offset.
    """
    first, last = block.ids.offset, block.seg.offset + block.seg.bytes
    data = _read(path, first, last - first)

    def array(kind: str, member: Member) -> NDArray[np.integer]:
        start = member.offset - first
        return _checked_array(path, f"{block.name}.{kind}.npy", member, data[start : start + member.bytes])

    return array("ids", block.ids), array("len", block.len), array("seg", block.seg)


def read_lengths(path: str, block: Block) -> NDArray[np.integer]:
    """The row lengths [rows] of one block, without reading its ids. Raises as ``read_block``."""
    return _checked_array(
        path, f"{block.name}.len.npy", block.len, _read(path, block.len.offset, block.len.bytes)
    )


def _read(path: str, offset: int, count: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, count, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CorpusError(f"shard {path} cannot be read: {error.strerror}") from error


def _checked_array(path: str, name: str, member: Member, content: bytes) -> NDArray[np.integer]:
    if len(content) != member.bytes or zlib.crc32(content) != member.crc32:
        raise CorpusError(
            f"corrupt shard {path}: member {name} ({member.bytes} bytes at offset {member.offset}) "
            "does not match its checksum"
        )
    return np.load(io.BytesIO(content), allow_pickle=False)


class _Steps(Dataset["Batch | CorpusError"]):
    """This rank's batch of the global step that starts at a position: a map from position to batch."""

    def __init__(
        self, reader: Reader, order: Order, global_batch_rows: int, rank: int, world_size: int
    ) -> None:
        self.reader, self.order = reader, order
        self.global_batch_rows, self.rank, self.world_size = global_batch_rows, rank, world_size

    def __getitem__(self, step_start: int) -> Batch | CorpusError:
        start, stop = rank_slice(step_start, self.global_batch_rows, self.rank, self.world_size)
        block_index, row_in_block = self.order.locate(start, stop - start)
        try:
            return self.reader.gather(block_index, row_in_block, step_start + self.global_batch_rows)
        except CorpusError as error:
            # Handed over rather than raised: a DataLoader would bury its message under a worker's traceback.
            return error


def stream(
    corpus: Corpus,
    split: str,
    *,
    seed: int,
    group_blocks: int,
    start_row: int,
    stop_row: int,
    global_batch_rows: int,
    rank: int,
    world_size: int,
    workers: int,
    prefetch_steps: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's batches of the global steps from ``start_row`` (rows consumed so far) to ``stop_row``.

    Steps are indexed by their first position and handed to reader processes in turn, so that the order cannot
    depend on ``workers``. Each reader prepares ``prefetch_steps`` steps ahead.

    Raises:
        ValueError: at once, when the rows are not a whole number of steps or the ranks do not divide a step.
        CorpusError: at once for a missing split; while reading, for a shard that is damaged.
    """
    if start_row < 0 or global_batch_rows < 1 or (stop_row - start_row) % global_batch_rows:
        raise ValueError(
            f"rows {start_row} .. {stop_row} are not a whole number of steps of "
            f"global_batch_rows={global_batch_rows}; move the end by a part of a step"
        )
    rank_slice(start_row, global_batch_rows, rank, world_size)
    # A step may straddle two groups: both stay at hand, so that no block is read twice in passing over.
    reader = Reader(corpus, split, cache_blocks=2 * group_blocks)
    order = Order([block.rows for _, block in reader.blocks], seed, group_blocks)
    steps = _Steps(reader, order, global_batch_rows, rank, world_size)
    loader: DataLoader[Batch | CorpusError] = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start_row, stop_row, global_batch_rows),
        num_workers=workers,
        prefetch_factor=prefetch_steps if workers else None,
        pin_memory=pin_memory,
    )
    return _raise_errors(loader)


def _raise_errors(loader: "DataLoader[Batch | CorpusError]") -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, CorpusError):
            raise batch
        yield batch


def sequential(
    corpus: Corpus, split: str, *, rows: int, batch_rows: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """The first ``rows`` rows of a split (all, when it holds fewer) in stored order, each on one rank.

    Batches of ``batch_rows`` consecutive rows, the last one perhaps shorter, are dealt to the ranks in turn;
    so ranks may get different numbers of batches, or none. ``position`` is the stored row after the batch.
    """
    if rows < 0 or batch_rows < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rows={rows} (at least 0), batch_rows={batch_rows} (at least 1) and rank={rank} "
            f"(0 .. {world_size - 1}) do not describe a reading"
        )
    reader = Reader(corpus, split, cache_blocks=2)
    starts = np.cumsum([0] + [block.rows for _, block in reader.blocks])
    total = min(rows, int(starts[-1]))
    for first in range(rank * batch_rows, total, world_size * batch_rows):
        stored = np.arange(first, min(first + batch_rows, total))
        block_index = np.searchsorted(starts, stored, side="right") - 1
        yield reader.gather(block_index, stored - starts[block_index], int(stored[-1]) + 1)
