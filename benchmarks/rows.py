"""Corpora of random rows of true shape, for what measures reading them: no text, no tokenizer."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sharding.manifest import FORMAT_VERSION, MANIFEST_NAME, LeftOut, Manifest, Shard, SourceInfo, Split
from sharding.manifest import TokenizerInfo as Tokenizer
from sharding.packing import Rows
from sharding.shards import write_shard

SEQ_LEN, BLOCK_ROWS, VOCABULARY = 128, 1024, 30_522
CLS, SEP = 101, 102
SHARD_BYTES = 134_217_728


def random_blocks(count: int, seed: int) -> Iterator[Rows]:
    """Full blocks of rows ``[CLS] A [SEP]``, a tenth of them padded."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        ids = random.integers(999, VOCABULARY, (BLOCK_ROWS, SEQ_LEN), dtype=np.uint16)
        lengths = np.where(random.random(BLOCK_ROWS) < 0.1, random.integers(3, SEQ_LEN, BLOCK_ROWS), SEQ_LEN)
        ids[:, 0], ids[np.arange(BLOCK_ROWS), lengths - 1] = CLS, SEP
        ids[np.arange(SEQ_LEN) >= lengths[:, None]] = 0
        yield Rows(ids, lengths.astype(np.uint16), lengths.astype(np.uint16))


def write_random_shard(root: Path, number: int, blocks: int) -> Shard:
    """Write one shard of random rows."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    return write_shard(root, f"train/{number:05d}.tar", random_blocks(blocks, seed=number))


def write_manifest(root: Path, shards: Sequence[Shard]) -> None:
    """Make a corpus of shards that lie in ``root``."""
    rows, tokens = (sum(sum(column) for column in columns) for columns in zip(*_counts(shards), strict=True))
    manifest = Manifest(
        version=FORMAT_VERSION,
        tokenizer=Tokenizer("none", None, "0" * 64, VOCABULARY, 0, CLS, SEP),
        source=SourceInfo("text", ("random rows",), None, None, None, 0, None),
        seq_len=SEQ_LEN,
        packing="document",
        block_rows=BLOCK_ROWS,
        heldout_share=0.0,
        shuffle_seed=None,
        deduplicate="none",
        near_threshold=None,
        left_out=LeftOut(0, 0, 0, 0),
        splits={"train": Split(documents=rows, rows=rows, tokens=tokens, shards=tuple(shards))},
    )
    (root / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _counts(shards: Sequence[Shard]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    for shard in shards:
        yield shard.rows, shard.tokens
