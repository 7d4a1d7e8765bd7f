"""The stream: rows of one or several corpora as batches for one rank, in the order of ``sharding.order``.

Letters: B rows of this rank in one step, S sequence length of the corpora that the step draws from.
"""

import ctypes
import logging
import signal
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sharding.blocks import DamagedBlock, Reader
from sharding.cache import NodeCache
from sharding.corpora import Corpora
from sharding.manifest import Corpus, CorpusError
from sharding.order import Order, rank_slice

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Damage:
    """A block that could not be read, found while a batch was gathered."""

    corpus: int
    block: int
    message: str


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one global step."""

    position: int
    """Rows of the run (all ranks) consumed once this step is done."""
    ids_BS: Tensor
    """int64 [B, S]; the pad id from each row's length on."""
    length_B: Tensor
    """int64 [B]: valid tokens, special tokens included; 0 for a row that is masked because it is damaged."""
    segment_B: Tensor
    """int64 [B]: first index of segment B; equal to the length where there is none."""
    corpus_B: Tensor
    """int64 [B]: which of the run's corpora the row is from."""
    block_B: Tensor
    """int64 [B]: the block of the corpus's split that the row is from."""
    row_B: Tensor
    """int64 [B]: index of the row within that split, as stored; ``sharding.labels`` knows its label."""
    damage: tuple[Damage, ...] = ()
    """Under quarantine: damaged blocks that this batch needed and that were not known before."""

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a copy to a GPU overlaps with its work."""
        pinned: dict[str, Any] = {name: getattr(self, name).pin_memory() for name in TENSORS}
        return replace(self, **pinned)

    def masked(self, blocks: Collection[tuple[int, int]]) -> "Batch":
        """The same batch with the rows of these (corpus, block) masked: length 0, nothing valid."""
        hit_B = torch.zeros_like(self.length_B, dtype=torch.bool)
        for corpus, block in blocks:
            hit_B |= (self.corpus_B == corpus) & (self.block_B == block)
        length_B, segment_B = self.length_B.masked_fill(hit_B, 0), self.segment_B.masked_fill(hit_B, 0)
        return replace(self, length_B=length_B, segment_B=segment_B)


TENSORS = ("ids_BS", "length_B", "segment_B", "corpus_B", "block_B", "row_B")
SEQUENTIAL_AHEAD = 8  # blocks that are fetched ahead in stored order


@dataclass(frozen=True)
class _Packed:
    """A batch as a reader process sends it: ids as stored, a quarter of their size as int64, in plain arrays,
    as each tensor would cost a file descriptor and 0.4 ms."""

    position: int
    ids: NDArray[np.integer]
    """uint16 or uint32 [B, S]."""
    others: NDArray[np.int64]
    """[5, B]: lengths, segments, corpora, blocks, rows of the split."""
    damage: tuple[Damage, ...] = ()

    @classmethod
    def empty(cls, position: int, rows: int, reader: Reader) -> "_Packed":
        return cls(position, np.empty((rows, reader.seq_len), reader.dtype), np.empty((5, rows), np.int64))

    def batch(self) -> Batch:
        ids_BS = torch.from_numpy(self.ids.astype(np.int64))
        length_B, segment_B, corpus_B, block_B, row_B = torch.from_numpy(self.others)
        return Batch(self.position, ids_BS, length_B, segment_B, corpus_B, block_B, row_B, self.damage)

    def pin_memory(self) -> Batch:
        """What the DataLoader calls, in a thread of its own."""
        return self.batch().pin_memory()


class _Rows:
    """Rows of one corpus by stored place, masked where their block is damaged and that is wanted."""

    def __init__(self, reader: Reader, number: int, pad_id: int, quarantined: set[int] | None) -> None:
        self.reader, self.number, self.pad_id = reader, number, pad_id
        self.quarantined = quarantined  # None: damage is an error
        self.first_rows = np.cumsum([0, *reader.split.block_rows])  # of each block, in the split

    def gather(
        self,
        block_index: NDArray[np.int64],
        row_in_block: NDArray[np.int64],
        into: _Packed,
        slots: NDArray[np.int64],
    ) -> list[Damage]:
        """Put the rows into the slots of a batch; returns the damage among them that was not known before.

        Raises: DamagedBlock, unless damaged blocks are to be masked.
        """
        ids, (lengths, segments, corpora, blocks, split_rows) = into.ids, into.others
        corpora[slots], blocks[slots] = self.number, block_index
        split_rows[slots] = self.first_rows[block_index] + row_in_block
        found: list[Damage] = []
        while True:
            sound: slice | NDArray[np.bool_] = slice(None)
            if self.quarantined:
                ids[slots], lengths[slots], segments[slots] = self.pad_id, 0, 0
                sound = ~np.isin(block_index, list(self.quarantined))
            try:
                rows = (ids, lengths, segments)
                self.reader.gather(block_index[sound], row_in_block[sound], rows, slots[sound])
                return found
            except DamagedBlock as error:
                if self.quarantined is None:
                    raise
                self.quarantined.add(error.index)
                found.append(Damage(self.number, error.index, str(error)))


@dataclass(frozen=True)
class _Source:
    """One corpus and its own order."""

    rows: _Rows
    order: Order
    prefetch_blocks: int

    def prefetch(self, position: int) -> None:
        """Begin to fetch what is needed from a position of the order on, where reading is not cheap."""
        if not self.rows.reader.store.is_local:
            upcoming = self.order.upcoming(position, self.prefetch_blocks)
            quarantined = self.rows.quarantined or ()
            self.rows.reader.prefetch([block for block in upcoming if block not in quarantined])


class _Steps(Dataset["_Packed | CorpusError"]):
    """This rank's batch of the global step that starts at a position: a map from position to batch."""

    def __init__(
        self, sources: list[_Source], corpora: Corpora, global_batch_rows: int, rank: int, world_size: int
    ) -> None:
        self.sources, self.global_batch_rows = sources, global_batch_rows
        self.mixture = corpora.mixture(global_batch_rows)
        self.offset, stop = rank_slice(0, global_batch_rows, rank, world_size)
        self.rows = stop - self.offset

    def __getitem__(self, step_start: int) -> _Packed | CorpusError:
        draws = self.mixture.draws(step_start, self.offset, self.rows)
        reader = self.sources[draws[0].corpus].rows.reader
        packed = _Packed.empty(step_start + self.global_batch_rows, self.rows, reader)
        damage: list[Damage] = []
        try:
            for draw in draws:
                source = self.sources[draw.corpus]
                source.prefetch(draw.start)
                places = source.order.locate(draw.start, draw.slots.size)
                damage += source.rows.gather(*places, packed, draw.slots)
        except CorpusError as error:
            # Handed over rather than raised: a DataLoader would bury its message under a worker's traceback.
            return error
        return replace(packed, damage=tuple(damage)) if damage else packed


def stream(
    corpora: Corpus | Corpora,
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
    quarantined: Collection[tuple[int, int]] | None = None,
    node_cache: NodeCache | None = None,
    prefetch_blocks: int = 32,
) -> Iterator[Batch]:
    """This rank's batches of the global steps from ``start_row`` (rows consumed so far) to ``stop_row``.

    Steps are indexed by their first position and handed to reader processes in turn, so that the order cannot
    depend on ``workers``. Each reader prepares ``prefetch_steps`` steps ahead. With ``quarantined``, (corpus,
    block) known to be damaged, rows of these and of blocks found damaged on the way are masked instead of
    ending the stream; what is found is in ``Batch.damage``. Remote corpora are read through ``node_cache``,
    where there is one, and ``prefetch_blocks`` beyond the ones in use (a group at least) ahead of need.

    Raises:
        ValueError: at once, when the rows are not a whole number of steps, or too few for the ranks.
        CorpusError: at once for a missing split; while reading, for a shard that is damaged.
    """
    if start_row < 0 or global_batch_rows < 1 or (stop_row - start_row) % global_batch_rows:
        raise ValueError(
            f"rows {start_row} .. {stop_row} are not a whole number of steps of "
            f"global_batch_rows={global_batch_rows}; move the end by a part of a step"
        )
    corpora = Corpora.of(corpora)
    sources = []
    for number, corpus in enumerate(corpora.corpora):
        known = None if quarantined is None else {block for owner, block in quarantined if owner == number}
        # A step may straddle two groups: both stay at hand, so that no block is read twice in passing over.
        reader = Reader(corpus, split, 2 * group_blocks, node_cache)
        order = Order(reader.split.block_rows, seed, group_blocks)
        rows = _Rows(reader, number, corpus.manifest.tokenizer.pad_id, known)
        # All blocks of the next group are needed at once when it begins.
        sources.append(_Source(rows, order, max(prefetch_blocks, group_blocks)))
    steps = _Steps(sources, corpora, global_batch_rows, rank, world_size)
    positions = range(start_row, stop_row, global_batch_rows)
    if not workers:
        return _batches(map(steps.__getitem__, positions), pin_memory)
    loader: DataLoader[_Packed | CorpusError] = DataLoader(
        steps,
        batch_size=None,
        collate_fn=_as_it_is,
        sampler=positions,
        num_workers=workers,
        prefetch_factor=prefetch_steps,
        pin_memory=pin_memory,
        worker_init_fn=_live_as_long_as_the_parent,
    )
    return _batches(loader, pin_memory)


def _live_as_long_as_the_parent(worker: int) -> None:
    """Readers end when their parent tells them to, or dies; not before, and not after.

    Schedulers signal every process of a job; a reader that died of it would end a run that wants to save. And
    readers have their parent's connections open: while one lives, the other ranks do not see that the parent
    is gone. The DataLoader's own readers look for their parent every 5 s.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _as_it_is(packed: Any) -> Any:
    """Instead of the DataLoader's own conversion, which makes tensors of all arrays."""
    return packed


def _batches(found: Iterable[_Packed | Batch | CorpusError], pin_memory: bool) -> Iterator[Batch]:
    """What reader processes send, as batches; the DataLoader has pinned its own."""
    for each in found:
        if isinstance(each, CorpusError):
            raise each
        if isinstance(each, Batch):
            yield each
        else:
            yield each.pin_memory() if pin_memory else each.batch()


def sequential(
    corpus: Corpus,
    split: str,
    *,
    rows: int,
    batch_rows: int,
    rank: int,
    world_size: int,
    mask_damaged: bool = False,
    node_cache: NodeCache | None = None,
) -> Iterator[Batch]:
    """The first ``rows`` rows of a split (all, when it holds fewer) in stored order, each on one rank.

    Batches of ``batch_rows`` consecutive rows, the last one perhaps shorter, are dealt to the ranks in turn;
    so ranks may get different numbers of batches, or none. ``position`` is the stored row after the batch.
    Rows of damaged blocks end the reading with a CorpusError, or are masked; what is masked is logged.
    """
    if rows < 0 or batch_rows < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rows={rows} (at least 0), batch_rows={batch_rows} (at least 1) and rank={rank} "
            f"(0 .. {world_size - 1}) do not describe a reading"
        )
    reader = Reader(corpus, split, 2, node_cache)
    stored_rows = _Rows(reader, 0, corpus.manifest.tokenizer.pad_id, set() if mask_damaged else None)
    starts = stored_rows.first_rows
    total = min(rows, int(starts[-1]))
    for first in range(rank * batch_rows, total, world_size * batch_rows):
        stored = np.arange(first, min(first + batch_rows, total))
        block_index = np.searchsorted(starts, stored, side="right") - 1
        reader.prefetch(range(block_index[0], min(block_index[-1] + SEQUENTIAL_AHEAD, len(starts) - 1)))
        packed, slots = _Packed.empty(int(stored[-1]) + 1, stored.size, reader), np.arange(stored.size)
        for damage in stored_rows.gather(block_index, stored - starts[block_index], packed, slots):
            log.warning("rows masked in the %s split: %s", split, damage.message)
        yield packed.batch()
