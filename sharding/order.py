"""The data order: which row of the corpus stands at which position of a run. A pure function.

Position p counts rows since the run's start; its epoch is ``p // rows``. In each epoch the blocks are
permuted, ``group_blocks`` consecutive permuted blocks form a group (the last group may be smaller), and
the rows of each group are permuted among themselves. Nothing depends on ranks, readers or shards, so any
number of ranks sees the same global batches, and a run continues from any position without replaying.

A permutation is the stable argsort of raw 64-bit Philox-4x64 outputs (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"). Raw outputs are the part of ``numpy.random`` that NumPy promises to keep;
its shuffling functions may change with a release.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def permutation(count: int, seed: int, epoch: int, purpose: int) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that is fixed by (seed, epoch, purpose).

    Philox key = (seed, epoch). ``purpose`` is the highest word of the 256-bit counter, and drawing raises
    the lowest, so that no two purposes share an output: 0 permutes the blocks, g + 1 the rows of group g.

    Returns: int64 [count].
    """
    philox = np.random.Philox(
        key=np.array([seed, epoch], dtype=np.uint64), counter=np.array([0, 0, 0, purpose], dtype=np.uint64)
    )
    return np.argsort(philox.random_raw(count), kind="stable")


class Order:
    """The order of one split under one seed. O(blocks) memory, O(blocks) once per epoch, then O(group).

    Args:
        block_rows: rows of each block, in stored order, all positive.
        seed: 0 <= seed < 2**64.
        group_blocks: blocks whose rows are shuffled together, at least 1.

    Raises:
        ValueError: no blocks, an empty block, or a seed or group size out of range.
    """

    def __init__(self, block_rows: Sequence[int] | NDArray[np.int64], seed: int, group_blocks: int) -> None:
        self.block_rows = np.asarray(block_rows, dtype=np.int64)
        if self.block_rows.size == 0 or self.block_rows.min() < 1:
            raise ValueError("block_rows must name at least one block, and every block at least one row")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} is outside 0 .. 2**64 - 1; choose another")
        if group_blocks < 1:
            raise ValueError(f"group_blocks={group_blocks} is less than 1; 1 shuffles within each block only")
        self.seed = seed
        self.group_blocks = group_blocks
        self.rows = int(self.block_rows.sum())
        # What was worked out last: reading goes forward, so two epochs (the next for ``upcoming``) and one
        # group are enough.
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._group: tuple[int, int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def locate(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the rows at positions ``start .. start + count - 1`` are stored.

        Returns: (block index, row within the block), int64 [count] each; positions may cross epoch ends.
        Raises: ValueError when a number is negative.
        """
        if start < 0 or count < 0:
            raise ValueError(f"positions are counted from 0: start={start}, count={count}")
        block_index = np.empty(count, dtype=np.int64)
        row_in_block = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(start + done, self.rows)
            blocks, group_starts = self._blocks_of_epoch(epoch)
            group = int(np.searchsorted(group_starts, offset, side="right")) - 1
            group_blocks, group_rows = self._rows_of_group(epoch, group, blocks)
            first = offset - int(group_starts[group])
            taken = min(count - done, group_rows.size - first)
            block_index[done : done + taken] = group_blocks[first : first + taken]
            row_in_block[done : done + taken] = group_rows[first : first + taken]
            done += taken
        return block_index, row_in_block

    def upcoming(self, position: int, count: int) -> list[int]:
        """The blocks of the group that is read at a position, then the ``count`` blocks after it.

        They stand in the order in which they are needed, and end with the next epoch at the latest; one that
        both epochs need may stand there twice. Raises: ValueError when a number is negative.
        """
        if position < 0 or count < 0:
            raise ValueError(f"positions are counted from 0: position={position}, count={count}")
        epoch, offset = divmod(position, self.rows)
        blocks, group_starts = self._blocks_of_epoch(epoch)
        first = (int(np.searchsorted(group_starts, offset, side="right")) - 1) * self.group_blocks
        stop = min(first + self.group_blocks, blocks.size) + count
        found = blocks[first:stop].tolist()
        if stop > blocks.size:
            found += self._blocks_of_epoch(epoch + 1)[0][: stop - blocks.size].tolist()
        return found

    def _blocks_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Permuted block indices [blocks] and the offset in the epoch at which each group starts [groups]."""
        if epoch not in self._epochs:
            if len(self._epochs) == 2:
                del self._epochs[next(iter(self._epochs))]
            blocks = permutation(self.block_rows.size, self.seed, epoch, purpose=0)
            starts = np.cumsum(self.block_rows[blocks]) - self.block_rows[blocks]
            self._epochs[epoch] = (blocks, starts[:: self.group_blocks])
        return self._epochs[epoch]

    def _rows_of_group(
        self, epoch: int, group: int, blocks: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Block index and row within it of a group's rows, in the order in which they are read."""
        if self._group is None or self._group[:2] != (epoch, group):
            members = blocks[group * self.group_blocks : (group + 1) * self.group_blocks]
            sizes = self.block_rows[members]
            starts = np.cumsum(sizes) - sizes
            shuffled = permutation(int(sizes.sum()), self.seed, epoch, purpose=group + 1)
            rows = np.arange(shuffled.size) - np.repeat(starts, sizes)
            self._group = (epoch, group, np.repeat(members, sizes)[shuffled], rows[shuffled])
        return self._group[2], self._group[3]


def rank_slice(step_start: int, global_batch_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """The positions [start, stop) that a rank reads in the global step beginning at ``step_start``.

    Where ranks do not divide the step, their numbers of rows differ by one.

    Raises:
        ValueError: there are fewer rows than ranks, or ``rank`` is not one of them.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of world_size={world_size} ranks, counted from 0")
    if global_batch_rows < world_size:
        raise ValueError(f"global_batch_rows={global_batch_rows} is too small for {world_size} ranks")
    first, last = (number * global_batch_rows // world_size for number in (rank, rank + 1))
    return step_start + first, step_start + last
