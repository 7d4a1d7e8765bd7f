"""Blocks of rows as they are stored: read whole, checked, and kept while they are in use.

The rule of reading from remote stores: blocks are small (256 kB) and needed in random order over all
shards, so a block that is needed is read by one range request, ahead of need where the reader is told what
comes, and kept in the node's cache. When the split fits into that cache, its shards are fetched whole
besides, in the background, in the order of first need, verified by SHA-256, and from then on blocks are read
from them. Whatever a block is read from, its CRC-32s are compared each time.

Letters: n rows, S sequence length of the corpus.
"""

import functools
import hashlib
import io
import logging
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sharding.cache import KEPT_SHARE, NodeCache
from sharding.manifest import Block, Corpus, CorpusError, Manifest, Member, Shard
from sharding.store import PIECE_BYTES, Store, Unreachable
from sharding.tokens import id_dtype

log = logging.getLogger(__name__)

FETCH_THREADS = 8
"""Threads of a process that fetch ahead of need, for all its readers."""

T = TypeVar("T")
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
    Blocks of remote stores pass through ``node_cache``, where there is one.
    """

    def __init__(
        self, corpus: Corpus, split: str, cache_blocks: int, node_cache: NodeCache | None = None
    ) -> None:
        self.store, self.node_cache = corpus.store, node_cache
        self.split = corpus.split(split)
        self._kept = _Kept(cache_blocks, int(self.split.block_rows.max()), corpus.manifest)
        self._ahead: dict[int, Future[Rows]] = {}
        split_bytes = sum(shard.bytes for shard in self.split.shards)
        self._whole_shards = node_cache is not None and split_bytes <= KEPT_SHARE * node_cache.max_bytes
        self._shards_done: set[str] = set()
        self._shard_on_its_way: Future[None] | None = None

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Begin to fetch these blocks, the first needed first; what is not among them is no longer fetched.

        Does nothing where reading is cheap. What fails is tried again, and reported, when it is needed.
        """
        if self.store.is_local:
            return
        ahead = {
            index: self._ahead.get(index) or _in_background(functools.partial(self._read, index))
            for index in upcoming
            if index not in self._kept
        }
        for index in self._ahead.keys() - ahead.keys():
            self._ahead[index].cancel()
        self._ahead = ahead
        if self._whole_shards and (self._shard_on_its_way is None or self._shard_on_its_way.done()):
            shards = (self.split.block(index)[0] for index in upcoming)
            shard = next((shard for shard in shards if shard.sha256 not in self._shards_done), None)
            if shard is not None:
                self._shard_on_its_way = _in_background(functools.partial(self._fetch_shard, shard))

    @property
    def seq_len(self) -> int:
        """S."""
        return self._kept.rows[0].shape[1]

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Of stored ids."""
        return self._kept.rows[0].dtype

    def gather(
        self,
        block_index: NDArray[np.int64],
        row_in_block: NDArray[np.int64],
        into: Rows,
        places: NDArray[np.int64],
    ) -> None:
        """Put the rows (block_index[i], row_in_block[i]) at ``places[i]``, ascending, of ``into``.

        Raises: DamagedBlock for a block that cannot be read or does not match its checksums.
        """
        needed, of_row = np.unique(block_index, return_inverse=True)
        if needed.size > self._kept.blocks:  # than can be at hand at once
            for part in (of_row < needed.size // 2, of_row >= needed.size // 2):
                self.gather(block_index[part], row_in_block[part], into, places[part])
            return
        slots = np.array([self._slot(index) for index in needed.tolist()], dtype=np.int64)
        self._kept.take(slots[of_row], row_in_block, into, places)

    def rows(self, block_index: NDArray[np.int64], row_in_block: NDArray[np.int64]) -> Rows:
        """The same rows by themselves, int64. Raises as ``gather``."""
        count = block_index.size
        found = (
            np.empty((count, self.seq_len), np.int64),
            np.empty(count, np.int64),
            np.empty(count, np.int64),
        )
        self.gather(block_index, row_in_block, found, np.arange(count))
        return found

    def _slot(self, index: int) -> int:
        """Where the block is kept, from now on."""
        slot = self._kept.slot(index)
        if slot is not None:
            return slot
        try:
            return self._kept.put(index, self._fetched(index) or self._read(index))
        except CorpusError as error:
            if isinstance(error.__cause__, Unreachable):
                raise
            raise DamagedBlock(
                f"{error}; `python launcher/corpus.py verify {self.store.location}` lists all damage: "
                "copy those shards again, or build the corpus again, and resume",
                index,
            ) from error

    def _fetched(self, index: int) -> Rows | None:
        """A block that was fetched ahead of need; None when it was not, or when that failed."""
        fetch = self._ahead.pop(index, None)
        if fetch is None or fetch.cancel():  # one that still waits for a thread is sooner read here
            return None
        error = fetch.exception()
        if error is None:
            return fetch.result()
        log.warning("%s; it is read again", error)
        return None

    def _read(self, index: int) -> Rows:
        """Read a block, in any thread; of a remote store, from the node's cache where it is there."""
        shard, block = self.split.block(index)
        if self.store.is_local or self.node_cache is None:
            return read_block(self.store, shard, block)
        offset, count = _extent(block)
        own_name = f"{shard.sha256}-{block.name}"
        for name, start in ((shard.sha256, offset), (own_name, 0)):
            content = self.node_cache.read(name, start, count)
            if content is not None:
                try:
                    return parse_block(self.store, shard, block, content)
                except CorpusError:
                    self.node_cache.discard(name, f"block {block.name} does not match its checksum")
        fetch = functools.partial(_read_sound, self.store, shard, block)
        return parse_block(self.store, shard, block, self.node_cache.get(own_name, count, fetch))

    def _fetch_shard(self, shard: Shard) -> None:
        """Bring a whole shard into the node's cache, unless the node is busy with one."""
        assert self.node_cache is not None
        pieces = functools.partial(_pieces, self.store, shard)
        try:
            if self.node_cache.add(shard.sha256, shard.bytes, pieces):
                self._shards_done.add(shard.sha256)
        except CorpusError as error:
            log.warning("%s; its blocks are read one by one", error)
            self._shards_done.add(shard.sha256)


class _Kept:
    """The blocks used last, side by side in one array, so that rows of any of them are taken at once."""

    def __init__(self, blocks: int, block_rows: int, manifest: Manifest) -> None:
        self.blocks, self.block_rows = blocks, block_rows
        rows = blocks * block_rows
        self.rows: Rows = (
            np.empty((rows, manifest.seq_len), dtype=id_dtype(manifest.tokenizer.vocab_size)),
            np.empty(rows, dtype=np.uint16),
            np.empty(rows, dtype=np.uint16),
        )
        self._slots: OrderedDict[int, int] = OrderedDict()  # of a block, the one used longest ago first

    def __contains__(self, index: int) -> bool:
        return index in self._slots

    def slot(self, index: int) -> int | None:
        """Where a block is, and mark it as used; None when it is not kept."""
        if index in self._slots:
            self._slots.move_to_end(index)
        return self._slots.get(index)

    def put(self, index: int, rows: Rows) -> int:
        """Keep a block, in place of the one used longest ago when all places are taken."""
        full = len(self._slots) == self.blocks
        slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
        for kept, values in zip(self.rows, rows, strict=True):
            kept[slot * self.block_rows :][: len(values)] = values
        self._slots[index] = slot
        return slot

    def take(
        self, slots: NDArray[np.int64], rows: NDArray[np.int64], into: Rows, places: NDArray[np.int64]
    ) -> None:
        """Copy the rows (slots[i], rows[i]) to ``places[i]``, ascending, of ``into``."""
        kept_places = slots * self.block_rows + rows
        where: NDArray[np.int64] | slice = slice(None) if places.size == len(into[0]) else places
        for kept, values in zip(self.rows, into, strict=True):
            values[where] = kept[kept_places]


def _in_background(call: Callable[[], T]) -> "Future[T]":
    """Call in one of the process's fetching threads, in the order of asking."""
    future: Future[T] = Future()
    _background(os.getpid()).put((future, call))
    return future


@functools.cache
def _background(process: int) -> "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]":
    """The queue of this process's fetching threads, which are started.

    Daemons, unlike those of an executor: a process that ends does not wait for a store that does not answer.
    """

    def work() -> None:
        while True:
            future, call = queue.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del future, call  # while it waits it keeps no reader alive

    queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
    for _ in range(FETCH_THREADS):
        threading.Thread(target=work, daemon=True).start()
    return queue


def read_block(store: Store, shard: Shard, block: Block) -> Rows:
    """Read one block of a shard and compare its checksums; a remote one is read again when they differ.

    Raises: CorpusError naming shard, member and offset; its cause is Unreachable when the store is.
    """
    return parse_block(store, shard, block, _read_sound(store, shard, block))


def _read_sound(store: Store, shard: Shard, block: Block) -> bytes:
    """The content of a block as stored; a remote one has been parsed. Raises as ``read_block``."""
    offset, count = _extent(block)
    check = len if store.is_local else functools.partial(parse_block, store, shard, block)
    return _read(store, shard, offset, count, check)


def _extent(block: Block) -> tuple[int, int]:
    """Offset and bytes of a block in its shard."""
    return block.ids.offset, block.seg.offset + block.seg.bytes - block.ids.offset


def _pieces(store: Store, shard: Shard) -> Iterator[bytes]:
    """A shard's content, piece by piece. Raises: CorpusError, after the last, when its SHA-256 differs."""
    digest = hashlib.sha256()
    for offset in range(0, shard.bytes, PIECE_BYTES):
        piece = _read(store, shard, offset, min(PIECE_BYTES, shard.bytes - offset))
        digest.update(piece)
        yield piece
    if digest.hexdigest() != shard.sha256:
        raise CorpusError(
            f"shard {store.location}/{shard.path}: SHA-256 {digest.hexdigest()}, the manifest says "
            f"{shard.sha256}"
        )


def parse_block(store: Store, shard: Shard, block: Block, content: bytes) -> Rows:
    """The rows in ``content``, the shard's bytes from the block's first array to the end of its last.

    Raises: CorpusError naming shard, member and offset.
    """

    view = memoryview(content)

    def array(kind: str, member: Member) -> NDArray[np.integer]:
        start = member.offset - block.ids.offset
        return _checked_array(
            store, shard, f"{block.name}.{kind}.npy", member, view[start : start + member.bytes]
        )

    return array("ids", block.ids), array("len", block.len), array("seg", block.seg)


def read_lengths(store: Store, shard: Shard, block: Block) -> NDArray[np.integer]:
    """The row lengths [n] of one block, without reading its ids. Raises as ``read_block``."""
    content = _read(store, shard, block.len.offset, block.len.bytes)
    return _checked_array(store, shard, f"{block.name}.len.npy", block.len, memoryview(content))


def read_labels(store: Store, shard: Shard, block: Block) -> NDArray[np.float32]:
    """The labels [n, K] of one block of a task's corpus, nothing else. Raises as ``read_block``."""
    assert block.lab is not None
    content = _read(store, shard, block.lab.offset, block.lab.bytes)
    return parse_labels(store, shard, block, content)


def parse_labels(store: Store, shard: Shard, block: Block, content: bytes) -> NDArray[np.float32]:
    """The labels in ``content``, that member of the shard. Raises: CorpusError naming shard and member."""
    assert block.lab is not None
    return _checked_array(store, shard, f"{block.name}.lab.npy", block.lab, memoryview(content))


def _read(
    store: Store, shard: Shard, offset: int, count: int, check: Callable[[bytes], object] = len
) -> bytes:
    try:
        return store.read(shard.path, offset, count, check)
    except OSError as error:
        hint = "; resume when it answers" if isinstance(error, Unreachable) else ""
        raise CorpusError(f"shard {shard.path} cannot be read: {error}{hint}") from error


def _checked_array(
    store: Store, shard: Shard, name: str, member: Member, content: memoryview
) -> NDArray[Any]:
    if len(content) != member.bytes or zlib.crc32(content) != member.crc32:
        raise CorpusError(
            f"corrupt shard {store.location}/{shard.path}: member {name} ({member.bytes} bytes at offset "
            f"{member.offset}) does not match its checksum"
        )
    header = 10 + int.from_bytes(content[8:10], "little")
    dtype, shape = _npy_header(bytes(content[:header]))
    return np.frombuffer(content, dtype, offset=header).reshape(shape)


@functools.lru_cache
def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """What numpy's parser makes of a header; nearly all blocks have the same three."""
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return dtype, shape
