"""``verify``: every byte of a corpus against its manifest, every row against the rules of rows."""

import errno
import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sharding.blocks import Rows, parse_block, parse_labels
from sharding.manifest import (
    KINDS,
    Block,
    Corpus,
    CorpusError,
    Manifest,
    Shard,
    TaskInfo,
    TokenizerInfo,
    size_problems,
)
from sharding.store import Store
from sharding.tokens import id_dtype
from sharding.workers import in_workers

TAR_END_BYTES = 2 * tarfile.BLOCKSIZE
BYTES_PER_WORKER = 2**29  # a process takes about a second to start, in which another reads this much


def verify(corpus: Corpus, *, progress: bool = False, workers: int | None = None) -> list[str]:
    """Read every byte of a corpus once and return all that is wrong with it; empty when it is what was built.

    Checked are size and SHA-256 of every shard, name, place and size of every member in its tar header, the
    zeros that end the archive, the CRC-32 of every member, and of every row the range of its ids, its length,
    its special tokens, its padding and its label; then the manifest's sums. The problems stand in the
    manifest's order.

    Args:
        progress: show a bar of bytes on stderr.
        workers: processes, each with one shard in memory; None: one per core if there is work for them.
    """
    shards = [shard for split in corpus.manifest.splits.values() for shard in split.shards]
    total_bytes = sum(shard.bytes for shard in shards)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), 1 + total_bytes // BYTES_PER_WORKER)
    problems = size_problems(corpus)
    with tqdm(
        total=total_bytes, desc="verify", unit="B", unit_scale=True, disable=None if progress else True
    ) as bar:
        found: dict[int, list[str]] = {}
        for number, told in _check(corpus, shards, workers):
            found[number] = told
            bar.update(shards[number].bytes)
    problems += [problem for number in sorted(found) for problem in found[number]]
    for name, split in corpus.manifest.splits.items():
        counted = (
            sum(sum(shard.rows) for shard in split.shards),
            sum(sum(shard.tokens) for shard in split.shards),
        )
        if (split.rows, split.tokens) != counted:
            problems.append(f"split {name}: the manifest's rows and tokens are not the sums of its blocks'")
    return problems


def _check(corpus: Corpus, shards: Sequence[Shard], workers: int) -> Iterator[tuple[int, list[str]]]:
    """The number of each shard and what is wrong with it, as they are ready."""
    # Without the splits: all blocks would travel to the workers with every shard.
    check = partial(_shard_problems, corpus.store, replace(corpus.manifest, splits={}))
    # Processes: the many small steps of a block keep threads waiting for each other (1.1x with two).
    return map(check, enumerate(shards)) if workers == 1 else in_workers(check, enumerate(shards), workers)


def _shard_problems(store: Store, manifest: Manifest, numbered: tuple[int, Shard]) -> tuple[int, list[str]]:
    """What is wrong with the contents of one shard, which is read whole; with its number."""
    number, shard = numbered
    path = f"{store.location}/{shard.path}"
    try:
        content = store.read(shard.path, 0, shard.bytes)
    except OSError as error:
        # A missing shard has been named together with the sizes.
        return number, [] if error.errno == errno.ENOENT else [f"{path} cannot be read: {error}"]
    problems = []
    digest = hashlib.sha256(content).hexdigest()
    if digest != shard.sha256:
        problems.append(f"{path}: SHA-256 {digest}, the manifest says {shard.sha256}")
    problems += [f"{path}: {problem}" for problem in _archive_problems(shard, content)]
    for block in shard.blocks:
        try:
            end = block.seg.offset + block.seg.bytes
            rows = parse_block(store, shard, block, content[block.ids.offset : end])
            labels = block.lab and parse_labels(
                store, shard, block, content[block.lab.offset : block.lab.offset + block.lab.bytes]
            )
        except CorpusError as error:
            problems.append(str(error))
            continue
        wrong = _row_problems(manifest.tokenizer, manifest.seq_len, rows, block)
        wrong += _label_problems(manifest.task, labels, rows[1])
        problems += [f"{path}: block {block.name}: {problem}" for problem in wrong]
    return number, problems


def _archive_problems(shard: Shard, content: bytes) -> Iterator[str]:
    """Where the tar archive is not exactly the members that the manifest lists, one after the other."""
    position = 0
    for block in shard.blocks:
        for kind, member in zip(KINDS, (block.ids, block.len, block.seg, block.lab), strict=True):
            if member is None:
                continue
            name = f"{block.name}.{kind}.npy"
            if member.offset != position + tarfile.BLOCKSIZE:
                yield f"member {name}: data at offset {position + tarfile.BLOCKSIZE}, not {member.offset}"
            try:
                header = content[member.offset - tarfile.BLOCKSIZE : member.offset]
                info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
                if not info.isreg() or (info.name, info.size) != (name, member.bytes):
                    yield f"member {name} ({member.bytes} bytes): its header says {info.name}, {info.size}"
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                yield f"member {name} at offset {member.offset} has no tar header: {error}"
            position = -(-(member.offset + member.bytes) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    tail = content[position:]
    if len(tail) < TAR_END_BYTES or any(tail):
        yield f"does not end with the {TAR_END_BYTES} zero bytes that close a tar archive"


def _row_problems(tokenizer: TokenizerInfo, seq_len: int, rows: Rows, block: Block) -> list[str]:
    """What is wrong with rows whose checksums are right: they were built wrong, or the manifest was."""
    ids, lengths, segments = rows
    if (
        block.rows < 1
        or ids.shape != (block.rows, seq_len)
        or lengths.shape != (block.rows,)
        or segments.shape != (block.rows,)
        or ids.dtype != id_dtype(tokenizer.vocab_size)
    ):
        return [
            f"arrays of {ids.shape}, {lengths.shape}, {segments.shape} of {ids.dtype}, not {block.rows} rows "
            f"of {seq_len} of {id_dtype(tokenizer.vocab_size)}"
        ]
    lengths, segments = lengths.astype(np.int64), segments.astype(np.int64)
    if lengths.min() < 3 or lengths.max() > seq_len:
        return [f"row lengths from {lengths.min()} to {lengths.max()}, outside 3 .. {seq_len}"]
    first_b = 2 if block.lab else 3  # in a task's corpus one text of a pair may be empty
    row = np.arange(block.rows)
    second = segments < lengths
    # Before anything that makes an array of all ids: nearly all rows are right, and these are cheap.
    padded = np.flatnonzero(lengths < seq_len)
    padding_broken = np.zeros(block.rows, dtype=bool)
    padding_broken[padded] = (
        (ids[padded] != tokenizer.pad_id) & (np.arange(seq_len) >= lengths[padded, None])
    ).any(axis=1)
    rules = {
        f"ids at or above the vocabulary's size {tokenizer.vocab_size}": (
            ids.max(axis=1) >= tokenizer.vocab_size
        ),
        "no [CLS] at the start": ids[:, 0] != tokenizer.cls_id,
        "no [SEP] at the end": ids[row, lengths - 1] != tokenizer.sep_id,
        "padding that is not the pad id": padding_broken,
        "a segment B that begins outside the row": (segments < first_b) | (segments > lengths),
        "a segment B that no [SEP] precedes": second
        & (ids[row, np.clip(segments - 1, 0, None)] != tokenizer.sep_id),
    }
    problems = [f"{int(broken.sum())} rows have {rule}" for rule, broken in rules.items() if broken.any()]
    if int(lengths.sum()) != block.tokens:
        problems.append(f"{int(lengths.sum())} tokens, the manifest says {block.tokens}")
    return problems


def _label_problems(
    task: TaskInfo | None, labels: NDArray[np.float32] | None, lengths: NDArray[np.integer]
) -> list[str]:
    """What is wrong with the labels [n, K] of rows of these lengths [n]."""
    if task is None or labels is None:
        return [] if task is labels is None else ["labels without a task, or a task without labels"]
    columns = 2 if task.kind == "spans" else 1
    if labels.shape != (len(lengths), columns) or labels.dtype != np.float32:
        return [f"labels of {labels.shape} of {labels.dtype}, not {(len(lengths), columns)} of float32"]
    if task.kind == "classification":
        wrong = ~np.isin(labels[:, 0], np.arange(len(task.labels)))
    elif task.kind == "regression":
        wrong = ~np.isfinite(labels[:, 0])
    else:
        first, last = labels.T
        wrong = (labels % 1 != 0).any(axis=1) | (first < 0) | (first > last) | (last >= lengths)
    return [f"{int(wrong.sum())} rows have labels that are none of {task.kind}"] if wrong.any() else []
