"""Sources of text: what lies where, cut into parts that processes read independently, in a fixed order."""

import glob
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from xml.etree.ElementTree import ParseError

from mwxml.errors import MalformedXML

from configs.corpus_schema import SourceConfig, SourceKind
from sharding import dumps, hub
from sharding.documents import (
    COMPRESSIONS,
    Document,
    Part,
    decompressed,
    file_parts,
    open_file,
    record_fields,
    whole_file,
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
"""About so many bytes of uncompressed text are a part."""

DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, ParseError, MalformedXML)
"""What decompressors and the XML parser raise for a file that is cut or overwritten."""


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
    found = []
    for number, path in enumerate(source_files(source)):
        found += _parts_of_file(source, number, path, part_bytes)
    return found


def _parts_of_file(source: SourceConfig, number: int, path: Path, part_bytes: int | None) -> list[Part]:
    return [whole_file(number, path, sequential=path.suffix in COMPRESSIONS)]


def documents(source: SourceConfig, part: Part) -> Iterator[Document]:
    """The documents of one part in their order, without the ones that hold only white space.

    Raises: CorpusError naming file and place for anything that cannot be read.
    """
    found = hub.documents(source, part) if source.kind is SourceKind.datasets else _from_file(source, part)
    return (document for document in found if document.text.strip())


def _from_file(source: SourceConfig, part: Part) -> Iterator[Document]:
    readers = {SourceKind.mediawiki: dumps.pages, SourceKind.jsonl: _json_lines, SourceKind.text: _texts}
    read = 0
    with open_file(part.source) as raw:
        try:
            for document in readers[source.kind](source, part, raw):
                yield document
                read += 1
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"source.path: {part.source} is not UTF-8: {error}; convert it first"
            ) from error
        except DAMAGE as error:
            raise CorpusError(
                f"source.path: {part.source} is truncated or damaged: {error} (after {read} documents, at "
                f"byte {raw.tell():,} of {Path(part.source).stat().st_size:,}); fetch it again and compare its "
                "checksum with the publisher's"
            ) from error


def _lines(part: Part, raw: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a part, each with its offset in the uncompressed file."""
    path = Path(part.source)
    raw.seek(part.start)
    offset = part.start
    for line in decompressed(raw, path.suffix):
        if offset == part.stop:
            return
        yield offset, line
        offset += len(line)


def _json_lines(source: SourceConfig, part: Part, raw: BinaryIO) -> Iterator[Document]:
    name = Path(part.source).name
    for number, (offset, line) in enumerate(_lines(part, raw), start=1):
        if line.isspace():
            continue
        place = f"{part.source}:{number}" if part.start == 0 else f"{part.source} (byte {offset})"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{place} is not JSON: {error}; every line must be one JSON object") from error
        if not isinstance(record, dict):
            raise CorpusError(
                f"{place} is a JSON {type(record).__name__}; every line must be one JSON object"
            )
        yield record_fields(record, source, place, default_id=f"{name}@{offset}")


def _texts(source: SourceConfig, part: Part, raw: BinaryIO) -> Iterator[Document]:
    """Lines, or paragraphs that blank lines separate; the id is the file's name and where they begin."""
    name = Path(part.source).name
    lines: list[str] = []
    first = 0
    for offset, line in _lines(part, raw):
        text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
        if lines and (source.one_per_line or not text.strip()):
            yield Document(f"{name}@{first}", "".join(lines))
            lines = []
        if text.strip():
            first = first if lines else offset
            lines.append(text)
    if lines:
        yield Document(f"{name}@{first}", "".join(lines))
