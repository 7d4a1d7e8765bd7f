"""The first phase of a build, in worker processes: a part of the source -> clean text -> token ids -> a run.

Apart from ``sharding.build``, so that a worker imports neither torch nor transformers.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.corpus_schema import SourceConfig
from sharding.documents import Document, Part
from sharding.duplicates import band_hashes, bands_and_rows, digest
from sharding.runs import Index, Run, run_of, runs_of
from sharding.sources import documents
from sharding.tokens import Encoder, id_dtype
from sharding.wikitext import MarkupError, clean_text

BATCH_CHARS = 1_000_000
BATCH_DOCUMENTS = 512
PIECE_CHARS = 8_000_000
"""A sequential part gives one run for about so many characters."""


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to know."""

    tokenizer_json: str
    vocab_size: int
    special_ids: tuple[int, ...]
    wiki_markup: bool
    min_document_chars: int
    heldout_share: float
    shuffle_seed: int | None
    near_threshold: float | None
    """None: near duplicates are not looked for."""


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    run: Run
    source: SourceConfig
    part: Part
    most: int | None
    """Documents to read at most."""
    piece: list[Document] | None
    """Documents of a sequential part; None: the worker reads the part."""
    last: bool
    """Whether the part is done with this run."""


@dataclass(frozen=True)
class Made:
    """What became of a job, for the progress."""

    bytes: int
    """Bytes of the source that are now done."""
    documents: int
    tokens: int


def jobs(source: SourceConfig, parts: Iterable[Part], folder: Path, most: int | None) -> Iterator[Job]:
    """The runs of ``parts`` that ``folder`` does not hold yet. Sequential parts are read here.

    Raises: CorpusError for a sequential part that cannot be read.
    """
    for part in parts:
        if runs_of(folder, part) is not None:
            continue
        if not part.sequential:
            yield Job(run_of(folder, part, 0), source, part, most, None, last=True)
            continue
        for number, (piece, last) in enumerate(_pieces(islice(documents(source, part), most))):
            run = run_of(folder, part, number)
            if not run.is_complete():
                yield Job(run, source, part, most, piece, last)


def _pieces(found: Iterator[Document]) -> Iterator[tuple[list[Document], bool]]:
    """Consecutive documents of about PIECE_CHARS characters, and whether they are the last; at least once."""
    piece: list[Document] = []
    chars = 0
    for document in found:
        if chars >= PIECE_CHARS:
            yield piece, False
            piece, chars = [], 0
        piece.append(document)
        chars += len(document.text)
    yield piece, True


def share(parts: list[Part], task: int, tasks: int, folder: Path, most: int | None) -> Iterator[Part]:
    """Every ``tasks``-th part from ``task`` on, until the complete parts at the start of the source hold
    ``most`` documents: parts behind them are not needed."""
    prefix = iter(parts)
    part, read = next(prefix, None), 0
    for own in parts[task::tasks]:
        while most is not None and part is not None and (runs := runs_of(folder, part)) is not None:
            read += sum(int(run.index().read) for run in runs)
            part = next(prefix, None)
        if most is not None and read >= most:
            return
        yield own


def make_run(recipe: Recipe, job: Job) -> Made:
    """Do one job. Raises: CorpusError for a part that cannot be read or a tokenizer that is not fit; OSError
    when the disk does."""
    found = documents(job.source, job.part) if job.piece is None else iter(job.piece)
    maker = RunMaker(recipe)
    for batch in _batches(islice(found, job.most)):
        maker.add(batch)
    index, bands, ids = maker.finish(job.last)
    job.run.write(index, bands, ids)
    return Made(job.part.bytes if job.last else 0, maker.read, ids.size)


def _batches(found: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in found:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _encoder(recipe: Recipe) -> Encoder:
    return Encoder(recipe.tokenizer_json, recipe.vocab_size, recipe.special_ids)


class RunMaker:
    """Cleans and tokenises documents, batch by batch, then sorts them. What it makes depends on the recipe
    and the documents alone."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.read = 0  # documents so far
        self._ordinal: list[int] = []
        self._key: list[int] = []
        self._heldout: list[bool] = []
        self._ids: list[NDArray[np.integer]] = []
        self._digest: list[bytes] = []
        self._bands: list[NDArray[np.uint64]] = []
        self._too_short: list[int] = []
        self._unparsed: list[tuple[int, str]] = []

    def add(self, batch: list[Document]) -> None:
        """Raises: CorpusError for a tokenizer that is not fit."""
        recipe, texts = self.recipe, {}
        for ordinal, document in enumerate(batch, start=self.read):
            try:
                text = clean_text(document.text) if recipe.wiki_markup else document.text.strip()
            except MarkupError:
                self._unparsed.append((ordinal, document.id))
                continue
            if len(text) < recipe.min_document_chars:
                self._too_short.append(ordinal)
            else:
                texts[ordinal] = text
        for ordinal, ids in zip(texts, _encoder(recipe).encode(list(texts.values())), strict=True):
            if ids.size:
                self._keep(ordinal, batch[ordinal - self.read].id, ids)
            else:
                self._too_short.append(ordinal)
        self.read += len(batch)

    def _keep(self, ordinal: int, document_id: str, ids: NDArray[np.integer]) -> None:
        self._ordinal.append(ordinal)
        self._key.append(shuffle_key(document_id, self.recipe.shuffle_seed))
        self._heldout.append(is_heldout(document_id, self.recipe.heldout_share))
        self._ids.append(ids)
        self._digest.append(digest(ids))
        if self.recipe.near_threshold is not None:
            self._bands.append(band_hashes(ids, self.recipe.near_threshold))

    def finish(self, last: bool) -> tuple[Index, NDArray[np.uint64], NDArray[np.integer]]:
        """Index, bands [b, n] and ids [all tokens] of the run; ``last``: the last one of its part."""
        key = np.array(self._key, dtype=np.uint64)
        heldout = np.array(self._heldout, dtype=np.bool_)
        order = np.lexsort((key, heldout))  # stable: then by ordinal
        index = Index(
            key=key[order],
            ordinal=np.array(self._ordinal, dtype=np.uint32)[order],
            tokens=np.array([ids.size for ids in self._ids], dtype=np.uint32)[order],
            heldout=heldout[order],
            digest=np.frombuffer(b"".join(self._digest), dtype="<u8").reshape(-1, 2)[order],
            too_short=np.array(sorted(self._too_short), dtype=np.uint32),
            unparsed=np.array([ordinal for ordinal, _ in self._unparsed], dtype=np.uint32),
            unparsed_id=np.array([name for _, name in self._unparsed], dtype=np.str_),
            read=np.array(self.read),
            last=np.array(last),
        )
        near = self.recipe.near_threshold
        count = 0 if near is None else bands_and_rows(near)[0]
        bands = np.array(self._bands, dtype=np.uint64).reshape(order.size, count)[order].T
        empty = np.empty(0, id_dtype(self.recipe.vocab_size))
        return index, bands, np.concatenate([empty, *(self._ids[at] for at in order)])


def shuffle_key(document_id: str, seed: int | None) -> int:
    """Where a document stands in the shuffled source: 64 bits of a hash of the seed and its id."""
    return 0 if seed is None else _hash(f"{seed}:{document_id}")


def is_heldout(document_id: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: by a hash of its id alone, so that it stays there
    when the source grows."""
    return _hash(document_id) < share * 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
