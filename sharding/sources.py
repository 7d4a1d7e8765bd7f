"""Sources of text: documents with an id in a fixed order, from dumps, JSONL, plain text and ``datasets``."""

import bz2
import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree.ElementTree import ParseError

import mwxml
from mwxml.element_iterator import ElementIterator
from mwxml.errors import MalformedXML

from configs.corpus_schema import SourceConfig, SourceKind
from sharding.manifest import CorpusError

COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = {
    SourceKind.mediawiki: (".xml",),
    SourceKind.jsonl: (".jsonl", ".json", ".ndjson"),
    SourceKind.text: (".txt", ".text", ".raw"),
}
"""What a folder is searched for, each also compressed. A single file or a glob may be named freely."""


class Document(NamedTuple):
    """One document of a source, as it stands there: wiki markup is not yet cleaned."""

    id: str
    """Stable name within the source; decides the split."""
    text: str
    bytes_read: int
    """Bytes of the source (compressed, where it is) read so far; 0 where that is not known."""


class _CountedFile:
    """One file of the source, opened through its compression, knowing where it stands on disk."""

    def __init__(self, path: Path, bytes_before: int) -> None:
        self.path, self.bytes_before = path, bytes_before
        try:
            self.raw = open(path, "rb")
        except OSError as error:
            raise CorpusError(f"source.path: {path} cannot be opened: {error.strerror}") from error
        opener = COMPRESSIONS.get(path.suffix)
        self.content: IO[bytes] = opener(self.raw) if opener else self.raw

    @property
    def bytes_read(self) -> int:
        return self.bytes_before + self.raw.tell()

    def fail(self, reason: object, documents: int) -> CorpusError:
        """The error for a file that ended early or cannot be understood."""
        return CorpusError(
            f"source.path: {self.path} is truncated or damaged: {reason} (after {documents} documents, at "
            f"byte {self.raw.tell():,} of {self.path.stat().st_size:,}); fetch it again and compare its "
            "checksum with the publisher's"
        )


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


def documents(source: SourceConfig, files: list[Path]) -> Iterator[Document]:
    """All documents of a source, in its order, without the ones that are empty.

    Raises: CorpusError naming file and place for anything that cannot be read.
    """
    if source.kind is SourceKind.datasets:
        found = _hub_documents(source)
    else:
        found = _file_documents(source, files)
    return (document for document in found if document.text.strip())


def _file_documents(source: SourceConfig, files: list[Path]) -> Iterator[Document]:
    readers = {SourceKind.mediawiki: _pages, SourceKind.jsonl: _json_lines, SourceKind.text: _texts}
    bytes_before = 0
    for path in files:
        file = _CountedFile(path, bytes_before)
        read = 0
        try:
            for document_id, text in readers[source.kind](file, source):
                yield Document(document_id, text, file.bytes_read)
                read += 1
        except UnicodeDecodeError as error:
            raise CorpusError(f"source.path: {path} is not UTF-8: {error}; convert it first") from error
        except DAMAGE as error:
            raise file.fail(error, read) from error
        finally:
            file.raw.close()
        bytes_before += path.stat().st_size


def _pages(file: _CountedFile, source: SourceConfig) -> Iterator[tuple[str, str]]:
    """Articles (namespace 0) that are not redirects: page id and markup of the last revision in the file."""
    root = ElementIterator.from_file(file.content)
    if root.tag != "mediawiki":
        raise MalformedXML(f"its first element is <{root.tag}>, not <mediawiki>")
    for page in mwxml.Dump.from_element(root).pages:
        # The parser would keep the emptied element of every page it has seen: gigabytes in a full dump.
        del root.element[:-1]
        if page.namespace == 0 and page.redirect is None:
            markup = ""
            for revision in page:
                markup = revision.text or ""
            yield str(page.id), markup


def _json_lines(file: _CountedFile, source: SourceConfig) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file.content, start=1):
        if line.isspace():
            continue
        place = f"{file.path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{place} is not JSON: {error}; every line must be one JSON object") from error
        if not isinstance(record, dict):
            raise CorpusError(
                f"{place} is a JSON {type(record).__name__}; every line must be one JSON object"
            )
        yield _fields(record, source, place, default_id=f"{file.path.name}:{number}")


def _fields(record: dict[str, Any], source: SourceConfig, place: str, default_id: str) -> tuple[str, str]:
    """The id and text of a record; CorpusError naming the place when it has no such field."""
    for key, field in (("source.text_field", source.text_field), ("source.id_field", source.id_field)):
        if field is not None and record.get(field) is None:
            known = ", ".join(sorted(record)) or "none"
            raise CorpusError(f"{place} has no {key}={field!r}; its fields are: {known}")
    if not isinstance(record[source.text_field], str):
        kind = type(record[source.text_field]).__name__
        raise CorpusError(f"{place}: source.text_field={source.text_field!r} holds a {kind}, not text")
    return str(record[source.id_field]) if source.id_field else default_id, record[source.text_field]


def _texts(file: _CountedFile, source: SourceConfig) -> Iterator[tuple[str, str]]:
    """Lines, or paragraphs that blank lines separate; the id is file name and number of the first line."""
    lines: list[str] = []
    first = 1
    for number, line in enumerate(file.content, start=1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if lines and (source.one_per_line or not text.strip()):
            yield f"{file.path.name}:{first}", "".join(lines)
            lines = []
        if text.strip():
            first = first if lines else number
            lines.append(text)
    if lines:
        yield f"{file.path.name}:{first}", "".join(lines)


def _hub_documents(source: SourceConfig) -> Iterator[Document]:
    """Rows of a ``datasets`` dataset, streamed: nothing is copied to its cache."""
    import datasets

    try:
        saved = os.path.isdir(source.path) and any(
            os.path.exists(os.path.join(source.path, name)) for name in ("state.json", "dataset_dict.json")
        )
        if saved:  # by save_to_disk
            loaded = datasets.load_from_disk(source.path)
            rows = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(
                source.path, source.subset, split=source.split, revision=source.revision, streaming=True
            )
        for number, record in enumerate(rows):
            place = f"source.path={source.path} row {number}"
            yield Document(
                *_fields(record, source, place, default_id=f"{source.split}:{number}"), bytes_read=0
            )
    except CorpusError:
        raise
    # Everything from a missing network to a missing split comes from `datasets`, in exceptions of many kinds.
    except Exception as error:
        raise CorpusError(
            f"source.path={source.path} (subset {source.subset}, split {source.split}, revision "
            f"{source.revision}) cannot be read by `datasets`: {type(error).__name__}: {error}"
        ) from error
