"""WebDataset tars of text that others made, read through the ``webdataset`` library (which imports torch)."""

import bz2
import codecs
import gzip
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from configs.corpus_schema import SourceConfig
from sharding.documents import READ_BYTES, Document, Part, json_record, record_fields, utf8
from sharding.manifest import CorpusError

META = re.compile(r"__[^/]*__($|/)")
"""Members that are no samples, by WebDataset's convention."""
OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def samples(source: SourceConfig, part: Part, raw: BinaryIO) -> Iterator[Document]:
    """A document a sample, in stored order: its ``.txt`` member, or the text field of its ``.json`` member.

    Raises: CorpusError for a sample with neither and for members that WebDataset readers leave out;
        tarfile.TarError for a tar that was cut.
    """

    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = Path(part.source)
    archive = OPENERS.get(path.suffix, lambda file: file)(raw)
    _require_whole(archive, path)
    archive.seek(0)
    members = tar_file_expander([{"url": str(path), "stream": archive}], handler=_refuse)
    for sample in group_by_keys(members, handler=_refuse):
        key = sample["__key__"]
        place = f"{path} sample {key!r}"
        record: dict[str, Any] = {}
        if "json" in sample and ("txt" not in sample or source.id_field):
            record = json_record(sample["json"].removeprefix(codecs.BOM_UTF8), f"{place}, its .json member,")
        if "txt" in sample:
            record[source.text_field] = utf8(
                sample["txt"].removeprefix(codecs.BOM_UTF8), f"{place}, its .txt member,"
            )
        elif "json" not in sample:
            found = ", ".join(f".{name}" for name in sample if not name.startswith("__"))
            raise CorpusError(
                f"{place} has no .txt and no .json member, but {found}; a document is "
                "one of these two (what follows the first dot of a member's name is its kind)"
            )
        yield record_fields(record, source, place, default_id=f"{path.name}/{key}")


def _refuse(error: Exception) -> bool:
    raise tarfile.ReadError(str(error.args[0])) from error  # what follows it are the library's own objects


def _require_whole(archive: IO[bytes], path: Path) -> None:
    """Members that WebDataset readers skip in silence, and an end that they would not miss, are errors."""
    from webdataset.tariterators import base_plus_ext

    end = 0
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        while member := tar.next():
            tar.members = []  # type: ignore[attr-defined] # or it keeps them all
            metadata = META.match(member.name)
            named = base_plus_ext(member.name)[0] is not None
            if not (member.isdir() or metadata or (member.isreg() and named)):
                what = "has no suffix" if member.isreg() else "is no ordinary file"
                raise CorpusError(
                    f"{path}: member {member.name!r} {what}, so WebDataset readers leave it out; remove or "
                    "rename it"
                )
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    archive.seek(end)
    # A block of zeros ends an archive. Readers would stop as quietly where a tar was cut between two members,
    # at a damaged header, and before another archive that was appended.
    if archive.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end of the archive at its byte {end:,}")
    while chunk := archive.read(READ_BYTES):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"more than zeros behind the end of the archive at its byte {end:,}")
