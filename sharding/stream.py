"""The stream: rows of a corpus as batches for one rank, in the order of ``sharding.order``.

Letters: B rows of this rank in one step, S sequence length of the corpus.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sharding.blocks import Reader, Rows
from sharding.manifest import Corpus, CorpusError
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
            rows = self.reader.gather(block_index, row_in_block)
            return _batch(step_start + self.global_batch_rows, rows)
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


def _batch(position: int, rows: Rows) -> Batch:
    ids, lengths, segments = (torch.from_numpy(array) for array in rows)
    return Batch(position, ids, lengths, segments)


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
        yield _batch(int(stored[-1]) + 1, reader.gather(block_index, stored - starts[block_index]))
