"""Packing: from documents' token ids to rows, block by block. Pure; letters: n rows, L = seq_len.

A row is ``[CLS] A [SEP]`` or ``[CLS] A [SEP] B [SEP]``. Packing ``full`` treats a split as one stream of
documents: a row is filled across document ends, the first end inside it begins segment B, and every further
end adds a [SEP] within B. Sentence-pair students thus meet both segments in general distillation, B being
unrelated text as in half of BERT's next-sentence pairs. Packing ``document`` starts each document on a new
row. No row holds two [SEP] in a row or an empty segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored."""

    ids: NDArray[np.integer]
    """uint16 or uint32 [n, L]; the pad id from each row's length on."""
    lengths: NDArray[np.uint16]
    """uint16 [n]: valid tokens."""
    segments: NDArray[np.uint16]
    """uint16 [n]: index of segment B's first token; equal to the length where there is no B."""


class Packer:
    """Packs the documents of one split in the order in which they are added.

    Args:
        seq_len: most tokens in a row, special tokens included; at least 4.
        block_rows: rows per block; only the last block of a split is smaller.
        cross_documents: packing ``full`` (True) or ``document`` (False).
        pad_id, cls_id, sep_id: special token ids; documents hold none of them.
        dtype: of the stored ids.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        block_rows: int,
        cross_documents: bool,
        pad_id: int,
        cls_id: int,
        sep_id: int,
        dtype: DTypeLike,
    ) -> None:
        self.seq_len, self.block_rows, self.cross_documents = seq_len, block_rows, cross_documents
        self.pad_id, self.cls_id, self.sep_id = pad_id, cls_id, sep_id
        self.dtype = np.dtype(dtype)
        self._row = 0  # complete rows of the open block
        self._filled = 0  # tokens in the open row
        self._segment = 0  # where segment B of the open row begins; 0, the [CLS], while there is none
        self._start_block()

    def add(self, document: NDArray[np.integer]) -> Iterator[Rows]:
        """Take one document's ids [tokens], not empty; yields the blocks that it completes."""
        used = 0
        while used < document.size:
            # Between documents: a [SEP] and a token of B must both fit before the row's last [SEP].
            if used == 0 and self._filled and self._filled + 3 <= self.seq_len:
                self._begin_segment()
            elif used == 0 and self._filled:
                yield from self._end_row()
            if not self._filled:
                self._put(np.array([self.cls_id]))
            taken = min(self.seq_len - 1 - self._filled, document.size - used)
            self._put(document[used : used + taken])
            used += taken
            if used < document.size or not self.cross_documents:
                yield from self._end_row()

    def finish(self) -> Iterator[Rows]:
        """End the split: yields the last blocks, of which the very last may be smaller."""
        if self._filled:
            yield from self._end_row()
        if self._row:
            yield self._take_block()

    def _put(self, ids: NDArray[np.integer]) -> None:
        self._ids[self._row, self._filled : self._filled + ids.size] = ids
        self._filled += ids.size

    def _begin_segment(self) -> None:
        self._put(np.array([self.sep_id]))
        if not self._segment:
            self._segment = self._filled

    def _end_row(self) -> Iterator[Rows]:
        self._put(np.array([self.sep_id]))
        self._lengths[self._row] = self._filled
        self._segments[self._row] = self._segment or self._filled
        self._row += 1
        self._filled = self._segment = 0
        if self._row == self.block_rows:
            yield self._take_block()

    def _take_block(self) -> Rows:
        block = Rows(self._ids[: self._row], self._lengths[: self._row], self._segments[: self._row])
        self._start_block()
        return block

    def _start_block(self) -> None:
        self._ids = np.full((self.block_rows, self.seq_len), self.pad_id, dtype=self.dtype)
        self._lengths = np.zeros(self.block_rows, dtype=np.uint16)
        self._segments = np.zeros(self.block_rows, dtype=np.uint16)
        self._row = 0
