"""Blocks: rows by stored place, in any order, with any memory of blocks."""

from pathlib import Path

import numpy as np
import pytest

from sharding.blocks import Reader, read_block
from sharding.manifest import open_corpus


@pytest.mark.parametrize("cache_blocks", [1, 3, 100])
def test_gather_finds_every_row(tiny_corpus: Path, cache_blocks: int) -> None:
    corpus = open_corpus(tiny_corpus)
    reader = Reader(corpus, "train", cache_blocks)
    stored = [
        read_block(corpus.store, shard, block)
        for shard, block in map(reader.split.block, range(len(reader.split.block_rows)))
    ]
    random = np.random.default_rng(0)
    blocks = random.integers(len(stored), size=500)
    rows = np.array([random.integers(len(stored[block][0])) for block in blocks])
    for kind, found in enumerate(reader.rows(blocks, rows)):
        expected = [stored[block][kind][row] for block, row in zip(blocks, rows, strict=True)]
        assert found.dtype == np.int64 and np.array_equal(found, np.array(expected))
