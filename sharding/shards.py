"""The shard writer: blocks of rows as members of plain, deterministic tar files that WebDataset reads."""

import contextlib
import hashlib
import io
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset
from numpy.typing import NDArray

from sharding.manifest import Block, Member, Shard
from sharding.packing import Rows

TAR_BLOCK_BYTES = 512
TAR_RECORD_BYTES = 10_240
TAR_END_BYTES = 2 * TAR_BLOCK_BYTES
"""Two zero blocks end an archive; the file is then filled up to a whole record."""


class _HashingFile:
    """A file that knows its SHA-256: shards are never read back to be hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


class ShardWriter:
    """Writes the blocks of one split to ``<root>/<split>/00000.tar ...``.

    The bytes depend on the rows alone: no times, owners or modes from outside. A shard is written under a
    temporary name, flushed to disk and renamed. ``max_shard_bytes`` is kept unless one block is larger.
    """

    def __init__(self, root: Path, split: str, max_shard_bytes: int) -> None:
        self.root, self.split, self.max_shard_bytes = root, split, max_shard_bytes
        self.rows = self.tokens = 0
        self._shards: list[Shard] = []
        self._blocks: list[Block] = []  # of the open shard
        self._end = 0  # bytes of the open shard, without the end of the archive
        self._file: BinaryIO | None = None
        (root / split).mkdir(parents=True)

    def write(self, rows: Rows) -> None:
        """Append one block. Raises OSError when the disk does."""
        arrays = {"ids": rows.ids, "len": rows.lengths, "seg": rows.segments}
        contents = {kind: _npy_bytes(array) for kind, array in arrays.items()}
        block_bytes = sum(TAR_BLOCK_BYTES + _padded(len(data), TAR_BLOCK_BYTES) for data in contents.values())
        if (
            self._blocks
            and _padded(self._end + block_bytes + TAR_END_BYTES, TAR_RECORD_BYTES) > self.max_shard_bytes
        ):
            self._close_shard()
        if self._file is None:
            self._open_shard()
        name = f"{sum(len(shard.blocks) for shard in self._shards) + len(self._blocks):08d}"
        members = {}
        for kind, data in contents.items():
            members[kind] = Member(self._end + TAR_BLOCK_BYTES, len(data), zlib.crc32(data))
            self._end += TAR_BLOCK_BYTES + _padded(len(data), TAR_BLOCK_BYTES)
        self._tar.write({"__key__": name, **{f"{kind}.npy": data for kind, data in contents.items()}})
        tokens = int(rows.lengths.sum(dtype=np.int64))
        self._blocks.append(Block(name, len(rows.ids), tokens, **members))
        self.rows += len(rows.ids)
        self.tokens += tokens

    def close(self) -> tuple[Shard, ...]:
        """Complete the last shard; returns all shards in order."""
        if self._file is not None:
            self._close_shard()
        return tuple(self._shards)

    def abort(self) -> None:
        """Release the open file of a build that failed."""
        if self._file is not None:
            for opened in (self._tar, self._file):
                with contextlib.suppress(OSError):  # what is still buffered may not fit on the disk either
                    opened.close()

    def _open_shard(self) -> None:
        self._path = f"{self.split}/{len(self._shards):05d}.tar"
        self._file = open(self.root / f"{self._path}.tmp", "wb")
        self._hashing = _HashingFile(self._file)
        self._tar = webdataset.TarWriter(self._hashing, user="", group="", mode=0o444, mtime=0, encoder=False)

    def _close_shard(self) -> None:
        assert self._file is not None
        self._tar.close()
        self._file.flush()
        size = self._file.tell()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.rename(self.root / f"{self._path}.tmp", self.root / self._path)
        self._shards.append(Shard(self._path, size, self._hashing.sha256.hexdigest(), tuple(self._blocks)))
        self._blocks, self._end = [], 0


def _npy_bytes(array: NDArray[np.integer]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
