"""The simulation proves what holds, and finds each way in which an order can be broken."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sharding import simulate as module
from sharding.manifest import CorpusError
from sharding.order import Order
from sharding.simulate import Simulation, simulate

BLOCKS = [7, 5, 9, 1, 8, 8, 4]  # 42 rows, seven batches of 6


def run(block_rows: list[int] = BLOCKS, **changes: object) -> Simulation:
    arguments = {"ranks": [2, 3, 1], "global_batch_rows": 6, "epochs": 3, "seed": 0, "group_blocks": 2}
    return simulate(block_rows, **{**arguments, **changes}, progress=False)


@settings(deadline=None, max_examples=30)
@given(
    block_rows=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    shares=st.integers(1, 3),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    group_blocks=st.integers(1, 5),
)
def test_the_order_keeps_its_promises(
    block_rows: list[int], ranks: list[int], shares: int, epochs: int, seed: int, group_blocks: int
) -> None:
    batch = shares * int(np.lcm.reduce(ranks))
    found = simulate(
        block_rows,
        ranks=ranks,
        global_batch_rows=batch,
        epochs=epochs,
        seed=seed,
        group_blocks=group_blocks,
        progress=False,
    )
    assert all(found.properties().values())
    assert found.steps * batch >= epochs * sum(block_rows) > (found.steps - 1) * batch
    assert sum(leg.steps for leg in found.legs) == found.steps == len(found.step_blocks)
    assert {leg.world_size for leg in found.legs} <= set(ranks)
    # All ranks of a step together read at least its distinct blocks, and no rank more than its rows.
    for leg in found.legs:
        assert leg.blocks_of_rank.shape == (leg.world_size,)
        assert (leg.blocks_of_rank <= leg.steps * batch // leg.world_size).all()


def test_figures_worked_by_hand() -> None:
    # One group, one rank, and a batch that is the epoch: every block is in it, the largest with most rows.
    found = run([2, 3], ranks=[1], global_batch_rows=5, epochs=2, group_blocks=2)
    assert (found.rows, found.blocks, found.steps) == (5, 2, 2)
    assert found.step_blocks == [2, 2] and found.step_largest == [3, 3]
    assert sum(int(leg.blocks_of_rank[0]) for leg in found.legs) == 4  # two blocks in each of two epochs
    # One block a group, one row a block: only whole blocks are permuted.
    found = run([1] * 100, ranks=[1], global_batch_rows=100, epochs=1, group_blocks=1)
    order = Order([1] * 100, 0, 1).locate(0, 100)[0]
    assert found.neighbours == 99
    assert found.neighbour_distance_sum == sum(abs(int(order[i + 1]) - int(order[i])) for i in range(99))


class _Broken(Order):
    """An order that goes wrong at one place of the run."""

    def locate(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        blocks, rows = super().locate(start, count)
        self.spoil(start, blocks, rows)
        return blocks, rows


class _Repeats(_Broken):
    def spoil(self, start: int, blocks: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        for position in (10, 11):  # both read the row that stands at 10
            if start <= position < start + blocks.size:
                at = Order.locate(self, 10, 1)
                blocks[position - start], rows[position - start] = at[0][0], at[1][0]


class _DependsOnSlices(_Broken):
    def spoil(self, start: int, blocks: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        blocks[:], rows[:] = blocks[::-1].copy(), rows[::-1].copy()


class _StartsAnew(_Broken):
    """Whatever is asked for first, the first rows of the run come: a resume that does not seek."""

    fresh = True

    def spoil(self, start: int, blocks: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        if self.fresh:
            blocks[:], rows[:] = Order.locate(self, 0, blocks.size)
        self.fresh = False


ONCE, SAME, SEEK = "every row exactly once", "the same global batches", "a restart continues"


@pytest.mark.parametrize(
    "broken, failed",
    [(_Repeats, {ONCE}), (_DependsOnSlices, {SAME, SEEK}), (_StartsAnew, {ONCE, SAME, SEEK})],
)
def test_a_broken_order_is_found(
    monkeypatch: pytest.MonkeyPatch, broken: type[Order], failed: set[str]
) -> None:
    monkeypatch.setattr(module, "Order", broken)
    found = run()
    held = found.properties()
    assert {
        key for key in (ONCE, SAME, SEEK) for name in held if name.startswith(key) and not held[name]
    } == failed
    if broken is _Repeats:
        assert (found.rows_missed, found.rows_repeated) == (1, 1)


def test_uneven_ranks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def uneven(step_start: int, rows: int, rank: int, world_size: int) -> tuple[int, int]:
        bounds = [0, *range(rows - world_size + 1, rows + 1)]  # the first rank takes what the others leave
        return step_start + bounds[rank], step_start + bounds[rank + 1]

    monkeypatch.setattr(module, "rank_slice", uneven)
    found = run(ranks=[2])
    failed = [name for name, held in found.properties().items() if not held]
    assert len(failed) == 1 and failed[0].startswith("every rank the same number of rows")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ranks": [8, 3, 5]}, r"global_batch_rows=6 is not a multiple of 120.*ranks=8,3,5 .*nearest: 120$"),
        ({"ranks": [4], "global_batch_rows": 10}, "nearest: 8, 12"),
        ({"group_blocks": 0}, "group_blocks=0 is less than 1"),
        ({"seed": -1}, "seed=-1 is outside"),
    ],
)
def test_what_cannot_be_simulated(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        run(**changes)
