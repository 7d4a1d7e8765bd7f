"""The order against a Philox of our own, as properties, and pinned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.order import Order, permutation, rank_slice

MASK = 2**64 - 1


def philox_4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x64-10 from its definition (Salmon et al. 2011, section 3.3), in plain integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def reference_permutation(count: int, seed: int, epoch: int, purpose: int) -> list[int]:
    # NumPy raises the counter before it draws: the first four outputs are those of counter 1.
    draws = [x for low in range(1, count // 4 + 2) for x in philox_4x64([low, 0, 0, purpose], [seed, epoch])]
    return sorted(range(count), key=lambda i: draws[i])


def reference_order(block_rows: list[int], seed: int, group_blocks: int, epoch: int) -> list[tuple[int, int]]:
    """One epoch's (block, row) in order, row by row as DESIGN section 4 says it."""
    blocks = reference_permutation(len(block_rows), seed, epoch, 0)
    order = []
    for group, first in enumerate(range(0, len(blocks), group_blocks)):
        rows = [(b, row) for b in blocks[first : first + group_blocks] for row in range(block_rows[b])]
        order += [rows[i] for i in reference_permutation(len(rows), seed, epoch, group + 1)]
    return order


def located(order: Order, start: int, count: int) -> list[tuple[int, int]]:
    blocks, rows = order.locate(start, count)
    return list(zip(blocks.tolist(), rows.tolist(), strict=True))


BLOCKS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
SEEDS = st.integers(0, MASK)


def test_philox_reference_matches_its_published_vector() -> None:
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox_4x64([0, 0, 0, 0], [0, 0]) == expected


def test_golden_vectors() -> None:
    # Never change these: every checkpoint in the world counts on them.
    assert permutation(12, seed=0, epoch=0, purpose=0).tolist() == [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    assert permutation(12, seed=MASK, epoch=3, purpose=7).tolist() == [1, 7, 8, 6, 9, 5, 2, 10, 4, 11, 3, 0]
    blocks, rows = Order([3, 2, 3, 1], seed=17, group_blocks=2).locate(0, 18)
    assert blocks.tolist() == [2, 2, 3, 2, 0, 1, 0, 0, 1, 0, 0, 0, 3, 2, 1, 2, 1, 2]
    assert rows.tolist() == [2, 0, 0, 1, 0, 1, 2, 1, 0, 2, 0, 1, 0, 2, 1, 0, 0, 1]


@settings(max_examples=60, deadline=None)
@given(BLOCKS, SEEDS, st.integers(1, 5), st.integers(0, 3))
def test_equals_the_definition(block_rows: list[int], seed: int, group_blocks: int, epoch: int) -> None:
    order = Order(block_rows, seed, group_blocks)
    expected = reference_order(block_rows, seed, group_blocks, epoch)
    assert located(order, epoch * order.rows, order.rows) == expected


@settings(max_examples=60, deadline=None)
@given(BLOCKS, SEEDS, st.integers(1, 5))
def test_each_row_exactly_once_per_epoch(block_rows: list[int], seed: int, group_blocks: int) -> None:
    order = Order(block_rows, seed, group_blocks)
    everything = [(block, row) for block, rows in enumerate(block_rows) for row in range(rows)]
    for epoch in range(3):
        assert sorted(located(order, epoch * order.rows, order.rows)) == everything


@settings(max_examples=60, deadline=None)
@given(BLOCKS, SEEDS, st.integers(1, 5), st.integers(1, 8), st.data())
def test_ranks_see_the_same_global_batches(
    block_rows: list[int], seed: int, group_blocks: int, rows_per_rank: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    batch = rows_per_rank * world_size + data.draw(st.integers(0, world_size - 1))  # shares may differ by one
    order = Order(block_rows, seed, group_blocks)
    straight = located(order, 0, 6 * batch)  # past epoch ends for most draws
    for step in range(6):
        ranks = [Order(block_rows, seed, group_blocks) for _ in range(world_size)]
        slices = [rank_slice(step * batch, batch, rank, world_size) for rank in range(world_size)]
        assert {stop - start for start, stop in slices} <= {rows_per_rank, rows_per_rank + 1}
        pieces = [located(own, start, stop - start) for own, (start, stop) in zip(ranks, slices, strict=True)]
        assert sum(pieces, []) == straight[step * batch : (step + 1) * batch]


@settings(max_examples=60, deadline=None)
@given(BLOCKS, SEEDS, st.integers(1, 5), st.integers(0, 200), st.integers(0, 60))
def test_seek_equals_replay(
    block_rows: list[int], seed: int, group_blocks: int, start: int, count: int
) -> None:
    replayed = Order(block_rows, seed, group_blocks)
    read = [place for position in range(start + count) for place in located(replayed, position, 1)]
    assert located(Order(block_rows, seed, group_blocks), start, count) == read[start:]


def test_epochs_seeds_and_groups_differ() -> None:
    order = Order([8] * 8, seed=1, group_blocks=4)
    epochs = [located(order, epoch * 64, 64) for epoch in range(3)]
    other_seed = located(Order([8] * 8, seed=2, group_blocks=4), 0, 64)
    assert len({tuple(x) for x in [*epochs, other_seed]}) == 4
    # The two groups of an epoch are not shuffled alike.
    first, second = (np.array([row for _, row in epochs[0][half : half + 32]]) for half in (0, 32))
    assert (first != second).any()


def test_memory_and_seek_do_not_grow_with_rows() -> None:
    # 36 million rows, as English Wikipedia: a seek draws one epoch's blocks and one group's rows, no more.
    order = Order([1024] * 35_000, seed=3, group_blocks=16)
    blocks, rows = order.locate(5 * order.rows + 20_000_000, 256)
    assert len(set(blocks.tolist())) <= 32 and rows.max() < 1024
    arrays = [
        x
        for cached in (*order._epochs.values(), order._group)
        for x in cached or ()
        if isinstance(x, np.ndarray)
    ]
    assert sum(array.nbytes for array in arrays) < 2_000_000


@pytest.mark.parametrize("count", [0, 1, 2, 4, 9, 100])
def test_upcoming_names_the_blocks_of_the_groups_to_come(count: int) -> None:
    sizes = [3, 5, 4, 4, 2, 6, 1, 7, 3]
    order, fresh = Order(sizes, seed=11, group_blocks=2), Order(sizes, seed=11, group_blocks=2)
    reading = order.locate(0, 4 * order.rows)[0]
    for position in (0, 7, 20, order.rows - 1, order.rows, 2 * order.rows + 5):
        epoch, groups = position // order.rows, []
        for one in (epoch, epoch + 1):
            found = list(dict.fromkeys(reading[one * order.rows : (one + 1) * order.rows].tolist()))
            groups += [found[first : first + 2] for first in range(0, 9, 2)]
            if one == epoch:
                current = next(g for g, blocks in enumerate(groups) if reading[position] in blocks)
        # Blocks stand group by group; the last group may be cut.
        upcoming = order.upcoming(position, count)
        whole = [block for group in groups[current:] for block in group]
        assert len(upcoming) == min(len(groups[current]) + count, len(whole))
        taken = 0
        for group in groups[current:]:
            part = upcoming[taken : taken + len(group)]
            assert set(part) == set(group) if len(part) == len(group) else set(part) <= set(group)
            taken += len(part)
        assert np.array_equal(fresh.locate(position, 60), order.locate(position, 60))


def test_upcoming_counts_from_0() -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        Order([4], 0, 1).upcoming(-1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0, 1), "at least one block"),
        (([4, 0], 0, 1), "at least one row"),
        (([4], -1, 1), "seed=-1 is outside"),
        (([4], 2**64, 1), "is outside"),
        (([4], 0, 0), "group_blocks=0"),
    ],
)
def test_bad_arguments(arguments: tuple[list[int], int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(*arguments)


def test_bad_positions_and_ranks() -> None:
    with pytest.raises(ValueError, match="counted from 0: start=-1"):
        Order([4], 0, 1).locate(-1, 2)
    with pytest.raises(ValueError, match="global_batch_rows=2 is too small for 4 ranks"):
        rank_slice(0, 2, 0, 4)
    with pytest.raises(ValueError, match="rank=4 is not one of world_size=4"):
        rank_slice(0, 8, 4, 4)
