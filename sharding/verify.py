"""Looking at a whole corpus: ``verify`` finds every damage, ``statistics`` counts."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sharding.blocks import Rows, read_block, read_lengths
from sharding.manifest import Corpus, CorpusError, Manifest, Shard, size_problems
from sharding.shards import TAR_END_BYTES
from sharding.tokens import id_dtype

HISTOGRAM_BINS = 8


def verify(corpus: Corpus, *, progress: bool = False) -> list[str]:
    """Read every byte of a corpus and return all that is wrong with it; empty when it is what was built.

    Checked are sizes, SHA-256 and end of every shard, the CRC-32 of every member, and for every row the range
    of its ids, its length, its special tokens and its padding.
    """
    shards = [shard for split in corpus.manifest.splits.values() for shard in split.shards]
    problems = size_problems(corpus)
    with tqdm(
        total=sum(shard.bytes for shard in shards),
        desc="verify",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        for shard in shards:
            problems += _shard_problems(corpus, shard)
            bar.update(shard.bytes)
    for name, split in corpus.manifest.splits.items():
        counted = [(block.rows, block.tokens) for shard in split.shards for block in shard.blocks]
        if (split.rows, split.tokens) != tuple(sum(column) for column in zip(*counted, strict=True)):
            problems.append(f"split {name}: the manifest's rows and tokens are not the sums of its blocks'")
    return problems


def _shard_problems(corpus: Corpus, shard: Shard) -> list[str]:
    path = Path(corpus.store.location) / shard.path
    problems: list[str] = []
    if not path.is_file():
        return problems
    digest, tail = _digest_and_tail(path)
    if digest != shard.sha256:
        problems.append(f"{path}: SHA-256 {digest}, the manifest says {shard.sha256}")
    if tail.strip(b"\0") or len(tail) < TAR_END_BYTES:
        problems.append(f"{path}: does not end with the {TAR_END_BYTES} zero bytes that close a tar archive")
    for block in shard.blocks:
        try:
            rows = read_block(corpus.store, shard, block)
        except CorpusError as error:
            problems.append(str(error))
            continue
        wrong = _row_problems(corpus.manifest, rows, block.rows, block.tokens)
        problems += [f"{path}: block {block.name}: {problem}" for problem in wrong]
    return problems


def _digest_and_tail(path: Path) -> tuple[str, bytes]:
    digest, tail = hashlib.sha256(), b""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            tail = (tail + chunk)[-TAR_END_BYTES:]
    return digest.hexdigest(), tail


def _row_problems(manifest: Manifest, rows: Rows, row_count: int, tokens: int) -> list[str]:
    """What is wrong with rows whose checksums are right: they were built wrong, or the manifest was."""
    ids, lengths, segments = rows
    tokenizer, seq_len = manifest.tokenizer, manifest.seq_len
    if (
        ids.shape != (row_count, seq_len)
        or lengths.shape != (row_count,)
        or segments.shape != (row_count,)
        or ids.dtype != id_dtype(tokenizer.vocab_size)
    ):
        return [
            f"arrays of {ids.shape}, {lengths.shape}, {segments.shape}, not {row_count} rows of {seq_len}"
        ]
    lengths, segments = lengths.astype(np.int64), segments.astype(np.int64)
    if lengths.min() < 3 or lengths.max() > seq_len:
        return [f"row lengths from {lengths.min()} to {lengths.max()}, outside 3 .. {seq_len}"]
    row = np.arange(row_count)
    second = segments < lengths
    rules = {
        f"ids at or above the vocabulary's size {tokenizer.vocab_size}": (ids >= tokenizer.vocab_size).any(
            axis=1
        ),
        "no [CLS] at the start": ids[:, 0] != tokenizer.cls_id,
        "no [SEP] at the end": ids[row, lengths - 1] != tokenizer.sep_id,
        "padding that is not the pad id": (
            (ids != tokenizer.pad_id) & (np.arange(seq_len) >= lengths[:, None])
        ).any(axis=1),
        "a segment B that begins outside the row": (segments < 3) | (segments > lengths),
        "a segment B that no [SEP] precedes": second
        & (ids[row, np.clip(segments - 1, 0, None)] != tokenizer.sep_id),
    }
    problems = [f"{int(broken.sum())} rows have {rule}" for rule, broken in rules.items() if broken.any()]
    if int(lengths.sum()) != tokens:
        problems.append(f"{int(lengths.sum())} tokens, the manifest says {tokens}")
    return problems


def statistics(corpus: Corpus) -> dict[str, Any]:
    """Counts of a corpus, ready for JSON. Of the shards it reads the row lengths only."""
    manifest = corpus.manifest
    edges = np.linspace(0, manifest.seq_len, HISTOGRAM_BINS + 1).round().astype(int)
    splits = {}
    for name, split in manifest.splits.items():
        histogram = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
        for shard in split.shards:
            for block in shard.blocks:
                lengths = read_lengths(corpus.store, shard, block)
                # Bins are (edge, next edge], so that full rows share the last bin with the nearly full.
                histogram += np.bincount(np.searchsorted(edges, lengths) - 1, minlength=HISTOGRAM_BINS)
        splits[name] = {
            "documents": split.documents,
            "rows": split.rows,
            "tokens": split.tokens,
            "padding_share": 1 - split.tokens / (split.rows * manifest.seq_len),
            "bytes": sum(shard.bytes for shard in split.shards),
            "shards": len(split.shards),
            "blocks": sum(len(shard.blocks) for shard in split.shards),
            "rows_by_length": {
                f"{low + 1}-{high}": int(count)
                for low, high, count in zip(edges[:-1], edges[1:], histogram, strict=True)
            },
        }
    return {
        "fingerprint": corpus.fingerprint,
        "source": f"{manifest.source.kind}: {', '.join(manifest.source.names)}",
        "revision": manifest.source.revision,
        "tokenizer": manifest.tokenizer.name,
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "vocab_size": manifest.tokenizer.vocab_size,
        "seq_len": manifest.seq_len,
        "packing": manifest.packing,
        "splits": splits,
    }
