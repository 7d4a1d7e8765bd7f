"""Tiles cover everything once, within their limit."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.numerics import blocks, tiles


@given(st.integers(0, 50), st.integers(0, 20), st.integers(1, 100))
def test_tiles_cover_everything_once_within_the_limit(size, each, limit):
    found = list(tiles(size, each, limit))
    assert [place for tile in found for place in range(size)[tile]] == list(range(size))
    assert all((tile.stop - tile.start) * each <= limit or tile.stop - tile.start == 1 for tile in found)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 20), st.integers(1, 200))
def test_blocks_cover_all_rows_and_heads_once_within_the_limit(rows, heads, each, limit):
    seen_BR = torch.zeros(rows, heads)
    for block in blocks(rows, heads, each, limit):
        seen_BR[block] += 1
        count = seen_BR[block].numel()
        assert count * each <= limit or count == 1
    assert (seen_BR == 1).all()
