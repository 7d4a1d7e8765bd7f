"""What all sources share: documents, parts for processes to read by themselves, files behind compression."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
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


def cut(size: int, part_bytes: int, next_start: Callable[[int], int | None]) -> list[int]:
    """Where the parts of ``size`` bytes begin: at 0, and at the first fit byte from each multiple of
    ``part_bytes`` on, which ``next_start`` finds."""
    starts = [0]
    for position in range(part_bytes, size, part_bytes):
        if position <= starts[-1]:  # within one large document
            continue
        start = next_start(position)
        if start is None or start >= size:
            break
        starts.append(start)
    return starts


def file_parts(number: int, path: Path, starts: list[int], most_bytes: int) -> list[Part]:
    """The parts of one file, the ``number``-th of its source, that begin at ``starts`` (the first is 0).

    A file of more than ``most_bytes`` with no second start is a sequential part.
    """
    size = path.stat().st_size
    bounds = zip(starts, [*starts[1:], None], strict=True)
    return [
        Part(
            name=f"{number:05d}-{start:013d}",
            source=str(path),
            start=start,
            stop=stop,
            bytes=(size if stop is None else stop) - start,
            sequential=len(starts) == 1 and size > most_bytes,
        )
        for start, stop in bounds
    ]


def open_file(path: Path | str) -> BinaryIO:
    """The file as it lies there. Raises: CorpusError when it cannot be opened."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise CorpusError(f"source.path: {path} cannot be opened: {error.strerror}") from error


def content(raw: BinaryIO, suffix: str, stop: int | None = None) -> IO[bytes]:
    """What a file holds from where it stands, through the compression that its suffix names.

    ``stop``: the byte of the file at which this ends; within gzip it is not known.
    """
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(raw))
    if stop is not None:
        raw = io.BufferedReader(_Range(raw, stop), READ_BYTES)
    if suffix in (".bz2", ".xz"):
        return io.BufferedReader(_Streams(raw, suffix), READ_BYTES)
    return raw


class _Range(io.RawIOBase):
    """A file up to byte ``stop``."""

    def __init__(self, raw: BinaryIO, stop: int) -> None:
        self.raw, self.stop = raw, stop

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self.raw.read(min(len(buffer), self.stop - self.raw.tell()))
        buffer[: len(chunk)] = chunk
        return len(chunk)


class _Streams(io.RawIOBase):
    """What consecutive bz2 or xz streams hold.

    ``BZ2File`` and ``LZMAFile`` take whatever is no stream, once one has ended, for the end of the file: a
    damaged stream in the middle would go unnoticed, with all that follow it.
    """

    def __init__(self, raw: BinaryIO, suffix: str) -> None:
        self.raw = raw
        self.new: Callable[[], Any] = bz2.BZ2Decompressor if suffix == ".bz2" else lzma.LZMADecompressor
        self.decompressor = self.new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        decompressed = b""
        while not decompressed:
            if self.decompressor.eof:
                compressed = self.decompressor.unused_data.lstrip(b"\0")  # xz files may be padded
                while not compressed:
                    if not (chunk := self.raw.read(READ_BYTES)):
                        return 0
                    compressed = chunk.lstrip(b"\0")
                self.decompressor = self.new()
            elif self.decompressor.needs_input:
                if not (compressed := self.raw.read(READ_BYTES)):
                    raise EOFError("it ends within a compressed stream")
            else:
                compressed = b""
            decompressed = self.decompressor.decompress(compressed, len(buffer))
        buffer[: len(decompressed)] = decompressed
        return len(decompressed)


def utf8(line: bytes, place: str) -> str:
    """Raises: CorpusError naming the place for anything else."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{place} is not UTF-8: {error.reason} at its byte {error.start}; convert it first"
        ) from error


def json_record(line: bytes, place: str) -> dict[str, Any]:
    """Raises: CorpusError naming the place for anything but a JSON object."""
    try:
        record = json.loads(utf8(line, place))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{place} is not JSON: {error}; one JSON object is expected") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{place} is a JSON {type(record).__name__}; one JSON object is expected")
    return record


def record_fields(record: dict[str, Any], source: SourceConfig, place: str, default_id: str) -> Document:
    """The document that a record holds; CorpusError naming the place when it has no such field."""
    for key, field in (("source.text_field", source.text_field), ("source.id_field", source.id_field)):
        if field is not None and record.get(field) is None:
            known = ", ".join(sorted(record)) or "none"
            raise CorpusError(f"{place} has no {key}={field!r}; its fields are: {known}")
    text = record[source.text_field]
    if not isinstance(text, str):
        raise CorpusError(
            f"{place}: source.text_field={source.text_field!r} holds a {type(text).__name__}, not text"
        )
    document = Document(str(record[source.id_field]) if source.id_field else default_id, text)
    try:
        for value in document:
            value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise CorpusError(
            f"{place}: its id or text is not valid Unicode: {error.reason} at character {error.start}; "
            "repair or remove it"
        ) from error
    return document
