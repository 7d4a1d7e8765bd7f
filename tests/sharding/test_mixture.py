"""The mixture: closed form against a replay of single turns, exact quotas, bins that never mix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.mixture import PERIOD, Mixture, Turns

WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(0, 5 * PERIOD), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_the_closed_form_is_the_count_of_single_turns(weights: list[float], start: int, count: int) -> None:
    turns = Turns(weights)
    kinds = turns.kinds(start, count)
    counted = turns.before(start) + np.bincount(kinds, minlength=len(weights))
    assert np.array_equal(turns.before(start + count), counted)
    assert turns.before(start).sum() == start


@given(WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_shares_are_kept_in_every_period_and_nearly_so_within(weights: list[float]) -> None:
    turns = Turns(weights)
    shares = np.array(weights) / np.sum(weights)
    assert np.abs(turns.before(PERIOD) - shares * PERIOD).max() <= 1
    for turn in range(0, PERIOD, 997):
        # Evenly spread: at no point is a corpus ahead of its share, or behind, by more than a few rows.
        assert np.abs(turns.before(turn) - shares * turn).max() <= len(weights) + 1


def test_a_known_pattern() -> None:
    assert Turns([3, 1]).period[:8].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert Turns([1, 1, 1]).before(PERIOD).tolist() == [3334, 3333, 3333]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -2.0], [float("nan")], [1e9, 1.0]])
def test_weights_that_cannot_be_dealt(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights="):
        Turns(weights)


def replay(mixture: Mixture, batch: int, steps: int, world_size: int) -> list[list[tuple[int, int]]]:
    """(corpus, row position in it) of every row of every global step, as the ranks find them."""
    share = batch // world_size
    found = []
    for step in range(steps):
        rows: list[tuple[int, int]] = []
        for rank in range(world_size):
            slots: dict[int, tuple[int, int]] = {}
            for draw in mixture.draws(step * batch, rank * share, share):
                slots |= {
                    int(slot): (draw.corpus, draw.start + place) for place, slot in enumerate(draw.slots)
                }
            rows += [slots[slot] for slot in range(share)]
        found.append(rows)
    return found


@given(
    st.lists(st.tuples(st.sampled_from([32, 128, 512]), st.floats(0.05, 5)), min_size=1, max_size=5),
    st.sampled_from([12, 24, 60]),
    st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_each_corpus_is_read_without_gaps_and_each_step_from_one_bin(
    corpora: list[tuple[int, float]], batch: int, steps: int
) -> None:
    lengths = [length for length, _ in corpora]
    mixture = Mixture(lengths, [weight for _, weight in corpora], batch)
    found = replay(mixture, batch, steps, 1)
    for corpus in range(len(corpora)):
        own = [row for step in found for c, row in step if c == corpus]
        assert own == list(range(len(own)))
        assert mixture.consumed(steps * batch)[corpus] == len(own)
    assert all(len({lengths[c] for c, _ in step}) == 1 for step in found)
    for world_size in (2, 3, 4):
        assert replay(mixture, batch, steps, world_size) == found


def test_several_lengths_cannot_begin_inside_a_step() -> None:
    assert Mixture([32, 32], [1, 1], 8).consumed(5).sum() == 5
    with pytest.raises(ValueError, match="position=5 does not begin a step of global_batch_rows=8"):
        Mixture([32, 64], [1, 1], 8).draws(5, 0, 8)
