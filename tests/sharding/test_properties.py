"""Exactly once, whatever happens to a run: real shards, the real stream, arbitrary histories of restarts."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.corpora import Corpora, Part
from sharding.manifest import Corpus, Split, open_corpus
from sharding.packing import Rows
from sharding.shards import write_shard
from sharding.stream import stream

SEQ_LEN = 8


def numbered(
    root: Path, like: Corpus, blocks: list[int], blocks_per_shard: int, seq_len: int = SEQ_LEN
) -> Corpus:
    """A corpus whose row number i holds the token i + 10, in blocks of the given sizes."""
    (root / "train").mkdir(parents=True)
    starts = np.cumsum([0, *blocks])
    made = []
    for count, start in zip(blocks, starts, strict=False):
        ids = np.zeros((count, seq_len), dtype=np.uint16)
        ids[:, :3] = np.stack(
            [np.full(count, 2), np.arange(start, start + count) + 10, np.full(count, 3)], axis=1
        )
        lengths = np.full(count, 3, dtype=np.uint16)
        made.append(Rows(ids, lengths, lengths))
    shards = tuple(
        write_shard(root, f"train/{number:05d}.tar", made[first : first + blocks_per_shard])
        for number, first in enumerate(range(0, len(made), blocks_per_shard))
    )
    rows = int(starts[-1])
    splits = {"train": Split(rows, rows, 3 * rows, shards)}
    manifest = replace(
        like.manifest, seq_len=seq_len, block_rows=max(blocks), heldout_share=0.0, splits=splits
    )
    (root / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return open_corpus(root)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """What may happen to a run: parts of (steps, ranks, reader processes), with a restart between them."""
    parts = st.tuples(st.integers(0, 6), st.sampled_from([1, 2, 3, 4, 6, 12]), st.just(0))
    return draw(st.lists(parts, min_size=1, max_size=6))


def live(
    corpora: Corpus | Corpora, history: list[tuple[int, int, int]], batch: int, seed: int, group_blocks: int
) -> Iterator[list[tuple[int, int]]]:
    """The global batches of a run with that history, as (corpus, row), each put together from its ranks.

    A rank that stops has read ahead of the others: what it prefetched is dropped, and counts for nothing.
    """
    position = 0
    for steps, ranks, workers in history:
        ahead = 2
        streams = [
            stream(
                corpora,
                "train",
                seed=seed,
                group_blocks=group_blocks,
                start_row=position,
                stop_row=position + (steps + ahead) * batch,
                global_batch_rows=batch,
                rank=rank,
                world_size=ranks,
                workers=workers,
                prefetch_steps=2,
            )
            for rank in range(ranks)
        ]
        for _ in range(steps):
            batches = [next(one) for one in streams]
            assert {len(one.ids_BS) for one in batches} == {batch // ranks}
            assert len({(one.position, one.ids_BS.shape[1]) for one in batches}) == 1
            position = batches[0].position
            yield [
                (corpus, token - 10)
                for one in batches
                for corpus, token in zip(one.corpus_B.tolist(), one.ids_BS[:, 1].tolist(), strict=True)
            ]


BLOCKS = st.lists(st.integers(1, 17), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def like(tiny_corpus: Path) -> Corpus:
    return open_corpus(tiny_corpus)


@given(
    BLOCKS,
    st.integers(1, 4),
    st.integers(0, 2**64 - 1),
    st.integers(1, 4),
    st.sampled_from([12, 24]),
    histories(),
)
@settings(max_examples=60, deadline=None)
def test_any_history_of_a_run_reads_what_an_undisturbed_one_reads(
    like: Corpus,
    blocks: list[int],
    blocks_per_shard: int,
    seed: int,
    group_blocks: int,
    batch: int,
    history: list[tuple[int, int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = numbered(Path(folder) / "c", like, blocks, blocks_per_shard)
        found = list(live(corpus, history, batch, seed, group_blocks))
        undisturbed = [(sum(steps for steps, _, _ in history), 1, 0)]
        assert found == list(live(corpus, undisturbed, batch, seed, group_blocks))
        read = [row for step in found for _, row in step]
        rows = sum(blocks)
        for start in range(0, len(read), rows):
            epoch = read[start : start + rows]
            assert len(set(epoch)) == len(epoch), "a row twice in an epoch"
            assert len(epoch) < rows or sorted(epoch) == list(range(rows)), "a row is missing"


@given(
    st.lists(st.tuples(BLOCKS, st.sampled_from([8, 16]), st.floats(0.1, 3)), min_size=2, max_size=4),
    st.integers(0, 1000),
    histories(),
)
@settings(max_examples=30, deadline=None)
def test_and_so_does_a_mixture(
    like: Corpus, drawn: list[tuple[list[int], int, float]], seed: int, history: list[tuple[int, int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpora = Corpora(
            tuple(
                Part(f"c{index}", numbered(Path(folder) / f"c{index}", like, blocks, 2, seq_len), weight)
                for index, (blocks, seq_len, weight) in enumerate(drawn)
            )
        )
        found = list(live(corpora, history, 12, seed, 2))
        assert found == list(live(corpora, [(sum(steps for steps, _, _ in history), 1, 0)], 12, seed, 2))
        for index, (blocks, _, _) in enumerate(drawn):
            read = [row for step in found for corpus, row in step if corpus == index]
            for start in range(0, len(read), sum(blocks)):
                epoch = read[start : start + sum(blocks)]
                assert len(set(epoch)) == len(epoch)
                assert len(epoch) < sum(blocks) or sorted(epoch) == list(range(sum(blocks)))


def test_reader_processes_take_part_in_such_a_history(like: Corpus, tmp_path: Path) -> None:
    corpus = numbered(tmp_path / "c", like, [16] * 12 + [5], 4)
    history = [(3, 2, 2), (4, 3, 1), (0, 1, 1), (5, 1, 2)]
    found = list(live(corpus, history, 24, 7, 3))
    assert found == list(live(corpus, [(12, 1, 0)], 24, 7, 3))
