"""Packing: hand-worked rows, and as a property, that the documents can be read back from the rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.packing import Packer, Rows

PAD, CLS, SEP = 0, 2, 3


def pack(documents: list[list[int]], seq_len: int, block_rows: int = 4, cross: bool = True) -> list[Rows]:
    packer = Packer(
        seq_len=seq_len,
        block_rows=block_rows,
        cross_documents=cross,
        pad_id=PAD,
        cls_id=CLS,
        sep_id=SEP,
        dtype=np.uint16,
    )
    blocks = [block for document in documents for block in packer.add(np.array(document, dtype=np.uint16))]
    return blocks + list(packer.finish())


def rows_of(blocks: list[Rows]) -> list[tuple[list[int], int]]:
    """(valid ids, segment start) per row."""
    return [
        (ids[:length].tolist(), int(segment))
        for block in blocks
        for ids, length, segment in zip(block.ids, block.lengths, block.segments, strict=True)
    ]


def test_full_by_hand() -> None:
    documents = [[11, 12, 13, 14, 15, 16, 17], [21, 22], [31], [41, 42, 43, 44, 45]]
    assert rows_of(pack(documents, seq_len=8)) == [
        ([CLS, 11, 12, 13, 14, 15, 16, SEP], 8),
        ([CLS, 17, SEP, 21, 22, SEP, 31, SEP], 3),  # the end of 31 falls on the end of the row
        ([CLS, 41, 42, 43, 44, 45, SEP], 7),
    ]


def test_full_leaves_one_token_short_rather_than_an_empty_segment() -> None:
    # After five tokens of A there is room for a [SEP] but for no token of B.
    assert rows_of(pack([[11, 12, 13, 14, 15], [21, 22]], seq_len=8)) == [
        ([CLS, 11, 12, 13, 14, 15, SEP], 7),
        ([CLS, 21, 22, SEP], 4),
    ]
    # After four there is room for exactly one.
    assert rows_of(pack([[11, 12, 13, 14], [21, 22]], seq_len=8)) == [
        ([CLS, 11, 12, 13, 14, SEP, 21, SEP], 6),
        ([CLS, 22, SEP], 3),
    ]


def test_document_by_hand() -> None:
    assert rows_of(pack([[11, 12, 13, 14, 15], [21]], seq_len=6, cross=False)) == [
        ([CLS, 11, 12, 13, 14, SEP], 6),
        ([CLS, 15, SEP], 3),
        ([CLS, 21, SEP], 3),
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(4, 17), st.integers(1, 5), st.booleans())
def test_rows_hold_the_documents_and_nothing_else(
    sizes: list[int], seq_len: int, block_rows: int, cross: bool
) -> None:
    token = iter(range(10, 60_000))
    documents = [[next(token) for _ in range(size)] for size in sizes]
    blocks = pack(documents, seq_len, block_rows, cross)
    assert [len(block.ids) for block in blocks[:-1]] == [block_rows] * (len(blocks) - 1)

    starts = {document[0] for document in documents}
    ends = {document[-1] for document in documents}
    payload: list[int] = []
    rows = rows_of(blocks)
    for index, (ids, segment) in enumerate(rows):
        assert ids[0] == CLS and ids[-1] == SEP and len(ids) <= seq_len
        separators = [i for i, x in enumerate(ids) if x == SEP]
        assert all(later - earlier > 1 for earlier, later in zip(separators, separators[1:], strict=False))
        assert segment == (len(ids) if len(separators) == 1 else separators[0] + 1)
        for inner in separators[:-1]:  # a [SEP] inside a row stands between two documents
            assert ids[inner - 1] in ends and ids[inner + 1] in starts
        if cross and index < len(rows) - 1:
            assert len(ids) >= seq_len - 1  # full, or one short
        payload += [x for x in ids if x not in (CLS, SEP)]
    assert payload == sum(documents, [])
    if not cross:
        assert len(rows) == sum(-(-size // (seq_len - 2)) for size in sizes)


def test_padding_holds_the_pad_id_and_dtypes_are_small() -> None:
    (block,) = pack([[11, 12]], seq_len=8)
    assert block.ids.tolist() == [[CLS, 11, 12, SEP, PAD, PAD, PAD, PAD]]
    assert (block.ids.dtype, block.lengths.dtype, block.segments.dtype) == (np.uint16, np.uint16, np.uint16)


@pytest.mark.parametrize("cross", [True, False])
def test_no_documents_no_rows(cross: bool) -> None:
    assert pack([], seq_len=8, cross=cross) == []
