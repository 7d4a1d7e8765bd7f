"""What all sources share: documents, the parts that processes read by themselves, files behind compression."""

import bz2
import gzip
import io
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

from configs.corpus_schema import SourceConfig
from sharding.manifest import CorpusError

COMPRESSIONS = (".bz2", ".gz", ".xz")
READ_BYTES = 1 << 16


class Document(NamedTuple):
    """One document of a source, as it stands there: wiki markup is not yet cleaned."""

    id: str
    """Stable name within the source; decides the split."""
    text: str


@dataclass(frozen=True)
class Part:
    """A piece of a source that one process reads by itself."""

    name: str
    """Unique in the source, fit for a file name; names sort in the source's order."""
    source: str
    """The file (or dataset) it lies in."""
    start: int
    """First byte of the file; for ``datasets`` the first row or shard."""
    stop: int | None
    """Where the next part begins; None: at the end, wherever that is."""
    bytes: int
    """Size in the source, compressed where it is; 0 where that is not known."""
    sequential: bool
    """Cannot be split, however large it is: a compressed file that is one stream."""


def file_parts(number: int, path: Path, starts: Iterable[int]) -> list[Part]:
    """A file cut at ``starts``, its first byte included. ``number`` is its place among the source's files."""
    size = path.stat().st_size
    bounds = [*starts, size]
    return [
        Part(
            name=f"{number:05d}-{start:013d}",
            source=str(path),
            start=start,
            stop=None if stop == size else stop,
            bytes=stop - start,
            sequential=False,
        )
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def whole_file(number: int, path: Path, *, sequential: bool) -> Part:
    """A file that is one part."""
    return Part(f"{number:05d}-{0:013d}", str(path), 0, None, path.stat().st_size, sequential)


def open_file(path: Path | str) -> BinaryIO:
    """The file as it lies there. Raises: CorpusError when it cannot be opened."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise CorpusError(f"source.path: {path} cannot be opened: {error.strerror}") from error


def decompressed(raw: BinaryIO, suffix: str, stop: int | None = None) -> IO[bytes]:
    """The content of a file from where it stands, through the compression that its suffix names.

    ``stop`` (bz2 and xz): the byte of the file at which the last stream to be read ends.
    """
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(raw))
    if suffix in (".bz2", ".xz"):
        return io.BufferedReader(_Streams(raw, suffix, stop), READ_BYTES)
    return raw


class _Streams(io.RawIOBase):
    """The content of consecutive bz2 or xz streams.

    ``BZ2File`` and ``LZMAFile`` take anything that is no stream, once one has ended, for the end of the file: a
    damaged stream in the middle would go unnoticed with all that follow it.
    """

    def __init__(self, raw: BinaryIO, suffix: str, stop: int | None) -> None:
        self.raw, self.suffix, self.stop = raw, suffix, stop
        self.decompressor = self._new()

    def _new(self) -> Any:
        return bz2.BZ2Decompressor() if self.suffix == ".bz2" else lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = b""
        while not content:
            if self.decompressor.eof:
                compressed = self.decompressor.unused_data
                while compressed is not None and not (
                    compressed := compressed.lstrip(b"\0")
                ):  # xz may be padded
                    if not (compressed := self._read()):
                        return 0
                self.decompressor = self._new()
            else:
                compressed = self._read() if self.decompressor.needs_input else b""
                if not compressed and self.decompressor.needs_input:
                    raise EOFError("the file ends within a compressed stream")
            content = self.decompressor.decompress(compressed, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _read(self) -> bytes:
        left = READ_BYTES if self.stop is None else min(READ_BYTES, self.stop - self.raw.tell())
        return self.raw.read(left)


def find(file: BinaryIO, pattern: bytes, position: int) -> int | None:
    """Where ``pattern`` next stands in the file, at ``position`` or behind it.

    Read, not mapped: a file that shrinks meanwhile must end in a message, not in SIGBUS.
    """
    file.seek(position)
    window = b""
    while chunk := file.read(READ_BYTES):
        window += chunk
        if (found := window.find(pattern)) >= 0:
            return file.tell() - len(window) + found
        window = window[-(len(pattern) - 1) :]
    return None


def record_fields(record: dict[str, Any], source: SourceConfig, place: str, default_id: str) -> Document:
    """The document that a record holds; CorpusError naming the place when it has no such field."""
    for key, field in (("source.text_field", source.text_field), ("source.id_field", source.id_field)):
        if field is not None and record.get(field) is None:
            known = ", ".join(sorted(record)) or "none"
            raise CorpusError(f"{place} has no {key}={field!r}; its fields are: {known}")
    if not isinstance(record[source.text_field], str):
        kind = type(record[source.text_field]).__name__
        raise CorpusError(f"{place}: source.text_field={source.text_field!r} holds a {kind}, not text")
    return Document(
        str(record[source.id_field]) if source.id_field else default_id, record[source.text_field]
    )
