"""Shards: blocks of rows as members of plain, deterministic tar files that WebDataset reads."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from sharding.files import new_file
from sharding.manifest import KINDS, Members, Shard, block_name
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


def write_shard(
    root: Path, path: str, blocks: Iterable[Rows], labels: Iterable[NDArray[np.float32]] | None = None
) -> Shard:
    """Write blocks, each with its labels [n, K] where there are any, to ``<root>/<path>``, whole or not at
    all. The bytes depend on the rows, the labels and the file's name alone: no times, owners or modes from
    outside. Raises OSError when the disk does."""
    rows: list[int] = []
    tokens: list[int] = []
    members: dict[str, list[tuple[int, int, int]]] = {}
    end = 0  # bytes so far
    with new_file(root / path) as file:
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=cast(BinaryIO, hashing), mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for number, (block, lab) in enumerate(_labelled(blocks, labels)):
                arrays = (block.ids, block.lengths, block.segments, lab)
                for kind, array in zip(KINDS, arrays, strict=True):
                    if array is None:
                        continue
                    data = _npy_bytes(array)
                    members.setdefault(kind, []).append((end + TAR_BLOCK_BYTES, len(data), zlib.crc32(data)))
                    end += TAR_BLOCK_BYTES + _padded(len(data), TAR_BLOCK_BYTES)
                    member = tarfile.TarInfo(f"{block_name(path, number)}.{kind}.npy")  # time 0, no owner
                    member.size, member.mode = len(data), 0o444
                    tar.addfile(member, io.BytesIO(data))
                rows.append(len(block.ids))
                tokens.append(int(block.lengths.sum(dtype=np.int64)))
        size = file.tell()
    return Shard(
        path=path,
        bytes=size,
        sha256=hashing.sha256.hexdigest(),
        rows=tuple(rows),
        tokens=tuple(tokens),
        **{kind: Members(*zip(*places, strict=True)) for kind, places in members.items()},
    )


def _labelled(
    blocks: Iterable[Rows], labels: Iterable[NDArray[np.float32]] | None
) -> Iterator[tuple[Rows, NDArray[np.float32] | None]]:
    if labels is None:
        return ((block, None) for block in blocks)
    return zip(blocks, labels, strict=True)


def shard_bytes(rows: int, block_rows: int, seq_len: int, id_bytes: int) -> int:
    """Size of a shard of so many rows."""
    blocks, rest = divmod(rows, block_rows)
    content = blocks * _block_bytes(block_rows, seq_len, id_bytes)
    if rest:
        content += _block_bytes(rest, seq_len, id_bytes)
    return _padded(content + TAR_END_BYTES, TAR_RECORD_BYTES)


def most_rows(max_shard_bytes: int, block_rows: int, seq_len: int, id_bytes: int) -> int:
    """The most rows that a shard of ``max_shard_bytes`` holds."""
    fit, too_many = 0, max_shard_bytes // (seq_len * id_bytes) + 1
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        if shard_bytes(middle, block_rows, seq_len, id_bytes) <= max_shard_bytes:
            fit = middle
        else:
            too_many = middle
    return fit


def _block_bytes(rows: int, seq_len: int, id_bytes: int) -> int:
    arrays = (rows * seq_len * id_bytes, 2 * rows, 2 * rows)
    header = len(_npy_bytes(np.empty((0, seq_len), np.uint16)))
    return sum(TAR_BLOCK_BYTES + _padded(header + size, TAR_BLOCK_BYTES) for size in arrays)


def _npy_bytes(array: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
