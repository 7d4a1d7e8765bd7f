"""A run's data order played through on the blocks of a real manifest, without reading a row.

The run restarts at random steps, each time with the next number of ranks. Every restarted rank locates its
rows by an order of its own, which knows nothing of what went before, as a new process does. All is compared
with one rank that runs from beginning to end, and every row is ticked off when it is read.

Letters: k steps of a window, B rows of a global batch, R ranks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sharding.manifest import CorpusError
from sharding.order import Order, rank_slice

LEGS_PER_RANKS = 3  # each number of ranks has so many turns
WINDOW_ROWS = 2**16  # compared at a time; at least one step


@dataclass
class Leg:
    """The run from one restart to the next."""

    world_size: int
    first_step: int
    steps: int
    blocks_of_rank: NDArray[np.int64]
    """int64 [R]: blocks that each rank reads, each counted once an epoch."""


@dataclass
class Simulation:
    """What was counted, for and against the order's properties."""

    rows: int
    blocks: int
    global_batch_rows: int
    steps: int
    legs: list[Leg] = field(default_factory=list)
    rows_missed: int = 0
    """Rows that an epoch left out."""
    rows_repeated: int = 0
    """Readings of a row that its epoch had read before."""
    batches_wrong: int = 0
    """Global batches that are not those of one rank."""
    steps_uneven: int = 0
    """Steps in which a rank had another number of rows than its share."""
    seeks: int = 0
    seeks_wrong: int = 0
    """Restarted ranks whose first rows are not those that one rank has come to."""
    step_blocks: list[int] = field(default_factory=list)
    """Per step, the blocks that its global batch is from."""
    step_largest: list[int] = field(default_factory=list)
    """Per step, the rows of its global batch that are from one block, at most."""
    neighbours: int = 0
    """Pairs of rows that follow each other in the run; then of those: the sum of distances in the corpus, in
    rows, and how many follow each other there too."""
    neighbour_distance_sum: int = 0
    neighbours_kept: int = 0

    def properties(self) -> dict[str, bool]:
        """What the order promises, and whether it held."""
        return {
            f"every row exactly once per epoch ({self.rows_missed} missed, {self.rows_repeated} repeated)": (
                self.rows_missed == self.rows_repeated == 0
            ),
            f"the same global batches as one rank ({self.batches_wrong} of {self.steps} differ)": (
                self.batches_wrong == 0
            ),
            f"every rank the same number of rows in every step ({self.steps_uneven} steps uneven)": (
                self.steps_uneven == 0
            ),
            f"a restart continues where the run was, seek = replay ({self.seeks_wrong} of {self.seeks} ranks "
            "differ)": self.seeks_wrong == 0,
        }


def simulate(
    block_rows: Sequence[int],
    *,
    ranks: Sequence[int],
    global_batch_rows: int,
    epochs: int,
    seed: int,
    group_blocks: int,
    progress: bool,
) -> Simulation:
    """Play a run of so many epochs through. Memory: a byte per row, and per rank a byte per block.

    Args:
        block_rows: rows of each block of a split, in stored order.
        ranks: numbers of ranks, in turn from one restart to the next.

    Raises: CorpusError when they do not all divide the global batch, or numbers that describe no order.
    """
    common = math.lcm(*ranks)
    if global_batch_rows < 1 or global_batch_rows % common:
        lower = global_batch_rows // common * common
        nearest = ", ".join(str(rows) for rows in (lower, lower + common) if rows > 0)
        raise CorpusError(
            f"global_batch_rows={global_batch_rows} is not a multiple of {common}, which ranks="
            f"{','.join(map(str, ranks))} divide; nearest: {nearest}"
        )
    try:
        one_rank = Order(block_rows, seed, group_blocks)
    except ValueError as error:
        raise CorpusError(str(error)) from error
    steps = -(-epochs * one_rank.rows // global_batch_rows)
    found = Simulation(one_rank.rows, len(block_rows), global_batch_rows, steps)
    ticks = _Ticks(one_rank.rows, epochs)
    with tqdm(total=steps, desc="simulate", unit=" steps", disable=None if progress else True) as bar:
        for first_step, last_step, world_size in _legs(steps, ranks, seed):
            _run_leg(found, ticks, one_rank, first_step, last_step, world_size, bar)
    ticks.close()
    found.rows_missed, found.rows_repeated = ticks.missed, ticks.repeated
    return found


def _legs(steps: int, ranks: Sequence[int], seed: int) -> Iterator[tuple[int, int, int]]:
    """(first step, step after the last, ranks) of each leg; the restarts between them fall at random."""
    count = min(steps, LEGS_PER_RANKS * len(ranks))
    restarts = np.random.default_rng(seed).permutation(steps - 1)[: count - 1] + 1
    bounds = [0, *sorted(restarts.tolist()), steps]
    for index in range(count):
        yield bounds[index], bounds[index + 1], ranks[index % len(ranks)]


def _run_leg(
    found: Simulation,
    ticks: "_Ticks",
    one_rank: Order,
    first_step: int,
    last_step: int,
    world_size: int,
    bar: "tqdm[None]",
) -> None:
    """Locate the rows of every rank and step of one leg, compare them, and count."""
    batch_rows = found.global_batch_rows
    stored_starts = np.cumsum(one_rank.block_rows) - one_rank.block_rows
    reads = _Reads(world_size, len(one_rank.block_rows), one_rank.rows)
    located = _located(one_rank, batch_rows, first_step, last_step, world_size)
    window_steps = max(1, WINDOW_ROWS // batch_rows)
    for first in range(first_step, last_step, window_steps):
        steps = min(window_steps, last_step - first)
        position, rows = first * batch_rows, steps * batch_rows
        parts = [next(located) for _ in range(steps * world_size)]
        sizes_kR = np.array([blocks.size for blocks, _ in parts]).reshape(steps, world_size)
        block_index, row_in_block = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        expected_block, expected_row = one_rank.locate(position, rows)
        same = (block_index == expected_block) & (row_in_block == expected_row)
        found.batches_wrong += int((~same.reshape(steps, batch_rows)).any(axis=1).sum())
        if first == first_step:  # its first step is where the ranks have just been restarted
            found.seeks += world_size
            found.seeks_wrong += int((~same[:batch_rows].reshape(world_size, -1)).any(axis=1).sum())
        stored = stored_starts[block_index] + row_in_block
        ticks.tick(position, stored)
        rank = np.repeat(np.tile(np.arange(world_size), steps), sizes_kR.reshape(-1))
        reads.read(position, rank, block_index)
        found.steps_uneven += int((sizes_kR != batch_rows // world_size).any(axis=1).sum())
        _count_shuffling(found, stored, block_index, steps)
        bar.update(steps)
    found.legs.append(Leg(world_size, first_step, last_step - first_step, reads.total()))


def _located(
    like: Order, batch_rows: int, first_step: int, last_step: int, world_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(block index, row in block) of each rank in each step, rank by rank."""
    for step in range(first_step, last_step):
        for rank in range(world_size):
            if step == first_step:  # the ranks' further steps share one: an order keeps nothing but a cache
                order = Order(like.block_rows.tolist(), like.seed, like.group_blocks)
            start, stop = rank_slice(step * batch_rows, batch_rows, rank, world_size)
            yield order.locate(start, stop - start)


def _by_epoch(position: int, count: int, rows: int) -> Iterator[tuple[int, slice]]:
    """The epochs in which ``count`` rows from a position lie, with the part of the rows in each."""
    done = 0
    while done < count:
        epoch, offset = divmod(position + done, rows)
        taken = min(count - done, rows - offset)
        yield epoch, slice(done, done + taken)
        done += taken


class _Ticks:
    """Rows ticked off, epoch by epoch. Of what is read beyond the last whole epoch nothing can be missed."""

    def __init__(self, rows: int, epochs: int) -> None:
        self.rows, self.epochs = rows, epochs
        self.missed = self.repeated = 0
        self._epoch = self._read = 0
        self._seen = np.zeros(rows, dtype=bool)

    def tick(self, position: int, stored: NDArray[np.int64]) -> None:
        for epoch, part in _by_epoch(position, stored.size, self.rows):
            if epoch != self._epoch:
                self.close()
                self._epoch, self._read = epoch, 0
                self._seen[:] = False
            self._seen[stored[part]] = True
            self._read += stored[part].size

    def close(self) -> None:
        """Count the open epoch. So many readings as rows ticked off: no row twice."""
        seen = int(self._seen.sum())
        self.repeated += self._read - seen
        if self._epoch < self.epochs:
            self.missed += self.rows - seen


class _Reads:
    """Distinct blocks that each rank reads, epoch by epoch: a cache of two groups lets it read them once."""

    def __init__(self, world_size: int, blocks: int, rows: int) -> None:
        self.rows = rows
        self._epoch = 0
        self._read = np.zeros((world_size, blocks), dtype=bool)
        self._before = np.zeros(world_size, dtype=np.int64)

    def read(self, position: int, rank: NDArray[np.int64], block_index: NDArray[np.int64]) -> None:
        for epoch, part in _by_epoch(position, rank.size, self.rows):
            if epoch != self._epoch:
                self._before, self._epoch = self.total(), epoch
                self._read[:] = False
            self._read[rank[part], block_index[part]] = True

    def total(self) -> NDArray[np.int64]:
        """Int64 [R]."""
        return self._before + self._read.sum(axis=1)


def _count_shuffling(
    found: Simulation, stored: NDArray[np.int64], block_index: NDArray[np.int64], steps: int
) -> None:
    """How far a window's rows are from their stored order."""
    distance = np.diff(stored)
    found.neighbours += distance.size
    found.neighbour_distance_sum += int(np.abs(distance).sum())
    found.neighbours_kept += int((distance == 1).sum())
    step_of_row = np.repeat(np.arange(steps), stored.size // steps)
    pairs, rows_of_pair = np.unique(step_of_row * found.blocks + block_index, return_counts=True)
    step_of_pair = pairs // found.blocks
    first_of_step = np.searchsorted(step_of_pair, np.arange(steps))
    found.step_blocks += np.bincount(step_of_pair, minlength=steps).tolist()
    found.step_largest += np.maximum.reduceat(rows_of_pair, first_of_step).tolist()
