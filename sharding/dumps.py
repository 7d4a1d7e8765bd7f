"""MediaWiki dumps: cut into parts that begin at pages, and parsed.

A multistream dump is many bz2 streams, one behind the other: the head, then a hundred pages each, then the
closing tag. A part is some of them, which a process decompresses by itself and parses between the dump's head
and a closing tag.
"""

import bz2
import io
import os
import re
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, BinaryIO

import mwxml
from mwxml.element_iterator import ElementIterator
from mwxml.errors import MalformedXML

from configs.corpus_schema import SourceConfig
from sharding.documents import COMPRESSIONS, READ_BYTES, Document, Part, content, cut, open_file
from sharding.manifest import CorpusError

PAGE = b"<page>"
"""Angle brackets of a text are escaped, so this is never one."""
STREAM = re.compile(rb"BZh[1-9]1AY&SY")
"""How a bz2 stream begins: its own signature and that of its first block."""
STREAM_START_BYTES = 10
LONGEST_STREAM_BYTES = 1 << 26
"""Where no stream begins in so many bytes, none is looked for any further: it is no multistream dump."""


def page_starts(path: Path, part_bytes: int) -> list[int]:
    """Where the parts of a dump begin; [0] when it cannot be cut.

    Raises: CorpusError when the index beside it does not belong to it or cannot be read.
    """
    size = path.stat().st_size
    with open_file(path) as raw:
        if path.suffix not in COMPRESSIONS:
            return cut(size, part_bytes, lambda position: _find(raw, re.compile(PAGE), len(PAGE), position))
        if path.suffix != ".bz2" or size <= part_bytes:
            return [0]
        index = _index_path(path)
        if index is not None and index.is_file():
            return _indexed_starts(path, index, part_bytes)
        starts = cut(
            size,
            part_bytes,
            lambda position: _find(raw, STREAM, STREAM_START_BYTES, position, LONGEST_STREAM_BYTES),
        )
    # The streams of pbzip2 and its like begin anywhere.
    return [0, *(start for start, fit in zip(starts[1:], _begin_pages(path, starts[1:]), strict=True) if fit)]


def is_index(path: Path) -> bool:
    """Whether this is a multistream index, which lies beside its dump and holds no pages."""
    return re.search(r"-multistream-index\d*\.txt", path.name) is not None


def _index_path(dump: Path) -> Path | None:
    """Where Wikimedia puts the index of a dump, ``x-multistream1.xml-p1p9.bz2``; None for another name."""
    match = re.fullmatch(r"(.*-multistream)(\d*)\.xml(.*)\.bz2", dump.name)
    return dump.with_name("{}-index{}.txt{}.bz2".format(*match.groups())) if match else None


def _indexed_starts(path: Path, index: Path, part_bytes: int) -> list[int]:
    size = path.stat().st_size
    offsets = _offsets(index)

    def next_start(position: int) -> int | None:
        place = bisect_left(offsets, position)
        return offsets[place] if place < len(offsets) else None

    starts = cut(size, part_bytes, next_start)
    wrong = [start for start, fit in zip(starts[1:], _begin_pages(path, starts[1:]), strict=True) if not fit]
    if wrong or (offsets and offsets[-1] >= size):
        place = (wrong or offsets[-1:])[0]
        raise CorpusError(
            f"source.path: {index} says that pages begin at byte {place:,} of {path} ({size:,} bytes), but "
            "none do: the index is another dump's, or the dump is damaged; fetch both again, or remove the "
            "index to go without"
        )
    return starts


def _offsets(index: Path) -> list[int]:
    """The bytes at which the streams of pages begin, from lines of ``offset:page id:title``, one a page."""
    offsets: list[int] = []
    last = b""
    try:
        with open_file(index) as raw:
            for line in content(raw, ".bz2"):
                offset = line[: line.find(b":")]
                if offset != last:
                    offsets.append(int(offset))
                    last = offset
    except (EOFError, OSError, ValueError) as error:
        raise CorpusError(
            f"source.path: {index} is truncated, damaged or no index: {error} (behind stream "
            f"{len(offsets):,}); fetch it again, or remove it to go without"
        ) from error
    return sorted(offsets)


def _find(
    file: BinaryIO, pattern: re.Pattern[bytes], width: int, position: int, limit: int | None = None
) -> int | None:
    """The first byte at ``position`` or behind it, within ``limit`` bytes, at which ``width`` bytes match.

    Read, not mapped: a file that shrinks meanwhile must end in a message, not in SIGBUS.
    """
    file.seek(position)
    window = b""
    while chunk := file.read(READ_BYTES):
        window += chunk
        if found := pattern.search(window):
            return file.tell() - len(window) + found.start()
        if limit is not None and file.tell() - position > limit:
            return None
        window = window[1 - width :]
    return None


def _begin_pages(path: Path, starts: list[int]) -> list[bool]:
    """Whether at each of these bytes a stream begins, and with a page; a block is decompressed to know."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(lambda start: _begins_page(path, start), starts))


def _begins_page(path: Path, start: int) -> bool:
    with open_file(path) as raw:
        raw.seek(start)
        decompressor = bz2.BZ2Decompressor()
        text = b""
        try:
            while len(text) < len(PAGE) and not decompressor.eof:
                compressed = raw.read(READ_BYTES) if decompressor.needs_input else b""
                if not compressed and decompressor.needs_input:
                    return False
                text = (text + decompressor.decompress(compressed, READ_BYTES)).lstrip()
        except OSError:  # no stream, or a damaged one, which its reader will report
            return False
    return text.startswith(PAGE)


def pages(source: SourceConfig, part: Part, raw: BinaryIO) -> Iterator[Document]:
    """Articles (namespace 0) that are not redirects: page id and markup of the last revision in the file."""
    root = ElementIterator.from_file(_whole_document(part, raw))
    if root.tag != "mediawiki":
        raise MalformedXML(f"its first element is <{root.tag}>, not <mediawiki>")
    try:
        for page in mwxml.Dump.from_element(root).pages:
            # The parser would keep the emptied element of every page it has seen: gigabytes in a full dump.
            del root.element[:-1]
            if page.namespace == 0 and page.redirect is None:
                markup = ""
                for revision in page:
                    markup = revision.text or ""
                yield Document(str(page.id), markup)
    except (AttributeError, TypeError, ValueError) as error:  # from mwxml, for elements that are empty
        raise MalformedXML(f"a page lacks its title, number or namespace: {error}") from error


def _whole_document(part: Part, raw: BinaryIO) -> "_Chain":
    """A part between the head of its file and a closing tag; the last part of a file brings its own."""
    suffix = Path(part.source).suffix
    head = _head(content(raw, suffix)) if part.start else b""
    raw.seek(part.start)
    tail = b"</mediawiki>" if part.stop is not None else b""
    return _Chain(io.BytesIO(head), content(raw, suffix, part.stop), io.BytesIO(tail))


def _head(dump: IO[bytes]) -> bytes:
    """All that stands before the first page."""
    head = b""
    while PAGE not in head and (chunk := dump.read(READ_BYTES)):
        head += chunk
    return head[: head.find(PAGE)]


class _Chain:
    """Files read one behind the other."""

    def __init__(self, *files: IO[bytes]) -> None:
        self.files = files

    def read(self, size: int) -> bytes:
        return next((chunk for file in self.files if (chunk := file.read(size))), b"")
