"""The corpus build: source -> clean text -> token ids (worker processes) -> rows -> shards -> manifest.

The documents are packed by one process in the order of the source, so the bytes written do not depend on the
number of workers. Everything is written beside the output under a temporary name and renamed when complete.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from configs.corpus_schema import CorpusConfig, Packing, SourceKind
from sharding.files import install_folder, sync
from sharding.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    CorpusError,
    Manifest,
    SourceInfo,
    Split,
    TokenizerInfo,
)
from sharding.packing import Packer
from sharding.prepare import Prepared, Recipe, prepare_all
from sharding.shards import ShardWriter
from sharding.sources import documents, parts, source_files
from sharding.tokens import id_dtype, load_tokenizer, tokenizer_info

log = logging.getLogger(__name__)


def build(config: CorpusConfig, *, progress: bool) -> Manifest:
    """Build the corpus that ``config`` describes and return its manifest. ``progress`` shows it on stderr.

    Raises: CorpusError for a source, tokenizer, output or disk with which it cannot be done; nothing is
        left under the output's name then, and a corpus that was to be replaced stays as it was.
    """
    output = Path(config.output)
    _require_free(output, config.overwrite)
    files = source_files(config.source)
    tokenizer = load_tokenizer(config.tokenizer, config.tokenizer_revision)
    info = tokenizer_info(tokenizer, config.tokenizer, config.tokenizer_revision)
    recipe = Recipe(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        vocab_size=info.vocab_size,
        special_ids=(info.pad_id, info.cls_id, info.sep_id),
        wiki_markup=config.source.kind is SourceKind.mediawiki,
        min_document_chars=config.min_document_chars,
    )
    source_bytes = sum(file.stat().st_size for file in files)
    with _partial_folder(output) as partial, _Progress(source_bytes, progress) as shown:
        writers: dict[str, _SplitWriter] = {}
        try:
            for name in _split_names(config):
                writers[name] = _SplitWriter.start(partial, name, config, info)
            _write_documents(config, recipe, writers, shown)
            splits = {name: writer.finish() for name, writer in writers.items()}
            _require_documents(config, splits, shown)
            manifest = Manifest(
                version=FORMAT_VERSION,
                tokenizer=info,
                source=_source_info(config, files),
                seq_len=config.seq_len,
                packing=config.packing.value,
                block_rows=config.block_rows,
                heldout_share=config.heldout_share,
                splits=splits,
            )
            _write_synced(partial / MANIFEST_NAME, manifest.to_json())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _disk_full(partial, output, shown) from error
        finally:
            for writer in writers.values():
                writer.shards.abort()
        install_folder(partial, output)
    return manifest


@dataclass
class _SplitWriter:
    """Documents of one split on their way into shards."""

    packer: Packer
    shards: ShardWriter
    documents: int = 0

    @classmethod
    def start(cls, root: Path, name: str, config: CorpusConfig, info: TokenizerInfo) -> "_SplitWriter":
        packer = Packer(
            seq_len=config.seq_len,
            block_rows=config.block_rows,
            cross_documents=config.packing is Packing.full,
            pad_id=info.pad_id,
            cls_id=info.cls_id,
            sep_id=info.sep_id,
            dtype=id_dtype(info.vocab_size),
        )
        return cls(packer, ShardWriter(root, name, config.max_shard_bytes))

    def finish(self) -> Split:
        for block in self.packer.finish():
            self.shards.write(block)
        return Split(self.documents, self.shards.rows, self.shards.tokens, self.shards.close())


def _split_names(config: CorpusConfig) -> tuple[str, ...]:
    return ("train", "heldout") if config.heldout_share else ("train",)


def is_heldout(document_id: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: by a hash of its id alone, so that it stays there
    when the source grows."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _write_documents(
    config: CorpusConfig,
    recipe: Recipe,
    writers: dict[str, _SplitWriter],
    shown: "_Progress",
) -> None:
    """Read, prepare, pack and write all documents, in the order of the source."""
    processes = config.processes or len(os.sched_getaffinity(0))
    found = (document for part in parts(config.source) for document in documents(config.source, part))
    if config.max_documents is not None:
        found = itertools.islice(found, config.max_documents)
    for prepared in prepare_all(found, recipe, processes):
        for document_id, ids in prepared.documents:
            writer = writers["heldout" if is_heldout(document_id, config.heldout_share) else "train"]
            writer.documents += 1
            for block in writer.packer.add(ids):
                writer.shards.write(block)
        shown.update(prepared)
    if shown.unparsed:
        log.warning(
            "%d pages were left out because their markup could not be parsed: %s",
            len(shown.unparsed),
            ", ".join(shown.unparsed[:20]) + (", ..." if len(shown.unparsed) > 20 else ""),
        )


def _require_documents(config: CorpusConfig, splits: dict[str, Split], shown: "_Progress") -> None:
    if not sum(split.documents for split in splits.values()):
        raise CorpusError(
            f"source.path={config.source.path} gives an empty corpus: of {shown.read} documents "
            f"{shown.too_short} are shorter than min_document_chars={config.min_document_chars} once clean, "
            f"{len(shown.unparsed)} could not be parsed; check source.kind and source.path, or lower it"
        )
    for name, split in splits.items():
        if not split.documents:
            raise CorpusError(
                f"heldout_share={config.heldout_share} leaves the {name} split without any of the "
                f"{sum(split.documents for split in splits.values())} documents; use more documents, "
                f"another share, or heldout_share=0 for a corpus without a held-out split"
            )


def _source_info(config: CorpusConfig, files: list[Path]) -> SourceInfo:
    source = config.source
    hub = source.kind is SourceKind.datasets
    dataset = os.path.basename(os.path.normpath(source.path)) if os.path.isdir(source.path) else source.path
    return SourceInfo(
        kind=source.kind.value,
        names=(dataset,) if hub else tuple(file.name for file in files),
        subset=source.subset,
        split=source.split if hub else None,
        revision=source.revision,
        min_document_chars=config.min_document_chars,
        max_documents=config.max_documents,
    )


def _require_free(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise CorpusError(
            f"output={output} exists and is no corpus; it is never replaced: choose another name"
        )
    if not overwrite:
        raise CorpusError(f"output={output} already holds a corpus; set overwrite=true to replace it")


@contextlib.contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """The folder in which a build works, removed if it fails. One that a killed build left is replaced."""
    partial = output.with_name(f"{output.name}.partial")
    descriptor = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for stale in partial.iterdir():
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    except BlockingIOError:
        os.close(descriptor) if descriptor is not None else None
        raise CorpusError(
            f"another build is writing {partial}; wait for it or choose another output"
        ) from None
    except OSError as error:
        raise CorpusError(f"output={output} cannot be written: {partial}: {error.strerror}") from error
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _write_synced(path: Path, text: str) -> None:
    """Write the manifest, the last file of a corpus, and make all its names survive a power cut."""
    path.write_text(text, encoding="utf-8")
    for entry in (path, *(child for child in path.parent.iterdir() if child.is_dir()), path.parent):
        sync(entry)


def _disk_full(partial: Path, output: Path, shown: "_Progress") -> CorpusError:
    written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(partial).free
    needed = f"more than {written:,} bytes are needed"
    if shown.bytes_read:
        share = shown.bytes_read / shown.source_bytes
        needed = f"about {int(written / share):,} bytes are needed ({share:.0%} of the source was read)"
    return CorpusError(
        f"no space left for {output}: {written:,} bytes were written to {partial}, {free:,} are free, "
        f"{needed}; free that much or set output to another disk (what was written is removed again)"
    )


@dataclass
class _Progress:
    """What has been read so far; shown as a bar on a terminal and as a line now and then elsewhere."""

    source_bytes: int
    """Size of the source's files; 0 when it is not known."""
    visible: bool
    read: int = 0
    too_short: int = 0
    bytes_read: int = 0
    tokens: int = 0
    unparsed: list[str] = field(default_factory=list)
    line_every_s: float = 30.0

    def __enter__(self) -> "_Progress":
        on_terminal = self.visible and sys.stderr.isatty()
        unit = {"unit": "B", "unit_scale": True} if self.source_bytes else {"unit": " documents"}
        self._bar = tqdm(total=self.source_bytes or None, desc="corpus", disable=not on_terminal, **unit)
        self._lines = self.visible and not on_terminal
        self._last_line_s = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, prepared: Prepared) -> None:
        self._bar.update(prepared.bytes_read - self.bytes_read if self.source_bytes else prepared.read)
        self.read += prepared.read
        self.too_short += prepared.too_short
        self.unparsed += prepared.unparsed
        self.bytes_read = prepared.bytes_read
        self.tokens += sum(ids.size for _, ids in prepared.documents)
        self._bar.set_postfix_str(f"{self.read:,} documents, {self.tokens:,} tokens")
        if self._lines and time.monotonic() - self._last_line_s >= self.line_every_s:
            self._last_line_s = time.monotonic()
            share = f"{self.bytes_read / self.source_bytes:.1%} of the source, " if self.source_bytes else ""
            print(
                f"corpus: {share}{self.read:,} documents, {self.tokens:,} tokens", file=sys.stderr, flush=True
            )
