"""Sources of text: what lies where, cut into parts that processes read independently, in a fixed order."""

import codecs
import glob
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from xml.etree.ElementTree import ParseError

from mwxml.errors import MalformedXML

from configs.corpus_schema import SourceConfig, SourceKind
from sharding import dumps, hub, tars
from sharding.documents import (
    COMPRESSIONS,
    Document,
    Part,
    content,
    cut,
    file_parts,
    json_record,
    open_file,
    record_fields,
    utf8,
)
from sharding.manifest import CorpusError

SUFFIXES = {
    SourceKind.mediawiki: (".xml",),
    SourceKind.jsonl: (".jsonl", ".json", ".ndjson"),
    SourceKind.text: (".txt", ".text", ".raw"),
    SourceKind.webdataset: (".tar",),
}
"""What a folder is searched for, each also compressed. A single file or a glob may be named freely."""

PART_BYTES = 32 << 20
"""About so many bytes of text are a part."""
DUMP_PART_BYTES = 8 << 20
"""And so many of a compressed dump."""
WHOLE_FILE_SHARE = 64
"""A file that cannot be cut is a part like others up to this fraction of its source: processes read one each
of the many files of such a source."""

DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, ParseError, MalformedXML, tarfile.TarError)
"""What decompressors and parsers raise for a file that is cut or overwritten."""


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a source in sorted order; for ``datasets`` none, it finds its own.

    Raises: CorpusError when nothing is there.
    """
    if source.kind is SourceKind.datasets:
        return []
    path = Path(source.path).expanduser()
    if path.is_dir():
        suffixes = tuple(
            suffix + compression for suffix in SUFFIXES[source.kind] for compression in ("", *COMPRESSIONS)
        )
        # A folder may hold a dump under Wikimedia's own names, "...xml-p1p41242.bz2".
        files = [
            file
            for file in path.iterdir()
            if file.name.endswith(suffixes) or (source.kind is SourceKind.mediawiki and ".xml-p" in file.name)
        ]
        if not files:
            raise CorpusError(
                f"source.path={path} holds no {source.kind.value} files ({', '.join(suffixes)})"
            )
        return sorted(files)
    files = [Path(name) for name in glob.glob(str(path))] or [path]
    if source.kind is SourceKind.mediawiki:  # a glob for dumps finds what lies beside them
        files = [file for file in files if not dumps.is_index(file)] or [path]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise CorpusError(
            f"source.path={missing[0]} does not exist; give a file, a folder or a glob ({source.kind.value})"
        )
    return sorted(files)


def parts(source: SourceConfig, part_bytes: int | None = None) -> list[Part]:
    """The source cut into parts of about ``part_bytes`` where it can be; their documents, one part after the
    other, are the source's documents in its order. Depends on the files (and ``part_bytes``) alone.

    Raises: CorpusError when nothing is there, or when an index does not belong to its dump.
    """
    if source.kind is SourceKind.datasets:
        return hub.parts(source)
    files = source_files(source)
    source_bytes = sum(file.stat().st_size for file in files)
    found = []
    for number, path in enumerate(files):
        compressed_dump = source.kind is SourceKind.mediawiki and path.suffix == ".bz2"
        size = part_bytes or (DUMP_PART_BYTES if compressed_dump else PART_BYTES)
        found += file_parts(
            number, path, _starts(source, path, size), most_bytes=max(size, source_bytes // WHOLE_FILE_SHARE)
        )
    return found


def _starts(source: SourceConfig, path: Path, part_bytes: int) -> list[int]:
    """Where the parts of a file begin."""
    if source.kind is SourceKind.mediawiki:
        return dumps.page_starts(path, part_bytes)
    if source.kind is SourceKind.webdataset or path.suffix in COMPRESSIONS:
        return [0]
    by_line = source.kind is SourceKind.jsonl or source.one_per_line
    with open_file(path) as raw:

        def next_start(position: int) -> int:
            raw.seek(position - 1)
            line = raw.readline()  # the rest of one
            while not by_line and (line := raw.readline()) and not line.isspace():
                pass
            return raw.tell()

        return cut(path.stat().st_size, part_bytes, next_start)


def documents(source: SourceConfig, part: Part) -> Iterator[Document]:
    """The documents of one part in their order, without the ones that hold only white space.

    Raises: CorpusError naming file and place for anything that cannot be read.
    """
    found = hub.documents(source, part) if source.kind is SourceKind.datasets else _from_file(source, part)
    return (document for document in found if document.text.strip())


def _from_file(source: SourceConfig, part: Part) -> Iterator[Document]:
    readers = {
        SourceKind.mediawiki: dumps.pages,
        SourceKind.jsonl: _json_lines,
        SourceKind.text: _texts,
        SourceKind.webdataset: tars.samples,
    }
    read = 0
    with open_file(part.source) as raw:
        try:
            for document in readers[source.kind](source, part, raw):
                yield document
                read += 1
        except DAMAGE as error:
            raise CorpusError(
                f"source.path: {part.source} is truncated or damaged: {error} (after {read} documents from "
                f"byte {part.start:,} on, at byte {raw.tell():,} of {Path(part.source).stat().st_size:,}); "
                "fetch it again and compare its checksum with the publisher's"
            ) from error


def _lines(part: Part, raw: BinaryIO) -> Iterator[tuple[str, int, bytes]]:
    """The lines of a part: a name for messages, the byte of the uncompressed file where it begins, itself."""
    raw.seek(part.start)
    offset = part.start
    for number, line in enumerate(content(raw, Path(part.source).suffix, part.stop), start=1):
        place = f"{part.source}:{number}" if part.start == 0 else f"{part.source} byte {offset}"
        yield place, offset, line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
        offset += len(line)


def _json_lines(source: SourceConfig, part: Part, raw: BinaryIO) -> Iterator[Document]:
    name = Path(part.source).name
    for place, offset, line in _lines(part, raw):
        if line.strip():
            yield record_fields(json_record(line, place), source, place, default_id=f"{name}@{offset}")


def _texts(source: SourceConfig, part: Part, raw: BinaryIO) -> Iterator[Document]:
    """Lines, or paragraphs that blank lines separate; the id is the file's name and where they begin."""
    name = Path(part.source).name
    lines: list[str] = []
    first = 0
    for place, offset, line in _lines(part, raw):
        text = utf8(line, place)
        if lines and (source.one_per_line or not text.strip()):
            yield Document(f"{name}@{first}", "".join(lines))
            lines = []
        if text.strip():
            first = first if lines else offset
            lines.append(text)
    if lines:
        yield Document(f"{name}@{first}", "".join(lines))
