"""Rows as a person reads them: where they stand, and the text that their ids spell."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sharding.blocks import Reader
from sharding.manifest import Corpus, CorpusError
from sharding.order import Order
from sharding.tokens import load_tokenizer, tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PeekedRow:
    """A row and where it stands."""

    position: int | None
    """Rows of the run before it; None for a row that was asked for by its stored place."""
    shard: str
    block: str
    row: int
    """Its index in the block."""
    length: int
    """Valid tokens."""
    segment: int
    """Index of segment B's first token; equal to ``length`` where there is none."""
    text_a: str
    """What the ids of [CLS] A [SEP] spell."""
    text_b: str
    """What the ids of B [SEP] spell; empty where there is no segment B."""


def corpus_tokenizer(corpus: Corpus, name: str | None) -> "PreTrainedTokenizerFast":
    """The tokenizer that the manifest names, or the one at ``name``, if its hash is that of the manifest.

    Raises: CorpusError when it cannot be loaded or is another one.
    """
    wanted = corpus.manifest.tokenizer
    try:
        tokenizer = load_tokenizer(name or wanted.name, None if name else wanted.revision)
    except CorpusError as error:
        raise CorpusError(
            f"{error}; the corpus was built with {wanted.name}: name its folder with --tokenizer"
        ) from error
    found = tokenizer_sha256(tokenizer)
    if found != wanted.sha256:
        raise CorpusError(
            f"tokenizer {name or wanted.name} (sha256 {found[:12]}...) is not the one that the corpus was "
            f"built with, {wanted.name} (sha256 {wanted.sha256[:12]}...), and would spell other words; "
            "name that one with --tokenizer"
        )
    return tokenizer


def peek_order(
    corpus: Corpus,
    split: str,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    position: int,
    rows: int,
    seed: int,
    group_blocks: int,
) -> list[PeekedRow]:
    """The rows at positions ``position ..`` of a run with this seed, as training meets them.

    Raises: CorpusError for a damaged block, a missing split, or numbers that describe no order.
    """
    reader = Reader(corpus, split, cache_blocks=1)
    try:
        order = Order(reader.split.block_rows, seed, group_blocks)
        block_index, row_in_block = order.locate(position, rows)
    except ValueError as error:
        raise CorpusError(str(error)) from error
    return _peek(reader, tokenizer, range(position, position + rows), block_index, row_in_block)


def peek_stored(
    corpus: Corpus, split: str, tokenizer: "PreTrainedTokenizerFast", *, first: int, rows: int
) -> list[PeekedRow]:
    """The rows ``first ..`` of a split as they are stored; fewer at its end.

    Raises: CorpusError for a damaged block, a missing split, or a row that it does not have.
    """
    reader = Reader(corpus, split, cache_blocks=1)
    starts = np.cumsum([0, *reader.split.block_rows])
    if not 0 <= first < starts[-1]:
        raise CorpusError(f"stored row {first} is not one of 0 .. {starts[-1] - 1} of split {split}")
    stored = np.arange(first, min(first + rows, starts[-1]))
    block_index = np.searchsorted(starts, stored, side="right") - 1
    return _peek(reader, tokenizer, [None] * stored.size, block_index, stored - starts[block_index])


def _peek(
    reader: Reader,
    tokenizer: "PreTrainedTokenizerFast",
    positions: Iterable[int | None],
    block_index: NDArray[np.int64],
    row_in_block: NDArray[np.int64],
) -> list[PeekedRow]:
    peeked = []
    gathered = zip(*reader.rows(block_index, row_in_block), strict=True)
    for position, index, row, (ids, length, segment) in zip(
        positions, block_index, row_in_block, gathered, strict=True
    ):
        shard, block = reader.split.block(index)
        text_a, text_b = (str(tokenizer.decode(part)) for part in (ids[:segment], ids[segment:length]))
        peeked.append(
            PeekedRow(position, shard.path, block.name, int(row), int(length), int(segment), text_a, text_b)
        )
    return peeked
