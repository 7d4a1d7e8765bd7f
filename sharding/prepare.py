"""What the worker processes of a build do: documents to clean text to token ids.

Apart from ``sharding.build``, so that a worker imports neither torch nor transformers.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.manifest import CorpusError
from sharding.documents import Document
from sharding.tokens import Encoder
from sharding.wikitext import MarkupError, clean_text

BATCH_CHARS = 1_000_000
BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to know."""

    tokenizer_json: str
    vocab_size: int
    special_ids: tuple[int, ...]
    wiki_markup: bool
    min_document_chars: int


@dataclass(frozen=True)
class Prepared:
    """What became of one batch of documents, in their order."""

    documents: list[tuple[str, NDArray[np.integer]]]
    """Id and token ids of the documents that stay."""
    too_short: int
    """Documents whose clean text has fewer than ``min_document_chars`` characters, or no token."""
    unparsed: list[str]
    """Ids of pages whose markup defeated the parser."""
    read: int
    """Documents in the batch."""
    bytes_read: int
    """Bytes of the source read up to its end."""


class Worker:
    """Cleans and tokenises batches of documents. A pure function of the recipe and the batch."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.encoder = Encoder(recipe.tokenizer_json, recipe.vocab_size, recipe.special_ids)

    def prepare(self, batch: list[Document]) -> Prepared:
        """Raises CorpusError for a tokenizer that is not fit."""
        texts: dict[int, str] = {}
        unparsed = []
        for index, document in enumerate(batch):
            try:
                texts[index] = clean_text(document.text) if self.recipe.wiki_markup else document.text.strip()
            except MarkupError:
                unparsed.append(document.id)
        long_enough = {i: text for i, text in texts.items() if len(text) >= self.recipe.min_document_chars}
        encoded = zip(long_enough, self.encoder.encode(list(long_enough.values())), strict=True)
        documents = [(batch[index].id, ids) for index, ids in encoded if ids.size]
        too_short = len(texts) - len(documents)
        return Prepared(documents, too_short, unparsed, len(batch), bytes_read=0)


def prepare_all(documents: Iterable[Document], recipe: Recipe, processes: int) -> Iterator[Prepared]:
    """Prepare documents in worker processes; results come in the documents' order, batch by batch.

    Few batches are under way at a time, so that memory stays bounded however long the source is.
    Raises: CorpusError when a worker dies, and whatever reading the documents raises.
    """
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(recipe,)
    )
    under_way: deque[Future[Prepared]] = deque()
    try:
        for batch in _batches(documents):
            under_way.append(pool.submit(_prepare, batch))
            if len(under_way) > 2 * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise CorpusError(
            "a worker process of the build was killed, most often because memory ran out; "
            f"set processes below {processes}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


_worker: Worker  # of this worker process


def _start_worker(recipe: Recipe) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(recipe)


def _end_with_parent() -> None:
    """A worker of a parent that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(batch: list[Document]) -> Prepared:
    return _worker.prepare(batch)
