"""Blocks of rows as they are stored: read whole, checked, and kept while they are in use.

Letters: n rows, S sequence length of the corpus.
"""

import io
import zlib
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from sharding.manifest import Block, Corpus, CorpusError, Member, Shard
from sharding.store import Store

Rows = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.integer]]
"""ids [n, S], lengths [n], segment starts [n]."""


class DamagedBlock(CorpusError):
    """A block that cannot be read or does not match its checksums."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message, index)
        self.index = index
        """Its index in the split."""

    def __str__(self) -> str:
        return str(self.args[0])


class Reader:
    """Rows of a split by stored place, keeping the ``cache_blocks`` blocks used last.

    A block is read whole, by one positional read, and its checksums are compared each time: unlike a memory
    map, a shard that is cut or rots under a running job ends in a message, never in SIGBUS or wrong rows.
    """

    def __init__(self, corpus: Corpus, split: str, cache_blocks: int) -> None:
        self.store = corpus.store
        self.seq_len = corpus.manifest.seq_len
        self.blocks: list[tuple[Shard, Block]] = [
            (shard, block) for shard in corpus.split(split).shards for block in shard.blocks
        ]
        self._cache_blocks = cache_blocks
        self._cache: OrderedDict[int, Rows] = OrderedDict()

    def gather(self, block_index: NDArray[np.int64], row_in_block: NDArray[np.int64]) -> Rows:
        """The rows (block_index[i], row_in_block[i]) in this order, int64.

        Raises: DamagedBlock for a block that cannot be read or does not match its checksums.
        """
        ids = np.empty((block_index.size, self.seq_len), dtype=np.int64)
        lengths = np.empty(block_index.size, dtype=np.int64)
        segments = np.empty(block_index.size, dtype=np.int64)
        for index in np.unique(block_index):
            here = np.flatnonzero(block_index == index)
            stored_ids, stored_lengths, stored_segments = self._block(int(index))
            ids[here] = stored_ids[row_in_block[here]]
            lengths[here] = stored_lengths[row_in_block[here]]
            segments[here] = stored_segments[row_in_block[here]]
        return ids, lengths, segments

    def _block(self, index: int) -> Rows:
        if index in self._cache:
            self._cache.move_to_end(index)
        else:
            if len(self._cache) >= self._cache_blocks:
                self._cache.popitem(last=False)
            shard, block = self.blocks[index]
            try:
                self._cache[index] = read_block(self.store, shard, block)
            except CorpusError as error:
                raise DamagedBlock(
                    f"{error}; `python launcher/corpus.py verify {self.store.location}` lists all damage: "
                    "copy those shards again, or build the corpus again, and resume",
                    index,
                ) from error
        return self._cache[index]


def read_block(store: Store, shard: Shard, block: Block) -> Rows:
    """Read one block of a shard and compare its checksums.

    Raises: CorpusError naming shard, member and offset.
    """
    first, last = block.ids.offset, block.seg.offset + block.seg.bytes
    return parse_block(store, shard, block, _read(store, shard, first, last - first))


def parse_block(store: Store, shard: Shard, block: Block, content: bytes) -> Rows:
    """The rows in ``content``, the shard's bytes from the block's first array to the end of its last.

    Raises: CorpusError naming shard, member and offset.
    """

    def array(kind: str, member: Member) -> NDArray[np.integer]:
        start = member.offset - block.ids.offset
        return _checked_array(
            store, shard, f"{block.name}.{kind}.npy", member, content[start : start + member.bytes]
        )

    return array("ids", block.ids), array("len", block.len), array("seg", block.seg)


def read_lengths(store: Store, shard: Shard, block: Block) -> NDArray[np.integer]:
    """The row lengths [n] of one block, without reading its ids. Raises as ``read_block``."""
    content = _read(store, shard, block.len.offset, block.len.bytes)
    return _checked_array(store, shard, f"{block.name}.len.npy", block.len, content)


def _read(store: Store, shard: Shard, offset: int, count: int) -> bytes:
    try:
        return store.read(shard.path, offset, count)
    except OSError as error:
        raise CorpusError(f"shard {shard.path} cannot be read: {error}") from error


def _checked_array(
    store: Store, shard: Shard, name: str, member: Member, content: bytes
) -> NDArray[np.integer]:
    if len(content) != member.bytes or zlib.crc32(content) != member.crc32:
        raise CorpusError(
            f"corrupt shard {store.location}/{shard.path}: member {name} ({member.bytes} bytes at offset "
            f"{member.offset}) does not match its checksum"
        )
    return np.load(io.BytesIO(content), allow_pickle=False)
