"""The corpus build: an external sort in two phases, each on any number of processes and machines.

    prepare   every part of the source -> clean text -> token ids -> a run, sorted by (split, shuffle key)
    plan      from the runs' indices: which documents stay, in which order, in which shard
    pack      every shard: its documents from all runs -> rows -> a tar
    join      the manifest, and the final name

A part and a shard are made from their own input alone and appear whole or not at all, so the bytes depend
neither on the number of processes and tasks nor on interruptions, and what is finished is never made again.
Memory is that of a part's ids or a shard's in each process, and of the plan (``sharding.plan``) in one.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.corpus_schema import CorpusConfig, Deduplicate, Packing, SourceKind
from sharding.documents import Part
from sharding.manifest import (
    FORMAT_VERSION,
    CorpusError,
    Manifest,
    Shard,
    SourceInfo,
    Split,
    TokenizerInfo,
)
from sharding.merge import RowRecipe, ShardJob, finished_shard, make_shard
from sharding.plan import NoDocuments, Plan, make_plan, read_plan, write_plan
from sharding.prepare import Recipe, jobs, make_run, share
from sharding.progress import Progress
from sharding.runs import Run, runs_of
from sharding.sources import parts, source_files
from sharding.tokens import id_dtype, load_tokenizer, tokenizer_info
from sharding.workers import in_workers
from sharding.workspace import Workspace, open_workspace

log = logging.getLogger(__name__)

LIBRARIES = ("mwparserfromhell", "mwxml", "tokenizers")
"""What decides the ids besides our code: a build does not go on under another version of these."""


def build(config: CorpusConfig, *, progress: bool) -> Manifest:
    """Build the corpus that ``config`` describes, on this machine, and return its manifest. ``progress``
    shows it on stderr. A build that was interrupted goes on where it was.

    Raises: CorpusError for a source, tokenizer, output or disk with which it cannot be done; a corpus that
        was to be replaced stays as it was, and so does what is finished of the new one.
    """
    with _opened(config, shared=False) as opened:
        try:
            opened.prepare(0, 1, progress)
            opened.pack(0, 1, progress)
            return opened.join()
        except NoDocuments:
            shutil.rmtree(opened.work.partial)  # it is of no use to a build with other settings
            raise


def prepare(config: CorpusConfig, task: int, tasks: int, *, progress: bool) -> None:
    """Task ``task`` (from 0) of ``tasks`` of the first phase. Raises as ``build``."""
    with _opened(config, shared=True) as opened:
        opened.prepare(task, tasks, progress)


def pack(config: CorpusConfig, task: int, tasks: int, *, progress: bool) -> None:
    """Task ``task`` (from 0) of ``tasks`` of the second phase, after all of the first.

    Raises: CorpusError naming the runs that are missing, and as ``build``.
    """
    with _opened(config, shared=True) as opened:
        opened.pack(task, tasks, progress)


def join(config: CorpusConfig) -> Manifest:
    """The last step, after all tasks of both phases; returns the manifest.

    Raises: CorpusError naming the runs or shards that are missing, and as ``build``.
    """
    with _opened(config, shared=False) as opened:
        return opened.join()


@contextlib.contextmanager
def _opened(config: CorpusConfig, *, shared: bool) -> Iterator["_Build"]:
    found = parts(config.source)
    tokenizer = load_tokenizer(config.tokenizer, config.tokenizer_revision)
    info = tokenizer_info(tokenizer, config.tokenizer, config.tokenizer_revision)
    recipe = _recipe(config, found, info)
    with open_workspace(config, recipe, shared=shared) as work:
        yield _Build(config, found, info, tokenizer.backend_tokenizer.to_str(), work)


def _recipe(config: CorpusConfig, found: list[Part], info: TokenizerInfo) -> dict[str, Any]:
    """All that decides the bytes of a corpus, under the names that a person knows it by."""
    sizes: dict[str, int] = {}
    for part in found:
        name = os.path.basename(os.path.normpath(part.source))
        sizes[name] = sizes.get(name, 0) + part.bytes
    cut = json.dumps([(part.name, part.start, part.stop, part.bytes, part.sequential) for part in found])
    near = config.deduplicate is Deduplicate.near
    source = asdict(config.source)
    source.pop("path")
    return {
        "format version": FORMAT_VERSION,
        **{f"source.{key}": getattr(value, "value", value) for key, value in source.items()},
        "source files (bytes)": sizes,
        "source parts": hashlib.sha256(cut.encode()).hexdigest(),
        "tokenizer": asdict(info),
        "seq_len": config.seq_len,
        "packing": config.packing.value,
        "min_document_chars": config.min_document_chars,
        "max_documents": config.max_documents,
        "deduplicate": config.deduplicate.value,
        "near_threshold": config.near_threshold if near else None,
        "shuffle_seed": config.shuffle_seed,
        "heldout_share": config.heldout_share,
        "block_rows": config.block_rows,
        "max_shard_bytes": config.max_shard_bytes,
        "libraries": {
            name: importlib.metadata.version(name) for name in (*LIBRARIES, *(["datasketch"] if near else []))
        },
    }


@dataclass(frozen=True)
class _Build:
    """A build whose folder is open."""

    config: CorpusConfig
    parts: list[Part]
    tokenizer: TokenizerInfo
    tokenizer_json: str
    work: Workspace

    @property
    def processes(self) -> int:
        return self.config.processes or len(os.sched_getaffinity(0))

    def prepare(self, task: int, tasks: int, progress: bool) -> None:
        config, folder = self.config, self.work.runs
        recipe = Recipe(
            tokenizer_json=self.tokenizer_json,
            vocab_size=self.tokenizer.vocab_size,
            special_ids=(self.tokenizer.pad_id, self.tokenizer.cls_id, self.tokenizer.sep_id),
            wiki_markup=config.source.kind is SourceKind.mediawiki,
            min_document_chars=config.min_document_chars,
            heldout_share=config.heldout_share,
            shuffle_seed=config.shuffle_seed,
            near_threshold=config.near_threshold if config.deduplicate is Deduplicate.near else None,
        )
        own = self.parts[task::tasks]
        done = sum(part.bytes for part in own if runs_of(folder, part) is not None)
        wanted = share(self.parts, task, tasks, folder, config.max_documents)
        todo = jobs(config.source, wanted, folder, config.max_documents)
        with Progress("prepare", sum(part.bytes for part in own), done, "B", progress) as shown:
            with self._disk_watched(shown):
                for made in in_workers(partial(make_run, recipe), todo, self.processes):
                    shown.advance(made.bytes, made.documents, made.tokens)

    def pack(self, task: int, tasks: int, progress: bool) -> None:
        recipe = RowRecipe(
            seq_len=self.config.seq_len,
            block_rows=self.config.block_rows,
            cross_documents=self.config.packing is Packing.full,
            vocab_size=self.tokenizer.vocab_size,
            pad_id=self.tokenizer.pad_id,
            cls_id=self.tokenizer.cls_id,
            sep_id=self.tokenizer.sep_id,
        )
        runs = self._runs()
        with self._disk_watched(None):
            shards = _shards(self._plan(runs))[task::tasks]
            for shard in shards:
                for path in (self.work.corpus / shard.path, self.work.marker(shard.path)):
                    path.parent.mkdir(parents=True, exist_ok=True)
            todo = [shard for shard in shards if self._finished(shard) is None]
            total = sum(shard.tokens for shard in shards)
            done = total - sum(shard.tokens for shard in todo)
            with Progress("pack", total, done, " tokens", progress) as shown:
                shard_jobs = (self._shard_job(shard, runs) for shard in todo)
                for documents, tokens in in_workers(partial(make_shard, recipe), shard_jobs, self.processes):
                    shown.advance(tokens, documents, tokens)

    def join(self) -> Manifest:
        plan = self._plan(self._runs())
        found: dict[str, list[tuple[int, Shard]]] = {name: [] for name in plan.splits}
        missing = []
        for shard in _shards(plan):
            if (finished := self._finished(shard)) is None:
                missing.append(shard.path)
            else:
                found[shard.split].append(finished)
        if missing:
            raise CorpusError(
                f"{len(missing)} shards are not finished: {_some(missing)}; {_again('pack', self.work)}"
            )
        manifest = self._manifest(plan, {name: _split(finished) for name, finished in found.items()})
        with self._disk_watched(None):
            self.work.install(manifest)
        if plan.unparsed:
            log.warning(
                "%d pages were left out because their markup could not be parsed: %s",
                len(plan.unparsed),
                _some(plan.unparsed),
            )
        return manifest

    def _runs(self) -> list[Run]:
        """The runs that the corpus is made of, in the source's order; CorpusError while some are missing."""
        most = self.config.max_documents
        found: list[Run] = []
        missing, read = [], 0
        for part in self.parts:
            if most is not None and read >= most:
                break
            if (runs := runs_of(self.work.runs, part)) is None:
                missing.append(part.name)
                continue
            found += runs
            if most is not None:
                read += sum(int(run.index().read) for run in runs)
        if missing:
            raise CorpusError(
                f"{len(missing)} of {len(self.parts)} parts of the source are not prepared: "
                f"{_some(missing)}; {_again('prepare', self.work)}"
            )
        return found

    def _plan(self, runs: list[Run]) -> Plan:
        if self.work.plan.exists():
            return read_plan(self.work.plan)
        plan = make_plan(self.config, runs, id_dtype(self.tokenizer.vocab_size).itemsize)
        write_plan(self.work.plan, plan)
        return plan

    def _finished(self, shard: "_Planned") -> tuple[int, Shard] | None:
        return finished_shard(self.work.marker(shard.path), self.work.corpus, shard.path)

    def _shard_job(self, shard: "_Planned", runs: list[Run]) -> ShardJob:
        used, run = np.unique(shard.run, return_inverse=True)
        return ShardJob(
            corpus=self.work.corpus,
            path=shard.path,
            marker=self.work.marker(shard.path),
            runs=tuple(runs[at] for at in used),
            run=run,
            position=shard.position,
            tokens=shard.tokens,
        )

    def _manifest(self, plan: Plan, splits: dict[str, Split]) -> Manifest:
        config, source = self.config, self.config.source
        hub = source.kind is SourceKind.datasets
        dataset = (
            os.path.basename(os.path.normpath(source.path)) if os.path.isdir(source.path) else source.path
        )
        return Manifest(
            version=FORMAT_VERSION,
            tokenizer=self.tokenizer,
            source=SourceInfo(
                kind=source.kind.value,
                names=(dataset,) if hub else tuple(file.name for file in source_files(source)),
                subset=source.subset,
                split=source.split if hub else None,
                revision=source.revision,
                min_document_chars=config.min_document_chars,
                max_documents=config.max_documents,
            ),
            seq_len=config.seq_len,
            packing=config.packing.value,
            block_rows=config.block_rows,
            heldout_share=config.heldout_share,
            shuffle_seed=config.shuffle_seed,
            deduplicate=config.deduplicate.value,
            near_threshold=config.near_threshold if config.deduplicate is Deduplicate.near else None,
            left_out=plan.left_out,
            splits=splits,
        )

    @contextlib.contextmanager
    def _disk_watched(self, shown: Progress | None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self.work.disk_full(shown.share if shown else None) from error


@dataclass(frozen=True)
class _Planned:
    """One shard of a plan."""

    split: str
    path: str
    run: NDArray[np.uint32]
    position: NDArray[np.uint32]
    tokens: int


def _shards(plan: Plan) -> list[_Planned]:
    """All shards, split by split."""
    return [
        _Planned(
            split=name,
            path=f"{name}/{number:05d}.tar",
            run=split.run[start:stop],
            position=split.position[start:stop],
            tokens=int(tokens),
        )
        for name, split in plan.splits.items()
        for number, (start, stop, tokens) in enumerate(
            zip(split.bounds[:-1], split.bounds[1:], split.shard_tokens, strict=True)
        )
    ]


def _split(shards: list[tuple[int, Shard]]) -> Split:
    return Split(
        documents=sum(documents for documents, _ in shards),
        rows=sum(sum(shard.rows) for _, shard in shards),
        tokens=sum(sum(shard.tokens) for _, shard in shards),
        shards=tuple(shard for _, shard in shards),
    )


def _some(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _again(stage: str, work: Workspace) -> str:
    return (
        f"run `python launcher/corpus.py build --stage {stage}` again with the same keys, "
        f"output={work.output} (--task I/N for a share): what is finished is not made again"
    )
